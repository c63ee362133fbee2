"""One autograd Function for a group of LoRA and DoRA projections that share their input.

Forward, per projection, with d = dropout(x), t = s·d Aᵀ, g = m / ‖W + s·B·A‖ (norm detached):

    LoRA              y = x Wᵀ + t Bᵀ + b + s·b_B
    DoRA              y = g∘z + b                               z = x Wᵀ + t Bᵀ
    DoRA, dropout     y = x Wᵀ + t Bᵀ + b + (g - 1)∘z           z = d Wᵀ + t Bᵀ

Backward, with dy' = g∘dy (dy for LoRA) and D the dropout of the forward, as a linear map:

    dt = s·dy' B    dB = dy'ᵀ t    dA = dtᵀ d    db = Σ dy    db_B = s·Σ dy    dm = Σ dy∘z / norm
    dx = Σ over projections of dy' W + D(dt A), or of dy W + D(((g - 1)∘dy) W + dt A)

Saved for backward: x once for the group, t [M, R], for DoRA z [M, N], the norm and the mag_norm_scale [N], the
seeds of the masks and the operands themselves. Masks are drawn again, nothing of size N×K is formed (dW only
where a base weight is trainable). Members without dropout share one product x [A₁; A₂; …]ᵀ, one
dtᵀ x and one dt A. (Hu et al. 2021, arXiv:2106.09685, equation 3; Liu et al. 2024,
arXiv:2402.09353, equations 5 and 11.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import quantization
from ..backends import select
from ..call_context import without_autocast
from ..specs import GroupSpec, Operands, flatten, unflatten
from . import eager_products, separate_backward
from .members import Member, batches_of, cat, members_of, split
from .once_differentiable import once_differentiable
from .saved_input import left_out, stand_in


class Saved(NamedTuple):
    """What forward keeps for backward: t of each batch; z, norm and mag_norm_scale of each member (DoRA)."""

    ts: list[Tensor | None]
    unscaled: list[Tensor | None]
    norms: list[Tensor | None]
    mag_norm_scales: list[Tensor | None]

    def flat(self) -> list[Tensor | None]:
        return [*self.ts, *self.unscaled, *self.norms, *self.mag_norm_scales]

    @classmethod
    def of(cls, flat: Sequence[Tensor | None], members: int) -> Saved:
        unscaled = len(flat) - 3 * members
        parts = [list(flat[unscaled + i * members : unscaled + (i + 1) * members]) for i in range(3)]
        return cls(list(flat[:unscaled]), *parts)


def is_scaled(member: Member) -> bool:
    """Whether the output is g∘z + b, so that it need not be kept beside z."""
    return member.operands.magnitude is not None and member.mask is None


def scaled_output(member: Member, z: Tensor, mag_norm_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """y = g∘z + b in `dtype` of a member that `is_scaled`."""
    return select.pointwise(z).scale(z, mag_norm_scale, member.bias(z.dtype)).to(dtype)


def _mag_norm_scales(members: Sequence[Member]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """(norms, mag_norm_scales), None for plain LoRA."""
    operands = [member.operands for member in members]
    weights = [p.weight.t() if member.transposed else p.weight for member, p in zip(members, operands)]
    scalings = [member.scaling for member in members]
    return quantization.dora_scales(weights, operands, [member.quantized for member in members], scalings)


def forward_group(
    group: GroupSpec, x: Tensor, members: Sequence[Member], lead: Sequence[int]
) -> tuple[list[Tensor], Saved]:
    """Outputs [*lead, N] of all members for x [M, K], and what backward needs of them."""
    saved = Saved([], [None] * len(members), *_mag_norm_scales(members))
    outputs: list[Tensor | None] = [None] * len(members)
    for indices in batches_of(members):
        mag_norm_scales = [saved.mag_norm_scales[i] for i in indices]
        batch = [members[i] for i in indices]
        ys, unscaled, t = eager_products.project(select.get(group.backend), x, batch, mag_norm_scales, group.lora_dtype)
        saved.ts.append(t)
        for i, y, z in zip(indices, ys, unscaled):
            outputs[i], saved.unscaled[i] = shaped(y, lead), z
    return outputs, saved


class _Backward:
    """The backward of one group: dx summed in one place, gradients of the operands by member."""

    def __init__(self, group: GroupSpec, x: Tensor, members: Sequence[Member], needs_x: bool, needs):
        self.group, self.x, self.members = group, x, members
        self.needs_x, self.needs = needs_x, needs
        self.dx: Tensor | None = None
        self.grads = [Operands(None)] * len(members)

    def batch(self, indices: Sequence[int], t: Tensor | None, dys, saved: Saved) -> None:
        """Adds the gradients of one batch whose dys are all there."""
        batch, needs = [self.members[i] for i in indices], [self.needs[i] for i in indices]
        dys = [rows_of(dys[i]) for i in indices]
        mag_norm_scales = [saved.mag_norm_scales[i] for i in indices]
        lora_dys, dms = list(dys), [None] * len(batch)
        for j, (i, mag_norm_scale) in enumerate(zip(indices, mag_norm_scales)):
            if mag_norm_scale is not None:
                lora_dys[j], dm = select.pointwise(dys[j]).scale_sum(dys[j], saved.unscaled[i], mag_norm_scale)
                dms[j] = dm.div_(saved.norms[i])
        composed = eager_products.Backward(select.get(self.group.backend), self.x, batch, self.group.lora_dtype)
        gradients = composed.run(t, dys, lora_dys, mag_norm_scales, self.dx, self.needs_x, needs)
        self.dx, das, dbs = gradients
        for j, i in enumerate(indices):
            self.grads[i] = self._operand_grads(batch[j], needs[j], dys[j], lora_dys[j], dms[j])._replace(
                lora_a=das[j], lora_b=dbs[j]
            )

    def _operand_grads(self, member: Member, needs: Operands, dy, lora_dy, dm) -> Operands:
        """Of everything but A and B."""
        p, ops = member.operands, select.get(self.group.backend)
        db = ops.token_sum(dy) if needs.bias or needs.lora_bias else None
        return Operands(
            weight=self._weight_grad(ops, member, dy, lora_dy) if needs.weight else None,
            bias=db.to(p.bias.dtype) if needs.bias else None,
            lora_bias=(db * member.scaling).to(p.lora_bias.dtype) if needs.lora_bias else None,
            magnitude=dm.to(p.magnitude.dtype) if needs.magnitude else None,
        )

    def _weight_grad(self, ops, member: Member, dy, lora_dy) -> Tensor:
        p = member.operands
        if p.magnitude is None or member.mask is None:
            dw = ops.outer(lora_dy, self.x, p.weight.dtype)
        else:
            dw = ops.outer(dy, self.x, p.weight.dtype) + ops.outer(lora_dy - dy, self.x, p.weight.dtype, member.mask)
        return dw.t() if member.transposed else dw


def backward_group(
    group: GroupSpec, x: Tensor, members: Sequence[Member], saved: Saved, dys, needs_x: bool, needs
) -> tuple[Tensor | None, list[Operands]]:
    """(dx [M, K] or None, gradients of every member's operands) for dys [..., N], None where an output
    was not used."""
    backward = _Backward(group, x, members, needs_x, needs)
    for indices, t in zip(batches_of(members), saved.ts):
        live = [i for i in indices if dys[i] is not None]
        if len(live) < len(indices) and t is not None:
            parts = dict(zip(indices, split(t, [members[i] for i in indices])))
            t = cat([parts[i] for i in live], 1) if live else None
        if live:
            backward.batch(live, t, dys, saved)
    return backward.dx, backward.grads


class LoraLinearFunction(torch.autograd.Function):
    """Apply as `(group, scalings, token, x, seeds, *flatten(operands))`, x [..., K] in the dtype of the
    base product; gives a tuple of [..., N], one per member, which separate backward calls may reach (`outputs`). Double
    backward raises.

    `token` is kept until backward has run through all outputs or the graph is gone: who made the call may watch it.
    Tokens are flattened in here: views around the Function would be two more nodes of the graph.
    """

    @staticmethod
    def forward(ctx, group: GroupSpec, scalings, token, x: Tensor, seeds: Tensor | None, *flat):
        # A graph of several outputs holds no x: `shared_input` keeps results as long as there is one.
        rows = (x if len(group.members) == 1 else x.detach()).reshape(-1, x.shape[-1])
        with without_autocast(x):
            members = members_of(group.members, scalings, seeds, flat)
            ys, saved = forward_group(group, rows, members, x.shape[:-1])
        ctx.group, ctx.scalings, ctx.token, ctx.shape, ctx.kept = group, scalings, token, x.shape, None
        ctx.set_materialize_grads(False)
        made = saved.flat()
        ctx.made = len(made)
        is_read = reads_x(unflatten(ctx.needs_input_grad[5:]))
        ctx.save_for_backward(rows if is_read else left_out(ctx, rows), seeds, *made, *flat)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor | None):
        used = [dy is not None for dy in dys]
        saved = separate_backward.saved_tensors(ctx, used, _operands)
        rows, seeds, *rest = saved
        rows = stand_in(ctx) if rows is None else rows
        made, flat = rest[: ctx.made], rest[ctx.made :]
        needs_x, _, *needs_flat = ctx.needs_input_grad[3:]
        with without_autocast(rows):
            members = members_of(ctx.group.members, ctx.scalings, seeds, flat)
            needs = unflatten(needs_flat)
            dx, grads = backward_group(ctx.group, rows, members, Saved.of(made, len(members)), dys, needs_x, needs)
        result = (None, None, None, None if dx is None else dx.view(ctx.shape), None, *flatten(grads))
        separate_backward.ran(ctx, used, saved, result)
        return result


def reads_x(needs: Sequence[Operands]) -> bool:
    """Whether the backward of projections of one x reads its values, for the gradients that are wanted."""
    return any(need.lora_a or need.weight for need in needs)


def _operands(ctx) -> list[separate_backward.Operand | None]:
    """Of the tensors that `LoraLinearFunction` saves. Weights and A are read for dx alone, vectors not at all."""
    vectors = ("bias", "lora_bias", "magnitude")
    read = [name not in vectors if ctx.needs_input_grad[3] else name == "lora_b" for name in Operands._fields]
    found: list[separate_backward.Operand | None] = [("x", None), *[None] * (1 + ctx.made)]
    for i in range(len(ctx.group.members)):
        found += [(name, i) if is_read else None for name, is_read in zip(Operands._fields, read)]
    return found


def shaped(y: Tensor, lead: Sequence[int]) -> Tensor:
    """y [M, N] as [*lead, N]; not a view, so that the caller may change it in place."""
    if y.dim() == len(lead) + 1:
        return y
    return torch.ops.aten._unsafe_view(y, (*lead, y.shape[-1]))


def rows_of(dy: Tensor) -> Tensor:
    """dy [..., N] as contiguous [M, N]."""
    return dy.reshape(-1, dy.shape[-1]).contiguous()
