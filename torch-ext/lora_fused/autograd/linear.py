"""One autograd Function for a group of LoRA and DoRA projections that share their input.

Forward, per projection, with d = dropout(x), t = s·d Aᵀ, g = m / ‖W + s·B·A‖ (norm detached):

    LoRA              y = x Wᵀ + t Bᵀ + b + s·b_B
    DoRA              y = g∘z + b                               z = x Wᵀ + t Bᵀ
    DoRA, dropout     y = x Wᵀ + t Bᵀ + b + (g - 1)∘z           z = d Wᵀ + t Bᵀ

Backward, with dy' = g∘dy (dy for LoRA) and D the dropout of the forward, as a linear map:

    dt = s·dy' B    dB = dy'ᵀ t    dA = dtᵀ d    db = Σ dy    db_B = s·Σ dy    dm = Σ dy∘z / norm
    dx = Σ over projections of dy' W + D(dt A), or of dy W + D(((g - 1)∘dy) W + dt A)

Saved for backward: x once for the group, t [M, R], for DoRA z [M, N] and the norm [N], the seeds of
the masks and the operands themselves. Masks are drawn again, nothing of size N×K is formed (dW only
where a base weight is trainable). Members without dropout share one product x [A₁; A₂; …]ᵀ, one
dtᵀ x and one dt A. (Hu et al. 2021, arXiv:2106.09685, equation 3; Liu et al. 2024,
arXiv:2402.09353, equations 5 and 11.)
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backend as backends
from ..projection import GroupSpec, Mask, Operands, ProjectionSpec, flatten, unflatten


class Member(NamedTuple):
    """One projection inside a Function."""

    operands: Operands
    scaling: float
    mask: Optional[Mask]
    transposed: bool

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The base weight as [N, K] in the dtype of the base product."""
        weight = self.operands.weight.to(dtype)
        return weight.t() if self.transposed else weight

    def gain(self, norm: Tensor) -> Tensor:
        """g = m / norm."""
        return self.operands.magnitude.to(norm.dtype) / norm

    def bias(self, dtype: torch.dtype) -> Optional[Tensor]:
        """b + s·b_B."""
        bias, lora_bias = self.operands.bias, self.operands.lora_bias
        if lora_bias is not None:
            scaled = lora_bias * self.scaling
            bias = scaled if bias is None else bias + scaled
        return None if bias is None else bias.to(dtype)


class Saved(NamedTuple):
    """What forward keeps for backward: t of each batch, z and norm of each member (DoRA)."""

    downs: list[Optional[Tensor]]
    zs: list[Optional[Tensor]]
    norms: list[Optional[Tensor]]

    def flat(self) -> list[Optional[Tensor]]:
        return [*self.downs, *self.zs, *self.norms]

    @classmethod
    def of(cls, flat: Sequence[Optional[Tensor]], members: int) -> Saved:
        zs = len(flat) - 2 * members
        return cls(list(flat[:zs]), list(flat[zs : zs + members]), list(flat[zs + members :]))


def members_of(specs: Sequence[ProjectionSpec], scalings, seeds: Optional[Tensor], flat) -> list[Member]:
    """The members of a group; seeds [members] are there where one of them has dropout."""
    keys = seeds.split(1) if seeds is not None else ()
    return [
        Member(operands, scaling, Mask(keys[i], spec.dropout) if spec.dropout > 0 else None, spec.transposed)
        for i, (spec, scaling, operands) in enumerate(zip(specs, scalings, unflatten(flat)))
    ]


def batches_of(members: Sequence[Member]) -> list[list[int]]:
    """Members whose down projections are one product of x: no dropout, adapters of one dtype.
    Every member is in one batch; one without an adapter stands alone."""
    batches: list[list[int]] = []
    shared: dict[torch.dtype, list[int]] = {}
    for i, member in enumerate(members):
        lora_a = member.operands.lora_a
        batch = shared.get(lora_a.dtype) if lora_a is not None and member.mask is None else None
        if batch is None:
            batch = []
            batches.append(batch)
            if lora_a is not None and member.mask is None:
                shared[lora_a.dtype] = batch
        batch.append(i)
    return batches


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _down(ops, group: GroupSpec, x: Tensor, batch: Sequence[Member]) -> Tensor:
    """t of a batch, [M, Σ R]."""
    lora_a = _cat([member.operands.lora_a for member in batch], 0)
    scalings = {member.scaling for member in batch}
    if len(scalings) == 1:
        return ops.down(x, lora_a, scalings.pop(), group.lora_dtype, batch[0].mask)
    t = ops.down(x, lora_a, 1.0, group.lora_dtype)
    for member, part in zip(batch, _split(t, batch)):
        part.mul_(member.scaling)
    return t


