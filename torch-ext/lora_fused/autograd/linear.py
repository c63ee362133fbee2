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
    """Apply as `(group, scalings, lora_dtype, x, *flatten(projections))`, x [..., K] in the dtype of
    the base product; gives a tuple of [..., N], one per member. Double backward raises.

    Tokens are flattened in here: views around the Function would be two more nodes of the graph.
    """

    @staticmethod
    def forward(ctx, group: GroupSpec, scalings, lora_dtype, x: Tensor, *flat):
        backend = backends.get(group.backend)
        projections = unflatten(flat)
        outputs, downs = [], []
        rows = x.reshape(-1, x.shape[-1])
        with _without_autocast(x):
            for scaling, p in zip(scalings, projections):
                t = backend.down(rows, p.lora_a, scaling, lora_dtype)
                bias = None if p.bias is None else p.bias.to(x.dtype)
                y = backend.up_add(rows, p.weight.to(x.dtype), t, p.lora_b, bias)
                # Not a view, so that the caller may change y in place.
                outputs.append(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])))
                downs.append(t)
        ctx.group, ctx.scalings, ctx.lora_dtype, ctx.shape = group, scalings, lora_dtype, x.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, *downs, *flat)
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
                dy = dy.reshape(-1, dy.shape[-1]).contiguous()
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
        return None, None, None, None if dx is None else dx.view(ctx.shape), *flatten(grads)


def _without_autocast(x: Tensor):
    """Dtypes are settled by the caller; entering the context costs host time, so only where it acts."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def _bias_grad(dy: Tensor, bias: Tensor) -> Tensor:
    """db = Σ dy over tokens, accumulated in at least float32."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    return dy.sum(0, dtype=wide).to(bias.dtype)
