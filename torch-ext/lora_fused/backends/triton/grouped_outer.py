"""s·Σ w·(short_r long_rᵀ) over each expert's rows r: the gradient of an adapter's factor, in its own layout and dtype.

One program makes one expert's tile and goes through its rows in order: deterministic, without a wait for where they
end, and zero where there are none. The long operand may be gathered as it is loaded; bound by reading it once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import MIN_DOT, ceil_div, dot_precision, launch, power_of_2, rank_block

BLOCK_L = 128


@triton.jit
def grouped_outer_kernel(
    long_ptr,
    short_ptr,  # [S, R]; None: ones
    order_ptr,  # [S] choices
    routing_ptr,  # [T·k] by choice; None: ones
    out_ptr,
    ends_ptr,
    scaling,
    R,
    L,
    per_token,
    stride_e,
    stride_r,
    stride_l,
    BY_TOKEN: tl.constexpr,  # of the long operand
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.program_id(1)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    columns = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
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


def grouped_outer(
    short: Tensor | None,
    long: Tensor,
    order: Tensor,
    ends: Tensor,
    out: Tensor,
    *,
    scaling: float = 1.0,
    routing: Tensor | None = None,
    per_token: int = 0,
) -> Tensor:
    """`out` [E, R, L] of any strides and float dtype, filled, sums in float32: of short [S, R] (None: ones) and long
    [S, L] by row, or [T, L] by token where `per_token` says how many choices a token has; routing [T, k]."""
    experts, rank, length = out.shape
    block_l, block_r = min(BLOCK_L, max(MIN_DOT, power_of_2(length))), rank_block(rank)
    block_s = 32 if long.element_size() == 4 else 64
    long, routing = long.contiguous(), None if routing is None else routing.contiguous()
    given = long, short, order, routing, out, ends, scaling, rank, length, per_token, *out.stride()
    launch(
        grouped_outer_kernel,
        (ceil_div(length, block_l), experts, ceil_div(rank, block_r)),
        (*given, per_token > 0, block_r, block_l, block_s, dot_precision(long)),
        num_warps=4,
    )
    return out
