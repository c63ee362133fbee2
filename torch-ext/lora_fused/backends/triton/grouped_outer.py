"""s·Σ w·(short_r long_rᵀ) over each expert's rows r: the gradient of an adapter's factor, in its own layout and dtype,
and that of the other one in the same launch.

One program makes one expert's tile and goes through its rows in order: deterministic, without a wait for where they
end, and zero where there are none. The long operand may be gathered as it is loaded; bound by reading it once.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import MIN_DOT, SIZES_KEPT, ceil_div, dot_precision, launch, power_of_2, rank_block

BLOCK_L = 128


@triton.jit
def outer_tile(
    block,
    long_ptr,
    short_ptr,
    out_ptr,
    order_ptr,
    routing_ptr,
    ends_ptr,
    scaling,
    R,
    L,
    per_token,
    stride_e,
    stride_r,
    stride_l,
    BY_TOKEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.program_id(1)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    columns = block * BLOCK_L + tl.arange(0, BLOCK_L)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    dtype = long_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_L, BLOCK_R), dtype=tl.float32)
    for first in range(start, end, BLOCK_S):
        rows = first + tl.arange(0, BLOCK_S)
        mask = rows < end
        sources = rows.to(tl.int64)
        if BY_TOKEN or routing_ptr is not None:
            choices = tl.load(order_ptr + rows, mask=mask, other=0)
            if BY_TOKEN:
                sources = choices // per_token
        if short_ptr is not None:
            short_ptrs = short_ptr + rows[:, None].to(tl.int64) * R + ranks[None, :]
            short = tl.load(short_ptrs, mask=mask[:, None] & (ranks < R)[None, :], other=0.0)
        else:
            short = (mask[:, None] & (ranks < R)[None, :]).to(dtype)
        if routing_ptr is not None:
            weight = tl.load(routing_ptr + choices, mask=mask, other=0.0).to(tl.float32)
            short = (short.to(tl.float32) * weight[:, None]).to(dtype)
        long_ptrs = long_ptr + sources[None, :] * L + columns[:, None]
        long = tl.load(long_ptrs, mask=mask[None, :] & (columns < L)[:, None], other=0.0)
        total = tl.dot(long, short, total, input_precision=PRECISION)
    out_ptrs = out_ptr + expert.to(tl.int64) * stride_e + columns[:, None].to(tl.int64) * stride_l
    tl.store(
        out_ptrs + ranks[None, :].to(tl.int64) * stride_r,
        (total * scaling).to(out_ptr.dtype.element_ty),
        mask=(columns < L)[:, None] & (ranks < R)[None, :],
    )


@triton.jit
def grouped_outer_kernel(
    long_ptr,
    short_ptr,  # [S, R]; None: ones
    out_ptr,
    other_long_ptr,  # of a second sum; None: there is none
    other_short_ptr,
    other_out_ptr,
    order_ptr,  # [S] choices
    routing_ptr,  # [T·k] by choice; None: ones
    ends_ptr,
    scaling,
    other_scaling,
    R,
    L,
    other_L,
    per_token,
    stride_e,
    stride_r,
    stride_l,
    other_stride_e,
    other_stride_r,
    other_stride_l,
    BY_TOKEN: tl.constexpr,  # of the long operand
    OTHER_BY_TOKEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, blocks = tl.program_id(0), tl.cdiv(L, BLOCK_L)
    if block < blocks:
        outer_tile(block, long_ptr, short_ptr, out_ptr, order_ptr, routing_ptr, ends_ptr, scaling, R, L, per_token,
                   stride_e, stride_r, stride_l, BY_TOKEN, BLOCK_R, BLOCK_L, BLOCK_S, PRECISION)  # fmt: skip
    else:
        if other_long_ptr is not None:
            outer_tile(block - blocks, other_long_ptr, other_short_ptr, other_out_ptr, order_ptr, routing_ptr, ends_ptr,
                       other_scaling, R, other_L, per_token, other_stride_e, other_stride_r, other_stride_l,
                       OTHER_BY_TOKEN, BLOCK_R, BLOCK_L, BLOCK_S, PRECISION)  # fmt: skip


class Outer(NamedTuple):
    """One sum: `out` [E, R, L] of any strides and float dtype, given as a tensor and its strides by E, R and L; short
    [S, R] (None: ones), long [S, L] by row, or [T, L] where it is by token."""

    out: Tensor
    strides: tuple[int, int, int]
    length: int
    short: Tensor | None
    long: Tensor
    by_token: bool
    scaling: float = 1.0


_NOTHING: tuple[Tensor | None, Tensor | None, Tensor | None] = None, None, None


def grouped_outer(
    first: Outer,
    second: Outer | None,
    rank: int,
    order: Tensor,
    ends: Tensor,
    *,
    routing: Tensor | None = None,
    per_token: int = 1,
) -> None:
    """Fills `out` of one sum or of two that have a rank and routing weights [T, k] in common, sums in float32;
    per_token says how many choices a token has."""
    out, strides, length, short, long, by_token, scaling = first
    long, routing = long.contiguous(), None if routing is None else routing.contiguous()
    others, other_scaling, other_length, other_strides, other_by_token = _NOTHING, 1.0, 0, (0, 0, 0), False
    if second is not None:
        others = second.long.contiguous(), second.short, second.out
        _, other_strides, other_length, _, _, other_by_token, other_scaling = second
    grid, blocks = _blocks(ends.shape[0], rank, length, other_length, long.element_size())
    given = long, short, out, *others, order, routing, ends
    sizes = float(scaling), float(other_scaling), rank, length, other_length, per_token
    how = by_token, other_by_token, *blocks, dot_precision(long)
    launch(grouped_outer_kernel, grid, (*given, *sizes, *strides, *other_strides, *how), num_warps=4)


@functools.lru_cache(SIZES_KEPT)
def _blocks(experts: int, rank: int, length: int, other_length: int, element_size: int):
    """Grid and block sizes (BLOCK_R, BLOCK_L, BLOCK_S) of two sums; the second's length is 0 where there is one."""
    block_l, block_r = min(BLOCK_L, max(MIN_DOT, power_of_2(max(length, other_length)))), rank_block(rank)
    grid = ceil_div(length, block_l) + ceil_div(other_length, block_l), experts, ceil_div(rank, block_r)
    return grid, (block_r, block_l, 32 if element_size == 4 else 64)
