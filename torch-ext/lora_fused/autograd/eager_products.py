"""Batches of projections from the operations of a backend, one after another.

A batch is what `members.batches_of` makes: members whose A's stand below each other in one product
of x, one member with dropout, or one without an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..backends import reference
from .members import Gradients, Member, Outputs, cat, split


def _shrink(ops: ModuleType, x: Tensor, batch: Sequence[Member], dtype: torch.dtype | None) -> Tensor:
    """t of a batch, [M, Σ R]."""
    lora_a = cat([member.operands.lora_a for member in batch], 0)
    scalings = [member.split_scaling(x.dtype, dtype)[0] for member in batch]
    if len(set(scalings)) == 1:
        return ops.shrink(x, lora_a, scalings[0], dtype, batch[0].mask)
    t = reference.writable(ops.shrink(x, lora_a, 1.0, dtype))
    for scaling, part in zip(scalings, split(t, batch)):
        part.mul_(scaling)
    return t


def _project_member(
    ops: ModuleType,
    x: Tensor,
    member: Member,
    t: Tensor | None,
    mag_norm_scale: Tensor | None,
    dtype: torch.dtype | None,
):
    """(y, z) of one member."""
    lora_b, weight, bias = member.operands.lora_b, member.weight(x.dtype), member.bias(x.dtype)
    if t is None:
        return ops.linear_expand(x, weight, bias=bias), None
    _, scaling = member.split_scaling(x.dtype, dtype)
    if mag_norm_scale is None:
        return ops.linear_expand(x, weight, t, lora_b, bias, scaling=scaling), None
    if member.mask is None:
        return ops.linear_expand_scaled(x, weight, t, lora_b, mag_norm_scale, bias, scaling)
    return ops.linear_expand_dropped(x, ops.dropout(x, member.mask), weight, t, lora_b, mag_norm_scale, bias, scaling)


def project(ops: ModuleType, x: Tensor, batch: Sequence[Member], mag_norm_scales, dtype: torch.dtype | None) -> Outputs:
    """Outputs of a batch for x [M, K]; mag_norm_scales are [N] or None by member, `dtype` as `ops.shrink` takes it."""
    t = _shrink(ops, x, batch, dtype) if batch[0].operands.lora_a is not None else None
    parts = (None,) * len(batch) if t is None else split(t, batch)
    results = [_project_member(ops, x, *each, dtype) for each in zip(batch, parts, mag_norm_scales)]
    return Outputs([y for y, _ in results], [z for _, z in results], t)


class Backward:
    """The backward of one batch: dt by member, dx in one sum, dA of all members in one product."""

    def __init__(self, ops: ModuleType, x: Tensor, batch: Sequence[Member], dtype: torch.dtype | None):
        self.ops, self.x, self.batch, self.dtype = ops, x, batch, dtype

    def run(
        self, t: Tensor | None, dys, lora_dys, mag_norm_scales, dx: Tensor | None, need_dx: bool, needs
    ) -> Gradients:
        """Gradients for t and the dys of `project`, `lora_dys` after DoRA's mag_norm_scale; dx is added to, in
        place."""
        ops, batch = self.ops, self.batch
        adapted = t is not None
        dt = None
        if adapted and (need_dx or any(need.lora_a for need in needs)):
            ts = [
                ops.shrink(dy, member.operands.lora_b.t(), member.scaling, self.dtype)
                for member, dy in zip(batch, lora_dys)
            ]
            dt = cat(ts, 1)
        if need_dx:
            for i, member in enumerate(batch):
                last = dt if i == len(batch) - 1 else None  # the sum of all dt A rides in the last product
                dx = self._input_grad(member, dys[i], lora_dys[i], mag_norm_scales[i], last, dx)
        das: list[Tensor | None] = [None] * len(batch)
        dbs: list[Tensor | None] = [None] * len(batch)
        if dt is not None and any(need.lora_a for need in needs):
            da = ops.outer(dt, self.x, batch[0].operands.lora_a.dtype, batch[0].mask)
            das = [part if need.lora_a else None for part, need in zip(split(da, batch, 0), needs)]
        if adapted:
            dbs = [
                self._up_grad(member, dy, part) if need.lora_b else None
                for dy, part, member, need in zip(lora_dys, split(t, batch), batch, needs)
            ]
        return Gradients(dx, das, dbs)

    def _up_grad(self, member: Member, dy: Tensor, t: Tensor) -> Tensor:
        _, scaling = member.split_scaling(self.x.dtype, self.dtype)
        return self.ops.outer(dy, t, member.operands.lora_b.dtype, scaling=scaling)

    def _input_grad(self, member: Member, dy, lora_dy, mag_norm_scale, dt, dx) -> Tensor:
        ops, weight = self.ops, member.weight_of_backward(dy.dtype).t()
        up = None if dt is None else cat([each.operands.lora_a for each in self.batch], 0).t()
        if member.mask is None or mag_norm_scale is None:
            return ops.linear_expand(lora_dy, weight, dt, up, mask=member.mask, out=dx)
        dx = ops.linear_expand(dy, weight, out=dx)
        dropped = ops.linear_expand(ops.scale(dy, mag_norm_scale - 1), weight, dt, up)
        return dx.add_(ops.dropout(dropped, member.mask))
