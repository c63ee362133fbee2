"""Products over rows that are sorted by expert, in Triton: every GPU, no wait for it, no gathered copy of x.

`grouped_linear` has base product, adapter and bias in one launch, `combine_rows` routing weight and sum in another,
`grouped_outer` a factor's gradient as the parameter is stored. A training forward of one layer is eight or nine
launches, a backward eight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...specs import AnyGate, ExpertWeights, Gate
from ..grouped_mm import GroupedProducts
from ..reference.grouped import NO_FACTORS, Factors, Products, Rows
from . import route
from .combine_rows import combine_rows
from .expert_gate import expert_gate, expert_gate_backward
from .factor_layout import lay_out
from .grouped_linear import Tile, choose_tile, grouped_linear
from .grouped_outer import grouped_outer


class ByToken(NamedTuple):
    """x [T, K], to be read by row."""

    x: Tensor


def sort_rows(index: Tensor, weight: Tensor, leaves_out: bool) -> Rows:
    """The rows of `index` [T, k], the expert that each token chose, for products that begin with this weight."""
    return route.sort_rows(index, weight.shape[0], choose_tile(weight, index.numel()).m, leaves_out)


class TritonPasses(Products):
    """The passes over the rows that multiply no matrices."""

    def gate(self, z: Tensor, gate: AnyGate) -> Tensor:
        return expert_gate(z, gate) if isinstance(gate, Gate) else super().gate(z, gate)

    def gate_back(self, z: Tensor, dh: Tensor, routing: Tensor, gate: AnyGate) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(gate, Gate):
            return expert_gate_backward(z, dh, routing, self.rows.order, self.rows.ends, gate)
        return super().gate_back(z, dh, routing, gate)

    def combine(self, y: Tensor, routing: Tensor | None = None) -> Tensor:
        rows = self.rows
        dtype = y.dtype if routing is None else torch.promote_types(y.dtype, routing.dtype)
        return combine_rows(y, routing, rows.place, rows.ends, rows.tokens, dtype)


class GroupedProductsWithPasses(TritonPasses, GroupedProducts):
    """torch's grouped products, and everything between them in Triton."""


class TritonProducts(TritonPasses):
    """Products that begin with a weight, by which their tile is chosen."""

    def __init__(self, rows: Rows, weight: Tensor):
        self.rows = rows
        self.tile: Tile = choose_tile(weight, rows.order.numel())

    def take(self, x: Tensor) -> ByToken:
        return ByToken(x)

    def lay_out(self, weights: ExpertWeights) -> Factors:
        if weights.lora_a is None:
            return NO_FACTORS
        a, b = weights.lora_a, weights.lora_b.transpose(1, 2)
        return Factors(*lay_out(a, b, weights.weight.dtype, weights.scaling))

    def project(self, x, weights: ExpertWeights, factors: Factors) -> tuple[Tensor, Tensor | None]:
        return self._linear(x, weights.weight, factors if factors.a is not None else None, weights.bias)

    def project_back(self, dy, weights: ExpertWeights, factors: Factors) -> tuple[Tensor, Tensor | None]:
        a, b = factors
        return self._linear(dy, weights.weight.transpose(1, 2), None if a is None else (b, a))

    def shrink_back(self, dy, weights: ExpertWeights, factors: Factors) -> Tensor | None:
        return None if factors.b is None else self._linear(dy, factors.b)[0]

    def gradient(
        self, factor: Tensor, short: Tensor, long, scaling: float = 1.0, routing: Tensor | None = None
    ) -> Tensor:
        return self._outer(torch.empty_like(factor), short, long, scaling, routing)

    def sums(self, y, bias: Tensor, routing: Tensor | None = None) -> Tensor:
        return self._outer(torch.empty_like(bias).unsqueeze(1), None, y, 1.0, routing)[:, 0]

    def _linear(self, x, w: Tensor, adapter=None, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        rows = self.rows
        x, order = (x.x, rows.order) if isinstance(x, ByToken) else (x, None)
        return grouped_linear(x, order, rows.tiles, self.tile, w, adapter, bias, rows.per_token)

    def _outer(self, out: Tensor, short: Tensor | None, long, scaling: float, routing: Tensor | None) -> Tensor:
        rows, by_token = self.rows, isinstance(long, ByToken)
        return grouped_outer(
            short,
            long.x if by_token else long,
            rows.order,
            rows.ends,
            out,
            scaling=scaling,
            routing=routing,
            per_token=rows.per_token if by_token else 0,
        )
