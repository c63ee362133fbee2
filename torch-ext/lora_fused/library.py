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
from .projection import Operands, Projection


def is_plain(projection: Projection, dtype: torch.dtype, lora_dtype: Optional[torch.dtype]) -> bool:
    """Whether the op computes all of a projection in `dtype`: LoRA or none, on a frozen [N, K] base."""
    operands, _, spec = projection
    weight, bias, lora_a, _, lora_bias, magnitude = operands
    frozen = not weight.requires_grad and (bias is None or not (bias.requires_grad or bias.dtype != dtype))
    plain = frozen and weight.dtype == dtype and lora_bias is None and magnitude is None and not spec.transposed
    return plain and (lora_a is None or (lora_dtype or lora_a.dtype) == dtype)


def serves(x: Tensor, batch: Sequence[Member], lora_dtype: Optional[torch.dtype]) -> bool:
    """Whether the adapters compute in x's dtype, and no product is DoRA's of a dropped input."""
    for member in batch:
        lora_a = member.operands.lora_a
        if lora_a is None or (lora_dtype or lora_a.dtype) != x.dtype:
            return False
        if member.mask is not None and member.operands.magnitude is not None:
            return False
    return True


def _lists(x: Tensor, batch: Sequence[Member]) -> tuple:
    """(A's, B's, scalings, seeds, dropouts) of a batch, of which one member at most has a mask."""
    mask = batch[0].mask
    return (
        [member.operands.lora_a for member in batch],
        [member.operands.lora_b for member in batch],
        [member.scaling for member in batch],
        None if mask is None else mask.seed,
        [0.0 if mask is None else mask.p] * len(batch),
    )


def project(x: Tensor, batch: Sequence[Member], biases: Sequence[Optional[Tensor]]) -> Outputs:
    """`compose.project` by one op; for DoRA ys holds z + b, the gain is the caller's."""
    ys, t = ops.lora_forward(x, [member.weight(x.dtype) for member in batch], biases, *_lists(x, batch))
    return Outputs(ys, [None] * len(batch), t)


def project_backward(x: Tensor, batch: Sequence[Member], t, dys, dx, need_dx: bool, needs) -> Gradients:
    """`compose.Backward` by one op, for dys [..., N] after DoRA's gain."""
    needs_a, needs_b = [need.lora_a for need in needs], [need.lora_b for need in needs]
    weights = [member.weight(x.dtype) for member in batch]
    new_dx, das, dbs = ops.lora_backward(dys, x, t, weights, *_lists(x, batch), dx, need_dx, needs_a, needs_b)
    return Gradients(new_dx[0] if new_dx else dx, spread(das, needs_a), spread(dbs, needs_b))


def spread(values: Sequence[Tensor], wanted: Sequence[bool]) -> list[Optional[Tensor]]:
    """Values where they are wanted, None elsewhere."""
    found = iter(values)
    return [next(found) if want else None for want in wanted]


def by_field(projections: Sequence[Projection]) -> tuple[Optional[Tensor], ...]:
    """All weights, all biases, all A's, all B's."""
    operands = [projection.operands for projection in projections]
    return tuple(getattr(each, name) for name in Operands._fields[:4] for each in operands)