def _split(t: Tensor, batch: Sequence[Member], dim: int = 1) -> tuple[Tensor, ...]:
    if len(batch) == 1:
        return (t,)
    return t.split([member.operands.lora_a.shape[0] for member in batch], dim)


def is_scaled(member: Member) -> bool:
    """Whether the output is g∘z + b, so that it need not be kept beside z."""
    return member.operands.magnitude is not None and member.mask is None


def scaled_output(member: Member, z: Tensor, norm: Tensor) -> Tensor:
    """y = g∘z + b of a member that `is_scaled`, again."""
    return backends.pointwise(z).scale(z, member.gain(norm), member.bias(z.dtype))


def _forward_member(ops, x: Tensor, member: Member, t: Optional[Tensor]):
    """(y, z, norm) of one member."""
    p, weight, bias = member.operands, member.weight(x.dtype), member.bias(x.dtype)
    if p.magnitude is None:
        return ops.up_add(x, weight, t, p.lora_b, bias), None, None
    stored = p.weight.t() if member.transposed else p.weight
    norm = backends.row_norm(stored, p.lora_a, p.lora_b, member.scaling)
    gain = member.gain(norm)
    if member.mask is None:
        return *ops.up_add_scaled(x, weight, t, p.lora_b, gain, bias), norm
    z = ops.up_add(ops.dropout(x, member.mask), weight, t, p.lora_b)
    y = ops.up_add(x, weight, t, p.lora_b, bias)
    return y.add_(ops.scale(z, gain - 1)), z, norm


def forward_group(group: GroupSpec, x: Tensor, members: Sequence[Member]) -> tuple[list[Tensor], Saved]:
    """Outputs [M, N] of all members for x [M, K], and what backward needs of them."""
    ops = backends.get(group.backend)
    saved = Saved([], [None] * len(members), [None] * len(members))
    outputs: list[Optional[Tensor]] = [None] * len(members)
    for indices in batches_of(members):
        batch = [members[i] for i in indices]
        t = _down(ops, group, x, batch) if batch[0].operands.lora_a is not None else None
        saved.downs.append(t)
        parts = (None,) if t is None else _split(t, batch)
        for i, member, part in zip(indices, batch, parts):
            outputs[i], saved.zs[i], saved.norms[i] = _forward_member(ops, x, member, part)
    return outputs, saved


class _Backward:
    """The backward of one group: dx summed in one place, gradients of the operands by member."""

    def __init__(self, group: GroupSpec, x: Tensor, members: Sequence[Member], needs_x: bool):
        self.ops = backends.get(group.backend)
        self.lora_dtype = group.lora_dtype
        self.x, self.members, self.needs_x = x, members, needs_x
        self.dx: Optional[Tensor] = None
        self.grads = [Operands(None)] * len(members)

    def batch(self, indices: Sequence[int], t: Optional[Tensor], dys, saved: Saved, needs) -> None:
        """Adds the gradients of one batch whose dys are all there."""
        batch = [self.members[i] for i in indices]
        needs_a = any(needs[i].lora_a for i in indices)
        parts = (None,) if t is None else _split(t, batch)
        dts, dt = [], None
        for i, member, part in zip(indices, batch, parts):
            dy, gain, dm = dys[i], None, None
            dy_lora = dy
            if member.operands.magnitude is not None:
                gain = member.gain(saved.norms[i])
                dy_lora, dm = backends.pointwise(dy).scale_sum(dy, saved.zs[i], gain)
                dm = dm.div_(saved.norms[i])
            if part is not None and (self.needs_x or needs_a):
                dts.append(self.ops.down(dy_lora, member.operands.lora_b.t(), member.scaling, self.lora_dtype))
            if len(dts) == len(batch):
                dt = _cat(dts, 1)
            self._operand_grads(i, member, dy, dy_lora, part, dm, needs[i])
            if self.needs_x:
                lora_a = None if dt is None else _cat([m.operands.lora_a for m in batch], 0)
                self._input_grad(member, dy, dy_lora, gain, dt, lora_a)
        if dt is not None and needs_a:
            self._down_grads(indices, batch, dt, needs)

    def _operand_grads(self, i, member: Member, dy, dy_lora, t, dm, needs: Operands) -> None:
        p, ops = member.operands, self.ops
        db = ops.token_sum(dy) if needs.bias or needs.lora_bias else None
        self.grads[i] = Operands(
            weight=self._weight_grad(member, dy, dy_lora) if needs.weight else None,
            bias=db.to(p.bias.dtype) if needs.bias else None,
            lora_b=ops.outer(dy_lora, t, p.lora_b.dtype) if needs.lora_b else None,
            lora_bias=(db * member.scaling).to(p.lora_bias.dtype) if needs.lora_bias else None,
            magnitude=dm.to(p.magnitude.dtype) if needs.magnitude else None,
        )

    def _weight_grad(self, member: Member, dy, dy_lora) -> Tensor:
        p, ops = member.operands, self.ops
        if p.magnitude is None or member.mask is None:
            dw = ops.outer(dy_lora, self.x, p.weight.dtype)
        else:
            dw = ops.outer(dy, self.x, p.weight.dtype) + ops.outer(dy_lora - dy, self.x, p.weight.dtype, member.mask)
        return dw.t() if member.transposed else dw

    def _input_grad(self, member: Member, dy, dy_lora, gain, dt, lora_a) -> None:
        """dx += this member's part; dt and lora_a are a whole batch's at its last member."""
        ops, weight = self.ops, member.weight(dy.dtype).t()
        up = None if lora_a is None else lora_a.t()
        if member.mask is None or gain is None:
            self.dx = ops.up_add(dy_lora, weight, dt, up, mask=member.mask, out=self.dx)
            return
        self.dx = ops.up_add(dy, weight, out=self.dx)
        dropped = ops.up_add(ops.scale(dy, gain - 1), weight, dt, up)
        self.dx.add_(ops.dropout(dropped, member.mask))

    def _down_grads(self, indices, batch, dt: Tensor, needs) -> None:
        da = self.ops.outer(dt, self.x, batch[0].operands.lora_a.dtype, batch[0].mask)
        for i, part in zip(indices, _split(da, batch, 0)):
            if needs[i].lora_a:
                self.grads[i] = self.grads[i]._replace(lora_a=part)


