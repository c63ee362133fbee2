"""One autograd Function for an experts module with LoRA, over rows that are sorted by expert.

x_g [S, H] are the tokens of the rows, w [S, 1] their routing weights, s·B rounded to the products' dtype once:

    t1 = x_g A1ᵀ    z = x_g W1ᵀ + t1 (s1·B1)ᵀ + b1    h = gate(z)
    t2 = h A2ᵀ      y = h W2ᵀ + t2 (s2·B2)ᵀ + b2      out = Σ_k w·y

    dh' = dout_g W2 + dt2 A2    dt2 = dout_g (s2·B2)    dw = <dh', h> + <dout_g, b2>
    dA2 = (w·dt2)ᵀ h    dB2 = s2·dout_gᵀ (w·t2)    dz = gate'(w·dh')
    dt1 = dz (s1·B1)    dx_g = dz W1 + dt1 A1    dA1 = dt1ᵀ x_g    dB1 = s1·dzᵀ t1

The routing weight enters after the products, so that dw needs no y. Base weights get no gradient. Saved for backward:
x [T, H] in the products' dtype, z [S, 2I], t1 and t2 [S, R], the rows' order [S] and the operands; neither x_g, h nor
y. No weight is made of A and B, and no gradient of a weight. (Hu et al. 2021, arXiv:2106.09685, equation 3.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import select
from ..backends.reference.grouped import Products, Rows
from ..call_context import without_autocast
from ..specs import TENSORS_PER_PRODUCT, ExpertsSpec, ExpertWeights
from .once_differentiable import once_differentiable


class Kept(NamedTuple):
    """What a backward needs besides the operands."""

    x: Tensor
    z: Tensor
    t1: Tensor | None
    t2: Tensor | None


def forward_experts(
    spec: ExpertsSpec, products: Products, x: Tensor, routing: Tensor, up: ExpertWeights, down: ExpertWeights
) -> tuple[Tensor, Kept]:
    """out [T, H'] in x's dtype, and what is kept."""
    narrow = x.to(up.weight.dtype)
    z, t1 = products.project(products.take(narrow), up)
    y, t2 = products.project(products.gate(z, spec.gate), down)
    weights = routing.reshape(-1, 1)[products.rows.order]
    return products.combine(y, weights).to(x.dtype), Kept(narrow, z, t1, t2)


class LoraExpertsFunction(torch.autograd.Function):
    """Apply as `(spec, index, x, routing, *up[:4], *down[:4])`; gives [T, H'] in x's dtype. Double backward raises.
    Autocast is off inside."""

    @staticmethod
    def forward(ctx, spec: ExpertsSpec, index: Tensor, x: Tensor, routing: Tensor, *tensors: Tensor | None):
        up, down = _weights(tensors, spec)
        with without_autocast(x):
            rows = Rows.sort(index, up.weight.shape[0], spec.leaves_out)
            products = select.make_products(rows, up, down, trains=True)
            out, kept = forward_experts(spec, products, x, routing, up, down)
        ctx.spec, ctx.dtype = spec, x.dtype
        ctx.save_for_backward(rows.order, rows.ends, routing, *kept, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        order, ends, routing, x, z, t1, t2, *tensors = ctx.saved_tensors
        up, down = _weights(tensors, ctx.spec)
        tokens, per_token = routing.shape
        rows = Rows(order, ends, tokens, per_token, ctx.spec.leaves_out)
        with without_autocast(dout):
            products = select.make_products(rows, up, down, trains=True)
            step = _Backward(ctx.spec, products, routing, Kept(x, z, t1, t2), ctx.needs_input_grad)
            dz, drouting, of_down = step.second(dout.to(x.dtype), down)
            dx, of_up = step.first(dz, up) if dz is not None else (None, (None,) * TENSORS_PER_PRODUCT)
        return None, None, None if dx is None else dx.to(ctx.dtype), drouting, *of_up, *of_down


def _weights(tensors, spec: ExpertsSpec) -> tuple[ExpertWeights, ExpertWeights]:
    first, second = spec.scalings
    return (
        ExpertWeights(*tensors[:TENSORS_PER_PRODUCT])._replace(scaling=first),
        ExpertWeights(*tensors[TENSORS_PER_PRODUCT:])._replace(scaling=second),
    )


class _Backward:
    """The two halves of a backward, from the output to the gate and from there to x."""

    def __init__(self, spec: ExpertsSpec, products: Products, routing: Tensor, kept: Kept, needs):
        self.spec, self.products, self.routing, self.kept = spec, products, routing, kept
        self.needs_x, self.needs_routing = needs[2:4]
        self.needs_up, self.needs_down = needs[4 : 4 + TENSORS_PER_PRODUCT], needs[4 + TENSORS_PER_PRODUCT :]

    def second(self, dout: Tensor, down: ExpertWeights):
        """(dz or None where nobody asks, drouting, gradients of `down`)."""
        products, weights = self.products, self.routing.reshape(-1, 1)[self.products.rows.order]
        dy = products.take(dout)
        dh, dt = products.project_back(dy, down)
        h, dz, dots = products.gate_back(self.kept.z, dh, weights, self.spec.gate)
        grads: list[Tensor | None] = [None] * TENSORS_PER_PRODUCT
        if self.needs_down[1]:
            grads[1] = products.sums(_weighted(dout[products.rows.token()], weights)).to(down.bias.dtype)
        if self.needs_down[2]:
            grads[2] = _cut(products.outer(_weighted(dt, weights), h), down.lora_a)
        if self.needs_down[3]:
            grads[3] = _cut(products.outer(dy, _weighted(self.kept.t2, weights)), down.lora_b, down.scaling)
        drouting = self._routing_gradient(dout, dots, down) if self.needs_routing else None
        return dz if self.needs_x or any(self.needs_up) else None, drouting, grads

    def _routing_gradient(self, dout: Tensor, dots: Tensor, down: ExpertWeights) -> Tensor:
        """<dout, y> of every choice: <dh', h>, which is <dout, h W2ᵀ + t2 (s2·B2)ᵀ>, and <dout, b2>."""
        rows = self.products.rows
        if down.bias is not None:
            by_expert = dout.to(dots.dtype) @ down.bias.to(dots.dtype).t()
            dots = dots + by_expert[rows.token(), rows.expert()]
        return rows.by_choice(dots).to(self.routing.dtype)

    def first(self, dz: Tensor, up: ExpertWeights):
        """(dx or None, gradients of `up`)."""
        products, dx = self.products, None
        grads: list[Tensor | None] = [None] * TENSORS_PER_PRODUCT
        if self.needs_x:
            dx, dt = products.project_back(dz, up)
        elif self.needs_up[2]:
            dt = products.shrink_back(dz, up)
        if self.needs_up[1]:
            grads[1] = products.sums(dz).to(up.bias.dtype)
        if self.needs_up[2]:
            grads[2] = _cut(products.outer(dt, products.take(self.kept.x)), up.lora_a)
        if self.needs_up[3]:
            grads[3] = _cut(products.outer(dz, self.kept.t1), up.lora_b, up.scaling)
        return None if dx is None else products.combine(dx), grads


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).to(values.dtype)


def _cut(gradient: Tensor, factor: Tensor, scaling: float = 1.0) -> Tensor:
    """A factor's gradient without the rank's padding, in the factor's dtype."""
    gradient = gradient[:, : factor.shape[1], : factor.shape[2]].to(factor.dtype)
    return gradient if scaling == 1.0 else gradient * scaling
