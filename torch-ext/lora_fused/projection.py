"""Frozen descriptions of adapted projections and of the groups that share an input.

An autograd Function sees tensors only as flat arguments (a tensor inside a tuple gets no
gradient), so a group is described by a hashable `GroupSpec` and a flat tuple of operands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional, Sequence

from torch import Tensor


class Operands(NamedTuple):
    """Tensors of one projection: weight [N, K], bias [N] or None, lora_a [R, K], lora_b [N, R]."""

    weight: Tensor
    bias: Optional[Tensor]
    lora_a: Tensor
    lora_b: Tensor


OPERANDS_PER_PROJECTION = len(Operands._fields)


@dataclass(frozen=True)
class GroupSpec:
    """What is fixed about a group of projections of one input.

    members: how many projections.
    backend: name of the backend that computes it, see `backend.choose`.
    """

    members: int
    backend: str


def flatten(projections: Sequence[Operands]) -> tuple[Optional[Tensor], ...]:
    """Operands of all projections, one after another."""
    return tuple(tensor for operands in projections for tensor in operands)


def unflatten(flat: Sequence[Optional[Tensor]]) -> tuple[Operands, ...]:
    """Inverse of `flatten`."""
    step = OPERANDS_PER_PROJECTION
    return tuple(Operands(*flat[i : i + step]) for i in range(0, len(flat), step))
