"""One autograd Function for a group of LoRA projections that share their input.

Forward, per projection i:   tᵢ = sᵢ·x Aᵢᵀ      yᵢ = x Wᵢᵀ + bᵢ + tᵢ Bᵢᵀ
Backward:                    dtᵢ = sᵢ·dyᵢ Bᵢ    dBᵢ = dyᵢᵀ tᵢ    dAᵢ = dtᵢᵀ x    dbᵢ = Σ dyᵢ
                             dx = Σᵢ dyᵢ Wᵢ + dtᵢ Aᵢ

Saved for backward: x once for the group, tᵢ [M, R], and the operands themselves. Nothing of
size N×K beyond the weights (dW only where a base weight is trainable), nothing of size M×N.
(LoRA: Hu et al. 2021, arXiv:2106.09685, equation 3.)
"""

from __future__ import annotations

import contextlib
from typing import Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backend as backends
from .. import reference
from ..projection import GroupSpec, flatten, unflatten


class LoraLinearFunction(torch.autograd.Function):
    """Apply as `(group, scalings, lora_dtype, x, *flatten(projections))`, x [M, K] in the dtype of
    the base product; gives one [M, N] tensor per member. Double backward raises."""

    @staticmethod
    def forward(ctx, group: GroupSpec, scalings, lora_dtype, x: Tensor, *flat):
        backend = backends.get(group.backend)
        projections = unflatten(flat)
        outputs, downs = [], []
        with _without_autocast(x):
            for scaling, p in zip(scalings, projections):
                t = backend.down(x, p.lora_a, scaling, lora_dtype)
                bias = None if p.bias is None else p.bias.to(x.dtype)
                outputs.append(backend.up_add(x, p.weight.to(x.dtype), t, p.lora_b, bias))
                downs.append(t)
        ctx.group, ctx.scalings, ctx.lora_dtype = group, scalings, lora_dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *downs, *flat)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Optional[Tensor]):
        backend = backends.get(ctx.group.backend)
        members = ctx.group.members
        x, *rest = ctx.saved_tensors
        downs, projections = rest[:members], unflatten(rest[members:])
        needs_x, *needs_flat = ctx.needs_input_grad[3:]
        dx, grads = None, []
        with _without_autocast(x):
            for dy, t, scaling, p, needs in zip(dys, downs, ctx.scalings, projections, unflatten(needs_flat)):
                if dy is None:
                    grads.append(type(p)(None, None, None, None))
                    continue
                dy = dy.contiguous()
                dt = None
                if needs_x or needs.lora_a:
                    dt = backend.down(dy, p.lora_b.t(), scaling, ctx.lora_dtype)
                if needs_x:
                    part = backend.up_add(dy, p.weight.to(dy.dtype).t(), dt, p.lora_a.t())
                    dx = part if dx is None else dx.add_(part)
                grads.append(
                    type(p)(
                        weight=reference.outer(dy, x, p.weight.dtype) if needs.weight else None,
                        bias=_bias_grad(dy, p.bias) if needs.bias else None,
                        lora_a=reference.outer(dt, x, p.lora_a.dtype) if needs.lora_a else None,
                        lora_b=reference.outer(dy, t, p.lora_b.dtype) if needs.lora_b else None,
                    )
                )
        return None, None, None, dx, *flatten(grads)


def _without_autocast(x: Tensor):
    """Dtypes are settled by the caller; entering the context costs host time, so only where it acts."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def _bias_grad(dy: Tensor, bias: Tensor) -> Tensor:
    """db = Σ dy over tokens, accumulated in at least float32."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    return dy.sum(0, dtype=wide).to(bias.dtype)
