"""One autograd Function for a gated MLP: y = down(f(gate(x))·up(x)), every projection LoRA, DoRA or plain.

Backward, from the two groups of `group_eager` and the gated activation:

    dh = down's dx    (dgate, dup) = dh · (u·f'(g), f(g))    dx = gate's and up's, in one sum

Saved for backward besides what the groups save: gate and up [M, I]. The activation and the product
h = f(gate)·up are computed again instead of kept, and so are gate and up where DoRA keeps the
values before the mag_norm_scale. (GLU variants: Shazeer 2020, arXiv:2002.05202.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import select
from ..call_context import without_autocast
from ..specs import GatedSpec, flatten, unflatten
from .group_eager import Saved, backward_group, forward_group, is_scaled, reads_x, scaled_output
from .members import Member, members_of
from .once_differentiable import once_differentiable
from .saved_input import left_out, stand_in


def _halves(spec: GatedSpec, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(gate, up) of the first group's outputs."""
    if len(outputs) == 2:
        return outputs[0], outputs[1]
    halves = outputs[0].chunk(2, dim=-1)
    return halves[spec.gate_half], halves[1 - spec.gate_half]


def forward_gated(spec: GatedSpec, x: Tensor, members: Sequence[Member], lead: Sequence[int]):
    """(y [*lead, N], outputs of the first group, what both groups keep) for x [M, K]."""
    outputs, first = forward_group(spec.inputs, x, members[:-1], x.shape[:1])
    gate, up = _halves(spec, outputs)
    h = select.pointwise(x).gated(gate, up, spec.activation)
    (y,), second = forward_group(spec.output, h, members[-1:], lead)
    return y, outputs, first, second


class GatedMLPFunction(torch.autograd.Function):
    """Apply as `(spec, scalings, x, seeds, *flatten(operands))` with the operands of gate and up, or of
    the one projection that holds both, and of down. Double backward raises."""

    @staticmethod
    def forward(ctx, spec: GatedSpec, scalings, x: Tensor, seeds: Tensor | None, *flat):
        rows = x.reshape(-1, x.shape[-1])
        with without_autocast(x):
            members = members_of(spec.members, scalings, seeds, flat)
            y, outputs, first, second = forward_gated(spec, rows, members, x.shape[:-1])
        ctx.spec, ctx.scalings, ctx.shape = spec, scalings, x.shape
        ctx.inputs = len(outputs)
        own = [None if is_scaled(member) else output for member, output in zip(members, outputs)]
        kept = [*own, *first.flat(), *second.flat()]
        ctx.kept = len(kept), len(first.flat())
        is_read = reads_x(unflatten(ctx.needs_input_grad[4:])[:-1])
        ctx.save_for_backward(rows if is_read else left_out(ctx, rows), seeds, *kept, *flat)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        spec, inputs = ctx.spec, ctx.inputs
        rows, seeds, *rest = ctx.saved_tensors
        rows = stand_in(ctx) if rows is None else rows
        kept, flat = rest[: ctx.kept[0]], rest[ctx.kept[0] :]
        first = Saved.of(kept[inputs : inputs + ctx.kept[1]], inputs)
        second = Saved.of(kept[inputs + ctx.kept[1] :], 1)
        needs_x, _, *needs_flat = ctx.needs_input_grad[2:]
        needs = unflatten(needs_flat)
        with without_autocast(rows):
            members = members_of(spec.members, ctx.scalings, seeds, flat)
            outputs = [
                scaled_output(member, first.unscaled[i], first.mag_norm_scales[i], rows.dtype)
                if is_scaled(member)
                else kept[i]
                for i, member in enumerate(members[:-1])
            ]
            gate, up = _halves(spec, outputs)
            ops = select.pointwise(rows)
            h = ops.gated(gate, up, spec.activation) if reads_x(needs[-1:]) else gate
            needs_inputs = needs_x or any(any(n) for n in needs[:-1])
            dh, last = backward_group(spec.output, h, members[-1:], second, [dy], needs_inputs, needs[-1:])
            dx, grads = None, [type(n)(None) for n in needs[:-1]]
            if needs_inputs:
                del h
                d_outputs = [torch.empty_like(output) for output in outputs]
                dgate, dup = _halves(spec, d_outputs)
                ops.gated_backward(dh, gate, up, spec.activation, False, dgate=dgate, dup=dup)
                dx, grads = backward_group(spec.inputs, rows, members[:-1], first, d_outputs, needs_x, needs[:-1])
        return None, None, None if dx is None else dx.view(ctx.shape), None, *flatten([*grads, *last])
