"""One autograd Function for an experts module with LoRA, over rows that are sorted by expert.

x_g [S, H] are the tokens of the rows, w [S, 1] their routing weights, s·B rounded to the products' dtype once:

    t1 = x_g A1ᵀ    z = x_g W1ᵀ + t1 (s1·B1)ᵀ + b1    h = gate(z)
    t2 = h A2ᵀ      y = h W2ᵀ + t2 (s2·B2)ᵀ + b2      out = Σ_k w·y

    dh' = dout_g W2 + dt2 A2    dt2 = dout_g (s2·B2)    dw = <dh', h> + <dout_g, b2>
    dA2 = (w·dt2)ᵀ h    dB2 = s2·dout_gᵀ (w·t2)    dz = gate'(w·dh')
    dt1 = dz (s1·B1)    dx_g = dz W1 + dt1 A1    dA1 = dt1ᵀ x_g    dB1 = s1·dzᵀ t1

The routing weight enters after the products, so that dw needs no y. Base weights get no gradient. Saved for backward:
x [T, H] in the products' dtype, z [S, 2I], t1 and t2 [S, R], where the rows are [S], the operands, and the factors as
a backend lays them out; neither x_g, h nor y. No weight is made of A and B, and no gradient of a weight. (Hu et al.
2021, arXiv:2106.09685, equation 3.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import select
from ..backends.reference.grouped import Factors, Products, Rows
from ..call_context import new_tuple, without_autocast
from ..specs import TENSORS_PER_PRODUCT, ExpertsSpec, ExpertWeights
from .once_differentiable import once_differentiable


class Kept(NamedTuple):
    """What a backward needs besides the operands."""

    x: Tensor
    z: Tensor
    t1: Tensor | None
    t2: Tensor | None
    up: Factors
    down: Factors


def forward_experts(
    spec: ExpertsSpec, products: Products, x: Tensor, routing: Tensor, up: ExpertWeights, down: ExpertWeights
) -> tuple[Tensor, Kept]:
    """out [T, H'] in x's dtype, and what is kept."""
    narrow, factors = x.to(up.weight.dtype), products.lay_out(up, down)
    z, t1 = products.project(products.take(narrow), up, factors[0])
    y, t2 = products.project(products.gate(z, spec.gate), down, factors[1])
    return products.combine(y, routing).to(x.dtype), new_tuple(Kept, (narrow, z, t1, t2, *factors))


class LoraExpertsFunction(torch.autograd.Function):
    """Apply as `(spec, index, x, routing, *up[:4], *down[:4])`; gives [T, H'] in x's dtype. Double backward raises.
    Autocast is off inside."""

    @staticmethod
    def forward(ctx, spec: ExpertsSpec, index: Tensor, x: Tensor, routing: Tensor, *tensors: Tensor | None):
        up, down = _weights(tensors, spec)
        with without_autocast(x):
            rows = select.sort_rows(index, up, down, spec.leaves_out)
            products = select.make_products(rows, up, trains=True)
            out, kept = forward_experts(spec, products, x, routing, up, down)
        ctx.spec, ctx.dtype, ctx.backend = spec, x.dtype, rows.backend
        where = rows.order, rows.ends, rows.place, rows.tiles
        ctx.save_for_backward(*where, index, routing, *kept[:4], *kept.up, *kept.down, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        order, ends, place, tiles, index, routing, *rest = ctx.saved_tensors
        kept = new_tuple(Kept, (*rest[:4], new_tuple(Factors, rest[4:6]), new_tuple(Factors, rest[6:8])))
        up, down = _weights(rest[8:], ctx.spec)
        rows = new_tuple(Rows, (order, ends, *routing.shape, ctx.spec.leaves_out, place, tiles, ctx.backend))
        with without_autocast(dout):
            products = select.make_products(rows, up, trains=True)
            step = _Backward(ctx.spec, products, (index, routing), kept, ctx.needs_input_grad)
            dz, drouting, of_down = step.second(dout.to(kept.x.dtype), down)
            dx, of_up = step.first(dz, up) if dz is not None else (None, (None,) * TENSORS_PER_PRODUCT)
        return None, None, None if dx is None else dx.to(ctx.dtype), drouting, *of_up, *of_down


def _weights(tensors, spec: ExpertsSpec) -> tuple[ExpertWeights, ExpertWeights]:
    first, second = spec.scalings
    return (
        new_tuple(ExpertWeights, (*tensors[:TENSORS_PER_PRODUCT], first)),
        new_tuple(ExpertWeights, (*tensors[TENSORS_PER_PRODUCT:], second)),
    )


class _Backward:
    """The two halves of a backward, from the output to the gate and from there to x."""

    def __init__(self, spec: ExpertsSpec, products: Products, choices: tuple[Tensor, Tensor], kept: Kept, needs):
        self.spec, self.products, self.kept = spec, products, kept
        self.index, self.routing = choices
        self.needs_x, self.needs_routing = needs[2:4]
        self.needs_up, self.needs_down = needs[4 : 4 + TENSORS_PER_PRODUCT], needs[4 + TENSORS_PER_PRODUCT :]

    def second(self, dout: Tensor, down: ExpertWeights):
        """(dz or None where nobody asks, drouting, gradients of `down`)."""
        products, routing, kept = self.products, self.routing, self.kept
        dy = products.take(dout)
        dh, dt = products.project_back(dy, down, kept.down)
        # Where <dout, b2> follows, they are rounded after it.
        dtype = routing.dtype if down.bias is None else torch.promote_types(dh.dtype, torch.float32)
        h, dz, dots = products.gate_back(kept.z, dh, routing, self.spec.gate, dtype)
        dbias = products.sums(dy, down.bias, routing) if self.needs_down[1] else None
        factors: tuple[Tensor | None, Tensor | None] = (None, None)
        if any(self.needs_down[2:]):
            factors = products.gradients(down, self.needs_down[2:], (dt, h), (kept.t2, dy), routing)
        drouting = self._routing_gradient(dout, dots, down) if self.needs_routing else None
        return dz if self.needs_x or any(self.needs_up) else None, drouting, (None, dbias, *factors)

    def _routing_gradient(self, dout: Tensor, dots: Tensor, down: ExpertWeights) -> Tensor:
        """<dout, y> of every choice: <dh', h>, which is <dout, h W2ᵀ + t2 (s2·B2)ᵀ>, and <dout, b2>."""
        if down.bias is not None:
            dots = dots + self._bias_dots(dout, down.bias, dots.dtype)
        return dots.to(self.routing.dtype)

    def _bias_dots(self, dout: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, k]: <dout, b2> of every choice, zero where that is of no expert."""
        wide = dout.is_cuda and dout.dtype in (torch.bfloat16, torch.float16)
        left, right = (dout, bias.t()) if wide else (dout.to(dtype), bias.to(dtype).t())
        by_expert = torch.mm(left, right, out_dtype=dtype) if wide else left @ right
        if not (self.spec.leaves_out or self.index.is_cpu):
            return by_expert.gather(1, self.index.long())
        inside = self.index < len(bias)
        return by_expert.gather(1, torch.where(inside, self.index, 0).long()).masked_fill_(~inside, 0.0)

    def first(self, dz: Tensor, up: ExpertWeights):
        """(dx or None, gradients of `up`)."""
        products, kept, needs, dx, dt = self.products, self.kept, self.needs_up, None, None
        if self.needs_x:
            dx, dt = products.project_back(dz, up, kept.up)
        elif needs[2]:
            dt = products.shrink_back(dz, up, kept.up)
        dbias = products.sums(dz, up.bias) if needs[1] else None
        factors: tuple[Tensor | None, Tensor | None] = (None, None)
        if any(needs[2:]):
            factors = products.gradients(up, needs[2:], (dt, products.take(kept.x)), (kept.t1, dz))
        return None if dx is None else products.combine(dx), (None, dbias, *factors)
