"""Batches of projections as one native op a direction, which chains the library's products.

The arithmetic is that of `reference` in x's dtype; what it saves is host time, which is what small
work on a GPU waits for.
"""

from __future__ import annotations

from typing import Optional, Sequence

import torch
from torch import Tensor

from . import ops
from .member import Gradients, Member, Outputs


def serves(x: Tensor, batch: Sequence[Member], lora_dtype: Optional[torch.dtype]) -> bool:
    """Whether the adapters compute in x's dtype, and no product is DoRA's of a dropped input."""
    for member in batch:
        lora_a = member.operands.lora_a
        if lora_a is not None and (lora_dtype or lora_a.dtype) != x.dtype:
            return False
        if member.mask is not None and member.operands.magnitude is not None:
            return False
    return True


def project(x: Tensor, batch: Sequence[Member], lead: Sequence[int]) -> Outputs:
    """`compose.project` by one op, outputs as [*lead, N]; for DoRA ys holds z, the gain is the caller's."""
    lora = [member for member in batch if member.operands.lora_a is not None]
    mask = batch[0].mask
    ys, ts = ops.lora_forward(
        x,
        [member.weight(x.dtype) for member in batch],
        [None if member.operands.magnitude is not None else member.bias(x.dtype) for member in batch],
        [member.operands.lora_a for member in lora],
        [member.operands.lora_b for member in lora],
        [member.scaling for member in lora],
        None if mask is None else mask.seed,
        0.0 if mask is None else mask.p,
        lead,
    )
    return Outputs(ys, [None] * len(batch), ts[0] if ts else None)


def project_backward(x: Tensor, batch: Sequence[Member], t, dys, dx, need_dx: bool, needs) -> Gradients:
    """`compose.Backward` by one op, for dys [..., N] after DoRA's gain."""
    lora = [member for member in batch if member.operands.lora_a is not None]
    needs_a = [need.lora_a for need in needs] if lora else []
    needs_b = [need.lora_b for need in needs] if lora else []
    mask = batch[0].mask
    new_dx, das, dbs = ops.lora_backward(
        dys,
        x,
        t,
        [member.weight(x.dtype) for member in batch] if need_dx else [],
        [member.operands.lora_a for member in lora],
        [member.operands.lora_b for member in lora],
        [member.scaling for member in lora],
        None if mask is None else mask.seed,
        0.0 if mask is None else mask.p,
        dx,
        need_dx,
        needs_a,
        needs_b,
    )
    return Gradients(new_dx[0] if new_dx else dx, _spread(das, needs_a), _spread(dbs, needs_b))


def _spread(values: list[Tensor], needed: list[bool]) -> list[Optional[Tensor]]:
    found = iter(values)
    return [next(found) if need else None for need in needed] or [None]
