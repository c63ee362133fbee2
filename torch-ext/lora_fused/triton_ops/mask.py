"""The dropout mask inside a kernel: Philox4x32-10 keyed by seed, counted by row and column.

The same mask as the native op's (`kernel-src/common/dropout.h`): word `column % 4` of the block
with counter (column // 4, row, row >> 32, 0) keeps its element if it is at least p·2³².
"""

from __future__ import annotations

import math
from typing import Optional

import triton
import triton.language as tl

from ..projection import Mask


@triton.jit
def dropped(values, seed_ptr, threshold, scale, rows, first_column, COLUMNS: tl.constexpr):
    """mask ∘ values · scale for a float32 tile [rows, COLUMNS] that begins at first_column, a multiple
    of 4; rows are int64."""
    seed = tl.load(seed_ptr)
    blocks = first_column // 4 + tl.arange(0, COLUMNS // 4)
    zero = rows[:, None] * 0 + blocks[None, :] * 0
    low = (rows[:, None] + zero).to(tl.uint32)
    high = ((rows[:, None] >> 32) + zero).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, (blocks[None, :] + zero).to(tl.uint32), low, high, zero.to(tl.uint32))
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(values.shape)
    return tl.where(words >= threshold.to(tl.uint32), values * scale, 0.0)


def arguments(mask: Optional[Mask]) -> tuple:
    """(seed, threshold, scale) of a mask for a launch; p = 1 scales by 0, as no word is out of reach."""
    if mask is None:
        return None, 0, 0.0
    threshold = min(math.ceil(mask.p * 2.0**32), 2**32 - 1)
    return mask.seed, threshold, 1.0 / (1.0 - mask.p) if mask.p < 1.0 else 0.0
