"""Products over rows that are sorted by expert, in Triton: every GPU, no wait for it, no gathered copy of x.

`grouped_linear` has base product, adapter and bias in one launch, `combine_rows` routing weight and sum in another,
`grouped_outer` gradients of factors as the parameters are stored. A training forward of one layer is six or seven
launches, a backward six. Beside products of torch's, adapters' terms are passes of their own (`grouped_term`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...call_context import new_tuple
from ...specs import AnyGate, ExpertWeights, Gate
from .. import grouped_mm
from ..reference.grouped import Factors, Products, Rows
from . import route
from .combine_rows import combine_rows
from .expert_gate import expert_gate, expert_gate_backward
from .factor_layout import lay_out
from .grouped_linear import Tile, choose_tile, grouped_linear
from .grouped_outer import Outer, grouped_outer
from .grouped_term import grouped_add, grouped_shrink


class ByToken(NamedTuple):
    """x [T, K], to be read by row."""

    x: Tensor


def sort_rows(index: Tensor, weight: Tensor, leaves_out: bool, backend: str) -> Rows:
    """The rows of `index` [T, k], the expert that each token chose, for products of this backend that begin with this
    weight, by which their tile is chosen."""
    tile = choose_tile(weight, index.numel())
    return route.sort_rows(index, weight.shape[0], tile.m, leaves_out, backend, tile)


class TritonPasses(Products):
    """All that is made of the rows but products with the weights: passes, and what the adapters need."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self.tile: Tile = rows.tile

    def take(self, x: Tensor) -> ByToken:
        return new_tuple(ByToken, (x,))

    def lay_out(self, up: ExpertWeights, down: ExpertWeights) -> tuple[Factors, Factors]:
        return lay_out(up, down)

    def shrink_back(self, dy, weights: ExpertWeights, factors: Factors) -> Tensor | None:
        return None if factors.b is None else self._shrink(dy, factors.b)[0]

    def gradients(
        self,
        weights: ExpertWeights,
        needs: tuple[bool, bool],
        of_a: tuple[Tensor, Any],
        of_b: tuple[Tensor, Any],
        routing: Tensor | None = None,
        crossed: bool | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        a, b, da, db, outers = weights.lora_a, weights.lora_b, None, None, []
        experts, rank, k = a.shape
        if needs[0]:
            if crossed is None:
                da = torch.empty_like(a)
                strides = da.stride()
            else:
                da, strides = _new_stored(a, experts, rank, k, crossed)
            outers.append(self._outer(da, strides, k, *of_a))
        if needs[1]:
            n = b.shape[1]
            if crossed is None:
                db = torch.empty_like(b)
                by_expert, by_column, by_rank = db.stride()
                strides = by_expert, by_rank, by_column
            else:
                db, strides = _new_stored(b, experts, rank, n, not crossed)
            outers.append(self._outer(db, strides, n, *of_b, weights.scaling))
        if outers:
            self._fill(outers, rank, routing)
        return da, db

    def sums(self, y, bias: Tensor, routing: Tensor | None = None) -> Tensor:
        out = torch.empty_like(bias)
        by_expert, by_column = out.stride()
        self._fill([self._outer(out, (by_expert, 0, by_column), bias.shape[1], None, y)], 1, routing)
        return out

    def gate(self, z: Tensor, gate: AnyGate) -> Tensor:
        return expert_gate(z, gate) if isinstance(gate, Gate) else super().gate(z, gate)

    def gate_back(
        self, z: Tensor, dh: Tensor, routing: Tensor, gate: AnyGate, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(gate, Gate):
            return expert_gate_backward(z, dh, routing, self.rows.order, self.rows.ends, gate, dtype)
        return super().gate_back(z, dh, routing, gate, dtype)

    def combine(self, y: Tensor, routing: Tensor | None = None) -> Tensor:
        rows = self.rows
        dtype = y.dtype
        if routing is not None and routing.dtype is not dtype:
            dtype = torch.promote_types(dtype, routing.dtype)
        return combine_rows(y, routing, rows.place, rows.ends, rows.tokens, dtype)

    def _source(self, x) -> tuple[Tensor, Tensor | None]:
        """x, and the order to read it in where it is by token."""
        return (x.x, self.rows.order) if isinstance(x, ByToken) else (x, None)

    def _shrink(self, x, d: Tensor, gather: bool = False) -> tuple[Tensor, Tensor | None]:
        rows = self.rows
        return grouped_shrink(*self._source(x), rows.tiles, self.tile.m, d, rows.per_token, gather)

    def _outer(self, out: Tensor, strides, length: int, short: Tensor | None, long, scaling: float = 1.0) -> Outer:
        by_token = isinstance(long, ByToken)
        return new_tuple(Outer, (out, strides, length, short, long.x if by_token else long, by_token, scaling))

    def _fill(self, outers: list[Outer], rank: int, routing: Tensor | None) -> None:
        rows, second = self.rows, outers[1] if len(outers) == 2 else None
        grouped_outer(outers[0], second, rank, rows.order, rows.ends, routing=routing, per_token=rows.per_token)


def _new_stored(like: Tensor, experts: int, rank: int, length: int, experts_last: bool):
    """Memory for a gradient [E, R, L] as `reference.grouped.as_stored` shapes it, and its strides by E, R and L."""
    if experts_last:
        return like.new_empty((length, rank * experts)), (1, experts, rank * experts)
    return like.new_empty((experts * rank, length)), (rank * length, length, 1)


class GroupedProductsWithPasses(TritonPasses):
    """Products with the weights as torch's, the adapters' terms added to them in place."""

    def project(self, x, weights: ExpertWeights, factors: Factors) -> tuple[Tensor, Tensor | None]:
        return self._product(x, weights.weight.transpose(1, 2), factors, weights.bias)

    def project_back(self, dy, weights: ExpertWeights, factors: Factors) -> tuple[Tensor, Tensor | None]:
        return self._product(dy, weights.weight, Factors(factors.b, factors.a))

    def _product(
        self, x, matrices: Tensor, factors: Factors, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(y [S, N], t) of x and matrices [E, K, N], where t is x times the first factor, and y has it times the
        second."""
        rows, t, by_token = self.rows, None, isinstance(x, ByToken)
        if factors.a is not None:
            t, gathered = self._shrink(x, factors.a, by_token)
            x = gathered if by_token else x
        elif by_token:
            x = x.x[rows.token()]
        y = grouped_mm.product(x, matrices, rows.ends)
        if t is not None or bias is not None:
            grouped_add(y, rows.tiles, self.tile.m, t, factors.b, bias)
        return y, t


class TritonProducts(TritonPasses):
    """Products, adapters' terms and biases in one launch each."""

    def project(self, x, weights: ExpertWeights, factors: Factors) -> tuple[Tensor, Tensor | None]:
        return self._linear(x, weights.weight, factors if factors.a is not None else None, weights.bias)

    def project_back(self, dy, weights: ExpertWeights, factors: Factors) -> tuple[Tensor, Tensor | None]:
        a, b = factors
        return self._linear(dy, weights.weight.transpose(1, 2), None if a is None else (b, a))

    def _linear(self, x, w: Tensor, adapter=None, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        rows = self.rows
        return grouped_linear(*self._source(x), rows.tiles, self.tile, w, adapter, bias, rows.per_token)
