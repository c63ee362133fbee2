"""Products over rows that are sorted by expert, in Triton: every GPU, no wait for it, no gathered copy of x.

`grouped_linear` has base product, adapter and bias in one launch, `combine_rows` routing weight and sum in another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...specs import AnyGate, ExpertWeights, Gate
from ..grouped_mm import GroupedProducts
from ..reference.grouped import Products, Rows
from .combine_rows import combine_rows
from .expert_gate import expert_gate, expert_gate_backward
from .grouped_linear import grouped_linear
from .grouped_outer import grouped_outer


class ByToken(NamedTuple):
    """x [T, K], to be read by row."""

    x: Tensor


class TritonPasses(Products):
    """The passes over the rows that multiply no matrices."""

    def gate(self, z: Tensor, gate: AnyGate) -> Tensor:
        return expert_gate(z, gate) if isinstance(gate, Gate) else super().gate(z, gate)

    def gate_back(self, z: Tensor, dh: Tensor, weights: Tensor, gate: AnyGate) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(gate, Gate):
            return expert_gate_backward(z, dh, weights, gate)
        return super().gate_back(z, dh, weights, gate)

    def combine(self, y: Tensor, weights: Tensor | None = None) -> Tensor:
        rows = self.rows
        place = torch.empty_like(rows.order)
        place[rows.order] = torch.arange(rows.order.numel(), device=y.device)
        by_choice = None if weights is None else weights.reshape(-1)[place]
        dtype = y.dtype if weights is None else torch.promote_types(y.dtype, weights.dtype)
        return combine_rows(y, by_choice, place, rows.ends, rows.per_token, dtype)


class GroupedProductsWithPasses(TritonPasses, GroupedProducts):
    """torch's grouped products, and everything between them in Triton."""


class TritonProducts(TritonPasses):
    """`few`: without a backward, of fewer rows than experts. Then factors are read as they are, strided, by the experts
    that are used; otherwise they are laid out once."""

    def __init__(self, rows: Rows, few: bool):
        self.rows, self.few = rows, few

    def take(self, x: Tensor) -> ByToken:
        return ByToken(x)

    def project(self, x, weights: ExpertWeights) -> tuple[Tensor, Tensor | None]:
        weight, t = weights.weight, None
        if weights.lora_a is None:
            return self._linear(x, weight, None, weights.bias), None
        t = self._linear(x, self._factor(weights.lora_a, weight.dtype))
        return self._linear(
            x, weight, (t, self._factor(weights.lora_b, weight.dtype), weights.scaling), weights.bias
        ), t

    def project_back(self, dy, weights: ExpertWeights) -> tuple[Tensor, Tensor | None]:
        dt, weight = self.shrink_back(dy, weights), weights.weight.transpose(1, 2)
        if dt is None:
            return self._linear(dy, weight), None
        a = self._factor(weights.lora_a, weight.dtype).transpose(1, 2)
        return self._linear(dy, weight, (dt, a, 1.0)), dt

    def shrink_back(self, dy, weights: ExpertWeights) -> Tensor | None:
        if weights.lora_a is None:
            return None
        b = self._factor(weights.lora_b, weights.weight.dtype).transpose(1, 2)
        return self._linear(dy, b, scaling=weights.scaling)

    def outer(self, x, y) -> Tensor:
        """[E, M, N]: x_eᵀ y_e of x [S, M] and y [S, N], either of which may be by token."""
        (x, x_order), (y, y_order) = self._source(x), self._source(y)
        return grouped_outer(x, y, self.rows.ends, x_order, y_order, self.rows.per_token)

    def sums(self, y: Tensor) -> Tensor:
        """[E, N]: the sum of each expert's rows of y [S, N]."""
        return self.outer(y.new_ones((y.shape[0], 1)), y)[:, 0]

    def _linear(self, x, w: Tensor, adapter=None, bias: Tensor | None = None, scaling: float = 1.0) -> Tensor:
        x, order = self._source(x)
        return grouped_linear(x, order, self.rows.ends, w, adapter, bias, self.rows.per_token, scaling)

    def _source(self, x) -> tuple[Tensor, Tensor | None]:
        return (x.x, self.rows.order) if isinstance(x, ByToken) else (x, None)

    def _factor(self, factor: Tensor, dtype: torch.dtype) -> Tensor:
        return factor if self.few else factor.to(dtype).contiguous()
