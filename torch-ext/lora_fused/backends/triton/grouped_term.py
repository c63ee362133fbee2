"""An adapter's term beside a product that another library makes, over rows that are sorted by expert:

    t = x D_eᵀ      y += t U_eᵀ + b_e, in place

`grouped_shrink` is bound by reading x, and may write the rows that it gathers, for the other product; `grouped_add` by
reading and writing y. A program makes a part of one of `Rows.tiles`, so that few rows still fill the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MIN_DOT, ceil_div, dot_precision, launch, power_of_2, rank_block


@triton.jit
def part_of(tiles_ptr, most, part, PARTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a part of a tile; no rows where there is none."""
    tile = part // PARTS
    expert = tl.load(tiles_ptr + tile)
    first = tl.load(tiles_ptr + most + tile) + part % PARTS * BLOCK_M
    end = tl.where(expert >= 0, tl.load(tiles_ptr + 2 * most + tile), first)
    return expert.to(tl.int64), first, end


@triton.jit
def grouped_shrink_kernel(
    x_ptr,
    order_ptr,  # [S] choices, of which the token is read; None: x is by row
    d_ptr,  # [E, R, K]
    t_ptr,  # [S, R]
    gathered_ptr,  # [S, K], or None
    tiles_ptr,
    most,
    K,
    R,
    per_token,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert, first, end = part_of(tiles_ptr, most, tl.program_id(0), PARTS, BLOCK_M)
    if first < end:
        rows = first + tl.arange(0, BLOCK_M)
        row_mask = rows < end
        # Beyond the end the last row is read again, and not stored: loads of x need no mask.
        inside = tl.minimum(rows, end - 1)
        sources = tl.load(order_ptr + inside) // per_token if order_ptr is not None else inside
        ks = tl.arange(0, BLOCK_K)
        ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        x_ptrs = x_ptr + sources[:, None].to(tl.int64) * K + ks[None, :]
        d_ptrs = d_ptr + expert * R * K + ranks[None, :] * K + ks[:, None]
        short = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            k_mask = (ks < K - start) | EVEN_K
            x = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=k_mask[None, :], other=0.0)
            d = tl.load(d_ptrs, mask=k_mask[:, None] & (ranks < R)[None, :], other=0.0)
            short = tl.dot(x, d, short, input_precision=PRECISION)
            if gathered_ptr is not None:
                to_ptrs = gathered_ptr + rows[:, None].to(tl.int64) * K + start + ks[None, :]
                stored = rows < tl.where(tl.program_id(1) == 0, end, first)  # by one of those that read them
                tl.store(to_ptrs, x, mask=stored[:, None] & k_mask[None, :])
            x_ptrs += BLOCK_K
            d_ptrs += BLOCK_K
        t_ptrs = t_ptr + rows[:, None].to(tl.int64) * R + ranks[None, :]
        tl.store(t_ptrs, short.to(t_ptr.dtype.element_ty), mask=row_mask[:, None] & (ranks < R)[None, :])


@triton.jit
def grouped_add_kernel(
    y_ptr,  # [S, N]
    t_ptr,  # [S, R]; None: a bias alone
    u_ptr,  # [E, R, N]
    bias_ptr,  # [E, N], or None
    tiles_ptr,
    most,
    N,
    R,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks_n = tl.cdiv(N, BLOCK_N)
    expert, first, end = part_of(tiles_ptr, most, tl.program_id(0) // blocks_n, PARTS, BLOCK_M)
    if first < end:
        columns = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
        rows, ranks = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
        row_mask, column_mask = rows < end, columns < N
        mask = row_mask[:, None] & column_mask[None, :]
        y_ptrs = y_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        if t_ptr is not None:
            t_ptrs = t_ptr + rows[:, None].to(tl.int64) * R + ranks[None, :]
            u_ptrs = u_ptr + expert * R * N + ranks[:, None] * N + columns[None, :]
            term = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for start in tl.range(0, R, BLOCK_R, num_stages=1):
                rank_mask = ranks < R - start
                t = tl.load(t_ptrs + start, mask=row_mask[:, None] & rank_mask[None, :], other=0.0)
                u = tl.load(u_ptrs + start * N, mask=rank_mask[:, None] & column_mask[None, :], other=0.0)
                term = tl.dot(t, u, term, input_precision=PRECISION)
            y += term
        if bias_ptr is not None:
            y += tl.load(bias_ptr + expert * N + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


SHRINK_ROWS, ADD_ROWS, ADD_COLUMNS = 32, 64, 128


def grouped_shrink(
    x: Tensor, order: Tensor | None, tiles: Tensor, tile_rows: int, d: Tensor, per_token: int = 1, gather: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(t [S, R], x by row if `gather`) in x's dtype, sums in float32; operands as `grouped_linear` has them, D
    [E, R, K] contiguous. Rows of no expert stay unwritten."""
    x, (_, rank, k) = x.contiguous(), d.shape
    count, most = (x if order is None else order).shape[0], tiles.shape[1]
    t = torch.empty((count, rank), dtype=x.dtype, device=x.device)
    gathered = torch.empty((count, k), dtype=x.dtype, device=x.device) if gather else None
    rows, ranks = min(tile_rows, SHRINK_ROWS), rank_block(rank)
    depth = (256 if ranks == MIN_DOT else 128) * 2 // x.element_size()
    depth = min(depth, max(MIN_DOT, power_of_2(k)))
    given = x, order, d, t, gathered, tiles, most, k, rank, per_token
    parts = tile_rows // rows
    launch(
        grouped_shrink_kernel,
        (most * parts, ceil_div(rank, ranks), 1),
        (*given, parts, rows, depth, ranks, k % depth == 0, dot_precision(x)),
        num_warps=4,
    )
    return t, gathered


def grouped_add(
    y: Tensor, tiles: Tensor, tile_rows: int, t: Tensor | None, u: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """y [S, N], contiguous, with t [S, R] times U_e [E, R, N] and bias [E, N] of the row's expert added in place, in
    float32 and rounded once."""
    n, most, rank = y.shape[1], tiles.shape[1], 0 if t is None else t.shape[1]
    rows, columns = min(tile_rows, ADD_ROWS), min(ADD_COLUMNS, max(MIN_DOT, power_of_2(n)))
    parts, bias = tile_rows // rows, None if bias is None else bias.contiguous()
    launch(
        grouped_add_kernel,
        (most * parts * ceil_div(n, columns), 1, 1),
        (y, t, u, bias, tiles, most, n, rank, parts, rows, columns, rank_block(rank), dot_precision(y)),
        num_warps=4,
    )
    return y
