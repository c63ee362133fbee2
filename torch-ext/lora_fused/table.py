"""Frozen description of an adapted embedding, as `projection` is of an adapted linear."""

from __future__ import annotations

from typing import NamedTuple, Optional

from torch import Tensor


class Table(NamedTuple):
    """Tensors of one embedding: weight [V, H], lora_a [R, V], lora_b [H, R], magnitude [H] or None
    for plain LoRA, scale of one element or None."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Optional[Tensor] = None
    scale: Optional[Tensor] = None


class TableSpec(NamedTuple):
    """What is no tensor: the scaling s, the row that gets no gradient, the embedding's own scale
    where it is a number, the name of the backend."""

    scaling: float
    padding_idx: Optional[int]
    scale: float
    backend: str
