"""One projection inside an autograd Function, and what passes between it and a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import quantization
from ..specs import Mask, Operands, ProjectionSpec, Quantized, split_scaling, unflatten


class Member(NamedTuple):
    """One projection of a group."""

    operands: Operands
    scaling: float
    mask: Mask | None
    transposed: bool
    quantized: Quantized | None = None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The base weight as [N, K] in the dtype of the base product; of a quantized one a copy, to be
        let go after the product."""
        if self.quantized is not None:
            return quantization.dequantize(self.operands, self.quantized, dtype)
        weight = self.operands.weight.to(dtype)
        return weight.t() if self.transposed else weight

    def weight_of_backward(self, dtype: torch.dtype) -> Tensor:
        """`weight`, for dy W: of a quantized one rounded to its own dtype first, as bitsandbytes does."""
        if self.quantized is None or self.quantized.dtype == dtype:
            return self.weight(dtype)
        return quantization.dequantize(self.operands, self.quantized, self.quantized.dtype).to(dtype)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """b + s·b_B in `dtype`, or in float32 where float16 may not have the range: PEFT adds b_B to t Bᵀ first."""
        bias, lora_bias = self.operands.bias, self.operands.lora_bias
        if lora_bias is not None:
            wide = dtype == torch.float16
            scaled = (lora_bias.float() if wide else lora_bias) * self.scaling
            bias = scaled if bias is None else bias + scaled
            dtype = torch.float32 if wide else dtype
        return None if bias is None else bias.to(dtype)

    def split_scaling(self, x_dtype: torch.dtype, lora_dtype: torch.dtype | None) -> tuple[float, float]:
        """`projection.split_scaling` for an x and a LoRA path in these dtypes, None for the adapter's own."""
        return split_scaling(self.scaling, x_dtype, lora_dtype or self.operands.lora_a.dtype)


class Outputs(NamedTuple):
    """Of a batch: y [M, N] of each member, for DoRA z [M, N] before the mag_norm_scale, of an x in
    float16 in float32, and t [M, Σ R]."""

    ys: list[Tensor]
    unscaled: list[Tensor | None]
    t: Tensor | None


class Gradients(NamedTuple):
    """Of a batch: dx [M, K] with what was there before added, dA and dB of each member."""

    dx: Tensor | None
    das: list[Tensor | None]
    dbs: list[Tensor | None]


def members_of(specs: Sequence[ProjectionSpec], scalings, seeds: Tensor | None, flat) -> list[Member]:
    """The members of a group; seeds [members] are there where one of them has dropout."""
    keys = seeds.split(1) if seeds is not None else ()
    return [
        Member(
            operands,
            scaling,
            Mask(keys[i], spec.dropout) if spec.dropout > 0 else None,
            spec.transposed,
            spec.quantized,
        )
        for i, (spec, scaling, operands) in enumerate(zip(specs, scalings, unflatten(flat)))
    ]


def batches_of(members: Sequence[Member]) -> list[list[int]]:
    """Members whose down projections are one product of x: no dropout, adapters of one dtype.
    Every member is in one batch; one without an adapter stands alone."""
    batches: list[list[int]] = []
    shared: dict[torch.dtype, list[int]] = {}
    for i, member in enumerate(members):
        lora_a = member.operands.lora_a
        shares = lora_a is not None and member.mask is None
        batch = shared.get(lora_a.dtype) if shares else None
        if batch is None:
            batch = []
            batches.append(batch)
            if shares:
                shared[lora_a.dtype] = batch
        batch.append(i)
    return batches


def cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat`, and no copy of a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def split(t: Tensor, batch: Sequence[Member], dim: int = 1) -> tuple[Tensor, ...]:
    """t or dA of a batch by member."""
    if len(batch) == 1:
        return (t,)
    return t.split([member.operands.lora_a.shape[0] for member in batch], dim)
