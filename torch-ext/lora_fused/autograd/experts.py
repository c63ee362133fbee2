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
from ..specs import ExpertsSpec, ExpertWeights, StoredFactors, with_factors
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
    narrow, factors = _in_dtype(x, up.weight.dtype), products.lay_out(up, down)
    z, t1 = products.project(products.take(narrow), up, factors[0])
    y, t2 = products.project(products.gate(z, spec.gate), down, factors[1])
    return _in_dtype(products.combine(y, routing), x.dtype), new_tuple(Kept, (narrow, z, t1, t2, *factors))


def _in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which costs as much as an operation where there is nothing to do."""
    return x if x.dtype is dtype else x.to(dtype)


class LoraExpertsFunction(torch.autograd.Function):
    """Apply as `(spec, up, down, index, x, routing, *trained, *trained)` with what gets gradients of `up` and of
    `down`: bias, and both factors as they are or as `StoredFactors` has them, where they are not in `up` and `down`.
    Gives [T, H'] in x's dtype. Double backward raises. Autocast is off inside."""

    @staticmethod
    def forward(
        ctx,
        spec: ExpertsSpec,
        up: ExpertWeights,
        down: ExpertWeights,
        index: Tensor,
        x: Tensor,
        routing: Tensor,
        *trained: Tensor | None,
    ):
        up, down = _complete(up, trained[1:3], spec.crossed[0]), _complete(down, trained[4:], spec.crossed[1])
        with without_autocast(x):
            rows = select.sort_rows(index, up, down, spec.leaves_out)
            products = select.make_products(rows, trains=True)
            out, kept = forward_experts(spec, products, x, routing, up, down)
        order, ends, *_, place, tiles, backend, tile = rows
        ctx.spec, ctx.dtype, ctx.chosen, ctx.scalings = spec, x.dtype, (backend, tile), (up.scaling, down.scaling)
        where = order, ends, place, tiles, index, routing
        ctx.save_for_backward(*where, *kept[:4], *kept.up, *kept.down, *up[:4], *down[:4])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        order, ends, place, tiles, index, routing, x, z, t1, t2, a1, b1, a2, b2, *tensors = ctx.saved_tensors
        kept = new_tuple(Kept, (x, z, t1, t2, new_tuple(Factors, (a1, b1)), new_tuple(Factors, (a2, b2))))
        spec, needs, (first, second) = ctx.spec, ctx.needs_input_grad, ctx.scalings
        up = new_tuple(ExpertWeights, (*tensors[:4], first))
        down = new_tuple(ExpertWeights, (*tensors[4:], second))
        rows = new_tuple(Rows, (order, ends, *routing.shape, spec.leaves_out, place, tiles, *ctx.chosen))
        with without_autocast(dout):
            products = select.make_products(rows, trains=True)
            step = _Backward(spec, products, (index, routing), kept, needs)
            dz, drouting, of_down = step.second(_in_dtype(dout, x.dtype), down)
            dx, of_up = step.first(dz, up) if dz is not None else (None, _NO_GRADIENTS)
        return None, None, None, None, None if dx is None else _in_dtype(dx, ctx.dtype), drouting, *of_up, *of_down


_NO_GRADIENTS = None, None, None
_FactorGradients = tuple[Tensor | None, Tensor | None]  # of lora_a and lora_b, or of what they are stored in


def _complete(weights: ExpertWeights, factors, crossed: bool | None) -> ExpertWeights:
    return weights if crossed is None else with_factors(weights, new_tuple(StoredFactors, (*factors, crossed)))


def _of_views(needs: tuple[bool, bool, bool], crossed: bool | None) -> tuple[bool, bool, bool]:
    """Which gradients of bias, lora_a and lora_b are asked for."""
    bias, a, b = needs
    return (bias, b, a) if crossed else needs


def _ordered(of_views: _FactorGradients, crossed: bool | None) -> _FactorGradients:
    """The gradients of lora_a and lora_b in the order of what they are stored in."""
    da, db = of_views
    return (db, da) if crossed else of_views


class _Backward:
    """The two halves of a backward, from the output to the gate and from there to x."""

    def __init__(self, spec: ExpertsSpec, products: Products, choices: tuple[Tensor, Tensor], kept: Kept, needs):
        self.spec, self.products, self.kept = spec, products, kept
        self.index, self.routing = choices
        self.needs_x, self.needs_routing = needs[4:6]
        self.needs_up, self.needs_down = _of_views(needs[6:9], spec.crossed[0]), _of_views(needs[9:], spec.crossed[1])

    def second(self, dout: Tensor, down: ExpertWeights):
        """(dz or None where nobody asks, drouting, gradients of bias and factors)."""
        spec, products, routing, kept = self.spec, self.products, self.routing, self.kept
        dy = products.take(dout)
        dh, dt = products.project_back(dy, down, kept.down)
        # Where <dout, b2> follows, they are rounded after it.
        dtype = routing.dtype if down.bias is None else torch.promote_types(dh.dtype, torch.float32)
        h, dz, dots = products.gate_back(kept.z, dh, routing, spec.gate, dtype)
        dbias = products.sums(dy, down.bias, routing) if self.needs_down[0] else None
        factors: _FactorGradients = (None, None)
        if any(self.needs_down[1:]):
            crossed = spec.crossed[1]
            found = products.gradients(down, self.needs_down[1:], (dt, h), (kept.t2, dy), routing, crossed)
            factors = _ordered(found, crossed)
        drouting = self._routing_gradient(dout, dots, down) if self.needs_routing else None
        return dz if self.needs_x or any(self.needs_up) else None, drouting, (dbias, *factors)

    def _routing_gradient(self, dout: Tensor, dots: Tensor, down: ExpertWeights) -> Tensor:
        """<dout, y> of every choice: <dh', h>, which is <dout, h W2ᵀ + t2 (s2·B2)ᵀ>, and <dout, b2>."""
        if down.bias is not None:
            dots = dots + self._bias_dots(dout, down.bias, dots.dtype)
        return _in_dtype(dots, self.routing.dtype)

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
        """(dx or None, gradients of bias and factors)."""
        products, kept, needs, dx, dt = self.products, self.kept, self.needs_up, None, None
        if self.needs_x:
            dx, dt = products.project_back(dz, up, kept.up)
        elif needs[1]:
            dt = products.shrink_back(dz, up, kept.up)
        dbias = products.sums(dz, up.bias) if needs[0] else None
        factors: _FactorGradients = (None, None)
        if any(needs[1:]):
            of_a, crossed = (dt, products.take(kept.x)), self.spec.crossed[0]
            factors = _ordered(products.gradients(up, needs[1:], of_a, (kept.t1, dz), None, crossed), crossed)
        return None if dx is None else products.combine(dx), (dbias, *factors)
