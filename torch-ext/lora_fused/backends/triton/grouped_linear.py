"""y = x W_eᵀ + t (s·B_e)ᵀ + b_e over rows that are sorted by expert, in one launch: rows are gathered as they are
loaded, and the adapter's rank is further steps of the same accumulator.

A program makes a tile of one expert's rows. Which, it finds out itself: it counts the tiles of all experts, from where
their rows end, so the host does not wait for these numbers. The grid has room for the most tiles that there can be;
programs beyond the last one leave. Rows of no expert stay unwritten.

Strides are given, so W is read as it is stored, transposed or not, and the backward is the same kernel: dx = dy W + dt
A.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MIN_DOT, SMALL_SHARED_MEMORY, dot_precision, on_device, rank_block, shared_memory


@triton.jit
def find_tile(ends_ptr, tile, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a tile; the expert is E beyond the last tile."""
    experts = tl.arange(0, BLOCK_E)
    inside = experts < E
    ends = tl.load(ends_ptr + experts, mask=inside, other=0)
    starts = tl.load(ends_ptr + experts - 1, mask=inside & (experts > 0), other=0)
    tiles = tl.where(inside, (ends - starts + BLOCK_M - 1) // BLOCK_M, 0)
    tile_ends = tl.cumsum(tiles, 0)
    expert = tl.sum((tile_ends <= tile).to(tl.int32) * inside.to(tl.int32), 0)
    own = experts == expert
    first = tl.sum(tl.where(own, starts + (tile - tile_ends + tiles) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(own, ends, 0), 0)


@triton.jit
def grouped_linear_kernel(
    x_ptr,
    order_ptr,  # [S] choices, of which the token is read; None: x is by row
    w_ptr,
    t_ptr,
    b_ptr,
    bias_ptr,
    y_ptr,
    ends_ptr,
    scaling,
    E,
    N,
    K,
    R,
    per_token,
    stride_xm,
    stride_we,
    stride_wn,
    stride_wk,
    stride_tm,
    stride_be,
    stride_bn,
    stride_br,
    stride_ym,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert, first, end = find_tile(ends_ptr, tl.program_id(1), E, BLOCK_M, BLOCK_E)
    if expert < E:
        own = expert.to(tl.int64)
        rows = first + tl.arange(0, BLOCK_M)
        row_mask = rows < end
        if order_ptr is not None:
            sources = tl.load(order_ptr + rows, mask=row_mask, other=0) // per_token
        else:
            sources = rows
        columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        column_mask = columns < N
        ks = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + sources[:, None].to(tl.int64) * stride_xm + ks[None, :]
        w_ptrs = w_ptr + own * stride_we + ks[:, None] * stride_wk + columns[None, :] * stride_wn
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            k_mask = ks < K - start
            x = tl.load(x_ptrs, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=k_mask[:, None] & column_mask[None, :], other=0.0)
            total = tl.dot(x, w.to(x.dtype), total, input_precision=PRECISION)
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * stride_wk
        if t_ptr is not None:
            ranks = tl.arange(0, BLOCK_R)
            for start in range(0, R, BLOCK_R):
                rank_mask = ranks < R - start
                t = tl.load(
                    t_ptr + rows[:, None].to(tl.int64) * stride_tm + (start + ranks)[None, :],
                    mask=row_mask[:, None] & rank_mask[None, :],
                    other=0.0,
                )
                b = tl.load(
                    b_ptr + own * stride_be + (start + ranks)[:, None] * stride_br + columns[None, :] * stride_bn,
                    mask=rank_mask[:, None] & column_mask[None, :],
                    other=0.0,
                )
                total = tl.dot(t, (b.to(tl.float32) * scaling).to(t.dtype), total, input_precision=PRECISION)
        else:
            total *= scaling
        if bias_ptr is not None:
            total += tl.load(bias_ptr + own * N + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        tl.store(
            y_ptr + rows[:, None].to(tl.int64) * stride_ym + columns[None, :],
            total.to(y_ptr.dtype.element_ty),
            mask=row_mask[:, None] & column_mask[None, :],
        )


def grouped_linear(
    x: Tensor,
    order: Tensor | None,
    ends: Tensor,
    w: Tensor,
    adapter: tuple[Tensor, Tensor, float] | None = None,
    bias: Tensor | None = None,
    per_token: int = 1,
    scaling: float = 1.0,
) -> Tensor:
    """y [S, N] in x's dtype, products in float32. x [S, K] by row, or [T, K] with `order` [S], of which row r reads
    x[order[r] // per_token]; ends [E] in int32; w [E, N, K] of any strides and x's dtype, or a wider one that is
    rounded to it; adapter (t [S, R], b [E, N, R] of any strides and dtype, s); bias [E, N]; `scaling` of x Wᵀ without
    an adapter."""
    experts, n, k = w.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    count = x.shape[0] if order is None else order.shape[0]
    y = torch.empty((count, n), dtype=x.dtype, device=x.device)
    t, b, scaling = (None, None, scaling) if adapter is None else adapter
    tile = _tile(x, count, experts, n)
    most = min(count, experts) + count // tile["BLOCK_M"]
    with on_device(x):
        grouped_linear_kernel[(triton.cdiv(n, tile["BLOCK_N"]), most)](
            x,
            order,
            w,
            t,
            b,
            bias,
            y,
            ends,
            scaling,
            experts,
            n,
            k,
            0 if t is None else t.shape[1],
            per_token,
            x.stride(0),
            *w.stride(),
            0 if t is None else t.stride(0),
            *((0, 0, 0) if b is None else b.stride()),
            y.stride(0),
            BLOCK_R=MIN_DOT if t is None else rank_block(t.shape[1]),
            BLOCK_E=triton.next_power_of_2(experts),
            PRECISION=dot_precision(x),
            **tile,
        )
    return y


def _tile(x: Tensor, count: int, experts: int, n: int) -> dict:
    """Tiles by rows an expert; at most 96 KiB of shared memory, or 64 where there is less."""
    each = count // experts
    rows = 128 if each >= 96 else 64 if each >= 48 else 32 if each >= 24 else MIN_DOT
    wide = x.element_size() == 4
    small = shared_memory(x.device) <= SMALL_SHARED_MEMORY
    rows = min(rows, 64) if small or wide else rows
    columns = min(128, max(MIN_DOT, triton.next_power_of_2(n)))
    return dict(
        BLOCK_M=rows,
        BLOCK_N=columns,
        BLOCK_K=32 if wide else 64,
        num_warps=8 if rows * columns > 64 * 128 else 4,
        num_stages=3,
    )
