"""Plain LoRA on frozen bases, the common case, with as little Python as there can be: one native op a
direction for a whole group, or a whole gated MLP.

Formulas and what is saved are those of `autograd.linear` and `autograd.gated`; the ops are described
in kernel-src/common/lora_group.cpp. Tensors come by field: weights, biases, A's, B's.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..library import spread


class PlainGroupFunction(torch.autograd.Function):
    """Apply as `(scalings, dropouts, token, x, seeds, *by_field(projections))`; gives a tuple of [..., N],
    one per projection. Double backward raises. `token` is kept as `LoraLinearFunction` keeps it."""

    @staticmethod
    def forward(ctx, scalings, dropouts, token, x: Tensor, seeds: Optional[Tensor], *flat):
        count = len(scalings)
        weights, biases, lora_a, lora_b = (flat[i * count : (i + 1) * count] for i in range(4))
        ys, t = ops.lora_forward(x, weights, biases, lora_a, lora_b, scalings, seeds, dropouts)
        ctx.scalings, ctx.dropouts, ctx.token = scalings, dropouts, token
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, seeds, t, *weights, *lora_a, *lora_b)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Optional[Tensor]):
        x, seeds, t, *rest = ctx.saved_tensors
        count, needs = len(dys), ctx.needs_input_grad
        weights, lora_a, lora_b = rest[:count], rest[count : 2 * count], rest[2 * count :]
        needs_a = [need and dy is not None for need, dy in zip(needs[5 + 2 * count :], dys)]
        needs_b = [need and dy is not None for need, dy in zip(needs[5 + 3 * count :], dys)]
        need_dx = needs[3] and any(dy is not None for dy in dys)
        dx, das, dbs = ops.lora_backward(
            dys, x, t, weights, lora_a, lora_b, ctx.scalings, seeds, ctx.dropouts, None, need_dx, needs_a, needs_b
        )
        ctx.token = None
        frozen = (None,) * (2 * count)
        return None, None, None, dx[0] if dx else None, None, *frozen, *spread(das, needs_a), *spread(dbs, needs_b)


class PlainGatedFunction(torch.autograd.Function):
    """Apply as `(scalings, dropouts, activation, gate_half, x, seeds, *by_field(projections))` with down
    as the last projection and the activation as its index; gives [..., N]. Double backward raises."""

    @staticmethod
    def forward(ctx, scalings, dropouts, activation: int, gate_half: int, x: Tensor, seeds, *flat):
        count = len(scalings)
        weights, biases, lora_a, lora_b = (flat[i * count : (i + 1) * count] for i in range(4))
        y, outputs, ts = ops.gated_forward(
            x, weights, biases, lora_a, lora_b, scalings, seeds, dropouts, activation, gate_half
        )
        ctx.scalings, ctx.dropouts, ctx.options = scalings, dropouts, (activation, gate_half)
        ctx.save_for_backward(x, seeds, *ts, *outputs, *weights, *lora_a, *lora_b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, seeds, *rest = ctx.saved_tensors
        count, needs = len(ctx.scalings), ctx.needs_input_grad
        ts, outputs, operands = rest[:2], rest[2 : 1 + count], rest[1 + count :]
        weights, lora_a, lora_b = operands[:count], operands[count : 2 * count], operands[2 * count :]
        needs_a, needs_b = needs[6 + 2 * count : 6 + 3 * count], needs[6 + 3 * count :]
        dx, das, dbs = ops.gated_backward(
            dy, x, outputs, ts, weights, lora_a, lora_b, ctx.scalings, seeds, ctx.dropouts, *ctx.options,
            needs[4], needs_a, needs_b,
        )  # fmt: skip
        frozen = (None,) * (2 * count)
        return *(None,) * 4, dx[0] if dx else None, None, *frozen, *spread(das, needs_a), *spread(dbs, needs_b)
