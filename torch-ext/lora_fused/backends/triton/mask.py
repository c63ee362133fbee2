"""The dropout mask inside a kernel: Philox4x32-7 keyed by seed, counted by row and column.

The same mask as the native op's (`kernel-src/common/dropout.h`): the block with counter (column // 8,
row, row >> 32, 0) is eight numbers of 16 bits, low half first; number `column % 8` keeps its element if
it is at least p·2¹⁶.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...specs import Mask


@triton.jit
def dropped(values, seed_ptr, threshold, scale, rows, first_column, COLUMNS: tl.constexpr):
    """mask ∘ values · scale for a float32 tile [rows, COLUMNS] that begins at first_column, a multiple
    of 8; rows are int64."""
    seed = tl.load(seed_ptr)
    blocks = first_column // 8 + tl.arange(0, COLUMNS // 8)
    zero = rows[:, None] * 0 + blocks[None, :] * 0
    low = (rows[:, None] + zero).to(tl.uint32)
    high = ((rows[:, None] >> 32) + zero).to(tl.uint32)
    counter = (blocks[None, :] + zero).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter, low, high, zero.to(tl.uint32), n_rounds=7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    numbers = tl.join(words & 0xFFFF, words >> 16).reshape(values.shape)
    return tl.where(numbers >= threshold.to(tl.uint32), values * scale, 0.0)


def arguments(mask: Mask | None) -> tuple:
    """(seed, threshold, scale) of a mask for a launch."""
    if mask is None:
        return None, 0, 0.0
    return mask.seed, round(mask.p * 2.0**16), 1.0 / (1.0 - mask.p) if mask.p < 1.0 else 0.0
