"""The delta of one LoRA or DoRA projection, added to a base product that the base module made itself.

    LoRA    y = base + t Bᵀ + s·b_B                   t = s·dropout(x) Aᵀ
    DoRA    y = g∘z + b      z = base - b + t Bᵀ      g = m / norm, without dropout

Backward, with dy' = g∘dy (dy for LoRA):

    dbase = dy'    dt = s·dy' B    dB = dy'ᵀ t    dA = dtᵀ dropout(x)    dx = D(dt A)
    db_B = s·Σ dy    dm = Σ dy∘z / norm

Saved for backward: x, t [M, R], for DoRA z [M, N] and the norm [N], the mask's seed, the operands. (Hu et
al. 2021, arXiv:2106.09685, equation 3; Liu et al. 2024, arXiv:2402.09353, equations 5 and 11.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import native, reference
from ..call_context import without_autocast
from ..specs import Mask, split_scaling
from .once_differentiable import once_differentiable


class DeltaSpec(NamedTuple):
    """What is fixed about a delta: scaling, dropout probability, dtype of its products, dtype of y."""

    scaling: float
    dropout: float
    dtype: torch.dtype
    out_dtype: torch.dtype

    def mask(self, seed: Tensor | None) -> Mask | None:
        return None if seed is None else Mask(seed, self.dropout)


def _sum(spec: DeltaSpec, base: Tensor, t: Tensor, lora_b: Tensor, lora_bias: Tensor | None, wide: bool) -> Tensor:
    """base + s·d Aᵀ Bᵀ + s·b_B in a tensor of its own, in float32 where `wide`."""
    lora_b, (_, scaling) = lora_b.to(spec.dtype), split_scaling(spec.scaling, spec.dtype)
    if wide:
        base = base.float()
    if base.dtype == spec.dtype == spec.out_dtype:
        y = torch.addmm(base, t, lora_b.t(), alpha=scaling)
    else:
        y = torch.add(base, t @ lora_b.t(), alpha=scaling)
        y = y if wide else y.to(spec.out_dtype)
    if lora_bias is None:
        return y
    return reference.writable(y).add_((lora_bias.float() if wide else lora_bias) * spec.scaling)


class DeltaFunction(torch.autograd.Function):
    """Apply as `(spec, base, x, seed, bias, lora_a, lora_b, lora_bias, magnitude, norm)` with base [..., N]
    and x [..., K]; gives [..., N]. bias and norm are DoRA's alone and get no gradient. Double backward
    raises."""

    @staticmethod
    def forward(ctx, spec: DeltaSpec, base, x, seed, bias, lora_a, lora_b, lora_bias, magnitude, norm):
        rows = x.reshape(-1, x.shape[-1])
        with without_autocast(x):
            t = reference.shrink(rows, lora_a, split_scaling(spec.scaling, spec.dtype)[0], spec.dtype, spec.mask(seed))
            # A sum that float16 may not have the range for where it has it for y.
            wide = spec.out_dtype == torch.float16 and (magnitude is not None or lora_bias is not None)
            y, z = _sum(spec, base.reshape(-1, base.shape[-1]), t, lora_b, lora_bias, wide), None
            if magnitude is not None:
                y, z = reference.rescale(y, native.mag_norm_scale(magnitude, norm), bias)
            y = y.to(spec.out_dtype)
        ctx.spec, ctx.shape, ctx.dtypes = spec, x.shape, (base.dtype, x.dtype)
        kept = rows if ctx.needs_input_grad[5] else None  # dA alone reads it
        ctx.save_for_backward(kept, t, z, seed, lora_a, lora_b, lora_bias, magnitude, norm)
        return y.view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        rows, t, z, seed, lora_a, lora_b, lora_bias, magnitude, norm = ctx.saved_tensors
        spec, needs, shape = ctx.spec, ctx.needs_input_grad, dy.shape
        base_dtype, x_dtype = ctx.dtypes
        dm = dt = None
        with without_autocast(dy):
            dy = dy.reshape(-1, shape[-1])
            db_lora = (reference.token_sum(dy) * spec.scaling).to(lora_bias.dtype) if needs[7] else None
            if magnitude is not None:
                dy, dm = reference.scale_sum(dy, z, native.mag_norm_scale(magnitude, norm))
                dm = dm.div_(norm).to(magnitude.dtype)
            wide = dy.to(spec.dtype)
            if needs[2] or needs[5]:
                dt = reference.shrink(wide, lora_b.t(), spec.scaling, spec.dtype)
            dx = da = None
            if needs[2]:
                dx = dt @ lora_a.to(spec.dtype)
                dx = dx.to(x_dtype) if seed is None else reference.dropout(dx, spec.mask(seed), x_dtype)
            if needs[5]:
                da = reference.outer(dt, rows, lora_a.dtype, spec.mask(seed))
            up = split_scaling(spec.scaling, spec.dtype)[1]
            db = reference.outer(wide, t, lora_b.dtype, scaling=up) if needs[6] else None
        dbase = dy.to(base_dtype).view(shape) if needs[1] else None
        return None, dbase, None if dx is None else dx.view(ctx.shape), None, None, da, db, db_lora, dm, None