def backward_group(
    group: GroupSpec, x: Tensor, members: Sequence[Member], saved: Saved, dys, needs_x: bool, needs
) -> tuple[Optional[Tensor], list[Operands]]:
    """(dx [M, K] or None, gradients of every member's operands) for dys [M, N], None where an output
    was not used."""
    backward = _Backward(group, x, members, needs_x)
    for indices, t in zip(batches_of(members), saved.downs):
        live = [i for i in indices if dys[i] is not None]
        if len(live) < len(indices) and t is not None:
            parts = dict(zip(indices, _split(t, [members[i] for i in indices])))
            t = _cat([parts[i] for i in live], 1) if live else None
        if live:
            backward.batch(live, t, dys, saved, needs)
    return backward.dx, backward.grads


class LoraLinearFunction(torch.autograd.Function):
    """Apply as `(group, scalings, token, x, seeds, *flatten(operands))`, x [..., K] in the dtype of the
    base product; gives a tuple of [..., N], one per member. Double backward raises.

    `token` is kept until backward has run or the graph is gone: who made the call may watch it.
    Tokens are flattened in here: views around the Function would be two more nodes of the graph.
    """

    @staticmethod
    def forward(ctx, group: GroupSpec, scalings, token, x: Tensor, seeds: Optional[Tensor], *flat):
        rows = x.reshape(-1, x.shape[-1])
        with without_autocast(x):
            outputs, saved = forward_group(group, rows, members_of(group.members, scalings, seeds, flat))
        ctx.group, ctx.scalings, ctx.token, ctx.shape = group, scalings, token, x.shape
        ctx.set_materialize_grads(False)
        kept = saved.flat()
        ctx.kept = len(kept)
        ctx.save_for_backward(rows, seeds, *kept, *flat)
        return tuple(shaped(y, x.shape) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Optional[Tensor]):
        rows, seeds, *rest = ctx.saved_tensors
        kept, flat = rest[: ctx.kept], rest[ctx.kept :]
        needs_x, _, *needs_flat = ctx.needs_input_grad[3:]
        dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]).contiguous() for dy in dys]
        with without_autocast(rows):
            members = members_of(ctx.group.members, ctx.scalings, seeds, flat)
            saved = Saved.of(kept, len(members))
            dx, grads = backward_group(ctx.group, rows, members, saved, dys, needs_x, unflatten(needs_flat))
        ctx.token = None
        return None, None, None, None if dx is None else dx.view(ctx.shape), None, *flatten(grads)


def shaped(y: Tensor, shape: torch.Size) -> Tensor:
    """y [M, N] as [..., N]; not a view, so that the caller may change it in place."""
    return torch.ops.aten._unsafe_view(y, (*shape[:-1], y.shape[-1]))


def without_autocast(x: Tensor):
    """Dtypes are settled by the caller; entering the context costs host time, so only where it acts."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
