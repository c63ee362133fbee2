"""Quantised base weights: one file per format, what all of them offer here.

A weight in floating point lives for one product: nothing of it is kept for backward, which makes
it again. The allocator hands the same memory to one weight after another, stream by stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as backends
from ..projection import FourBit, Operands, Quantized
from . import eight_bit, four_bit

# Elements of W that `row_norm` has in floating point at a time: 32 MB of bfloat16, which stays in
# the cache of a large GPU between the two kernels.
NORM_ELEMENTS = 2**24


def _rows(operands: Operands, quantized: Quantized, dtype: torch.dtype, first: int, rows: int) -> Tensor:
    form = four_bit if isinstance(quantized, FourBit) else eight_bit
    return form.rows(operands, quantized, dtype, first, rows)


def dequantize(operands: Operands, quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`."""
    return _rows(operands, quantized, dtype, 0, quantized.shape[0])


def row_norm(operands: Operands, quantized: Quantized, scaling: float) -> Tensor:
    """‖W + s·B·A‖ by row, [N] in at least float32, with at most NORM_ELEMENTS of W, or eight rows, in
    floating point at a time, in the dtype that W had before it was quantised."""
    n, k = quantized.shape
    rows = max(NORM_ELEMENTS // max(k, 1) // 8 * 8, 8)
    norms = []
    for first in range(0, max(n, 1), rows):
        count = min(rows, n - first)
        weight = _rows(operands, quantized, quantized.dtype, first, count)
        norms.append(backends.row_norm(weight, operands.lora_a, operands.lora_b[first : first + count], scaling))
        del weight
    return norms[0] if len(norms) == 1 else torch.cat(norms)
