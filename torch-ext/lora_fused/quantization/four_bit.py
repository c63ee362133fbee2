"""Weights of four bits a value, NF4 and FP4, with plain and with quantized absmax."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import native, select
from ..specs import FourBit, Operands


def rows(operands: Operands, quantized: FourBit, dtype: torch.dtype, first: int, count: int) -> Tensor:
    """Rows [first, first + count) of the weight, [count, K] in `dtype`; first is a multiple of eight, so
    that they begin on a byte. float64 holds the float32 values."""
    k = quantized.shape[1]
    made = dtype if dtype in native.QUANTIZED_DTYPES else torch.float32
    out = torch.empty((count, k), dtype=made, device=operands.weight.device)
    return select.dequantize_4bit(operands, quantized, first * k, out).to(dtype)


def record(quantized: FourBit, first_scale: int) -> native.PackedWeight:
    """The numbers by which the native ops read the weight, its scales from the place `first_scale` on."""
    return native.PackedWeight(
        native.FORMATS.index(quantized.native_format),
        *quantized.shape,
        quantized.blocksize,
        quantized.nested_blocksize,
        first_scale,
        native.QUANTIZED_DTYPES.index(quantized.dtype),
    )
