"""y = x W_eᵀ + t U_eᵀ + b_e over rows that are sorted by expert, in one launch: rows are gathered as they are loaded,
and the adapter's rank is further steps of the same accumulator. t = x D_eᵀ is made beside it, from the same x tile, or
given.

A program makes a tile of one expert's rows, which the table that `route` makes names. The grid has room for the most
tiles that there can be; programs beyond the last one leave. Rows of no expert stay unwritten. Programs that run
together share W among the rows of an expert, and rows among their columns.

Strides of W are given, so it is read as it is stored, transposed or not, and the backward is the same kernel:
dx = dy W + dt A with dt = dy B.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device_config
from .grouped_term import grouped_shrink
from .launch import (
    MAX_RANK_BLOCK,
    MIN_DOT,
    SIZES_KEPT,
    SMALL_SHARED_MEMORY,
    ceil_div,
    dot_precision,
    launch,
    power_of_2,
    rank_block,
    shared_memory,
)

BAND = 8  # tiles of rows that go through the columns together
WARPGROUP = 64  # rows of Hopper's product: with fewer, and t beside it, each warp makes all that four could share


@triton.jit
def grouped_linear_kernel(
    x_ptr,
    order_ptr,  # [S] choices, of which the token is read; None: x is by row
    w_ptr,
    d_ptr,  # [E, R, K]; None: t is given
    u_ptr,  # [E, R, N]; None: no adapter
    t_ptr,  # [S, R]
    bias_ptr,
    y_ptr,
    tiles_ptr,
    most,
    N,
    K,
    R,
    per_token,
    stride_we,
    stride_wn,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BAND: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks_n = tl.cdiv(N, BLOCK_N)
    within = tl.program_id(0) % (BAND * blocks_n)
    tile = tl.program_id(0) // (BAND * blocks_n) * BAND + within % BAND
    expert = tl.load(tiles_ptr + tile, mask=tile < most, other=-1)
    first = tl.load(tiles_ptr + most + tile, mask=tile < most, other=0)
    end = tl.load(tiles_ptr + 2 * most + tile, mask=tile < most, other=0)
    if expert >= 0:
        own = expert.to(tl.int64)
        column = within // BAND
        columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = first + tl.arange(0, BLOCK_M)
        # Beyond the end the last row is read again, and not stored: loads of x need no mask.
        inside = tl.minimum(rows, end - 1)
        sources = tl.load(order_ptr + inside) // per_token if order_ptr is not None else inside
        ks, ranks = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
        x_ptrs = x_ptr + sources[:, None].to(tl.int64) * K + ks[None, :]
        w_ptrs = w_ptr + own * stride_we + ks[:, None] * stride_wk + columns[None, :] * stride_wn
        d_ptrs = d_ptr + own * R * K + ranks[None, :] * K + ks[:, None] if d_ptr is not None else x_ptrs
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        short = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            k_mask = (ks < K - start) | EVEN_K
            w_mask = k_mask[:, None] & ((columns < N) | EVEN_N)[None, :]
            x = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=k_mask[None, :], other=0.0)
            w = tl.load(w_ptrs) if EVEN_K and EVEN_N else tl.load(w_ptrs, mask=w_mask, other=0.0)
            total = tl.dot(x, w, total, input_precision=PRECISION)
            if d_ptr is not None:
                d = tl.load(d_ptrs, mask=k_mask[:, None] & (ranks < R)[None, :], other=0.0)
                short = tl.dot(x, d, short, input_precision=PRECISION)
                d_ptrs += BLOCK_K
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * stride_wk
        row_mask, column_mask = rows < end, columns < N
        if u_ptr is not None:
            u_ptrs = u_ptr + own * R * N + ranks[:, None] * N + columns[None, :]
            t_ptrs = t_ptr + rows[:, None].to(tl.int64) * R + ranks[None, :]
            if d_ptr is not None:
                t = short.to(x_ptr.dtype.element_ty)
                if column == 0:
                    tl.store(t_ptrs, t, mask=row_mask[:, None] & (ranks < R)[None, :])
                u = tl.load(u_ptrs, mask=(ranks < R)[:, None] & column_mask[None, :], other=0.0)
                total = tl.dot(t, u, total, input_precision=PRECISION)
            else:
                for start in tl.range(0, R, BLOCK_R, num_stages=1):
                    rank_mask = ranks < R - start
                    t = tl.load(t_ptrs + start, mask=row_mask[:, None] & rank_mask[None, :], other=0.0)
                    u = tl.load(u_ptrs + start * N, mask=rank_mask[:, None] & column_mask[None, :], other=0.0)
                    total = tl.dot(t, u, total, input_precision=PRECISION)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + own * N + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        tl.store(
            y_ptr + rows[:, None].to(tl.int64) * N + columns[None, :],
            total.to(y_ptr.dtype.element_ty),
            mask=row_mask[:, None] & column_mask[None, :],
        )


class Tile(NamedTuple):
    """Launch configuration of one tile."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def choose_tile(weight: Tensor, choices: int) -> Tile:
    """Of products of this many rows with a weight [E, N, K] and those that follow: one for all, as a tile's rows are
    those of the table."""
    experts, n, k = weight.shape
    each = choices // experts
    wide = weight.element_size() != 2
    return _tile(weight.device, wide, 1 << max(each - 1, 0).bit_length(), n, k)


@functools.cache
def _tile(device: torch.device, wide: bool, each: int, n: int, k: int) -> Tile:
    """The one measured for the nearest shape, else by rule: at most 96 KiB of shared memory."""
    measured = None if wide else device_config.nearest(device_config.of(device).experts_tiles, (each or 1, n, k))
    if measured is not None:
        return Tile(*measured)._replace(m=min(measured[0], max(WARPGROUP, 2 * each)))
    rows = 128 if each > 64 else 64 if each > 32 else 32 if each > 16 else MIN_DOT
    if wide or shared_memory(device) <= SMALL_SHARED_MEMORY:
        return Tile(min(rows, 64), 64 if wide else 128, 32 if wide else 64, 4, 2)
    return Tile(rows, 128, 64, 8 if rows == 128 else 4, 3)


# Multiply-adds of the product up to which t is made beside it: fewer launches and one read of x for R / BLOCK_N more
# arithmetic.
FUSED_RANK_UP_TO = 2**36


def grouped_linear(
    x: Tensor,
    order: Tensor | None,
    tiles: Tensor,
    tile: Tile,
    w: Tensor,
    adapter: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    per_token: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """(y [S, N], t [S, R] or None) in x's dtype, products in float32. x [S, K] by row, or [T, K] with `order` [S], of
    which row r reads x[order[r] // per_token]; tiles as `Rows` has them, of tile.m rows; w [E, N, K] of any strides,
    adapter (D [E, R, K], U [E, R, N]) contiguous, bias [E, N], all in x's dtype."""
    x, (_, n, k) = x.contiguous(), w.shape
    count = (x if order is None else order).shape[0]
    if adapter is None:
        return _launch((x, order), tiles, tile, w, (None, None, None), bias, per_token), None
    d, u = adapter
    rank = d.shape[1]
    if rank > MAX_RANK_BLOCK or count * n * k > FUSED_RANK_UP_TO:
        t, _ = grouped_shrink(x, order, tiles, tile.m, d, per_token)
        return _launch((x, order), tiles, tile, w, (None, u, t), bias, per_token), t
    t = x.new_empty((count, rank))
    return _launch((x, order), tiles, tile, w, (d, u, t), bias, per_token), t


def _launch(source, tiles: Tensor, tile: Tile, w: Tensor, adapter, bias: Tensor | None, per_token: int) -> Tensor:
    (x, order), (d, u, t), (_, n, k) = source, adapter, w.shape
    y = x.new_empty(((x if order is None else order).shape[0], n))
    most, rank = tiles.shape[1], 0 if t is None else t.shape[1]
    given = x, order, w, d, u, t, bias, y, tiles, most, n, k, rank, per_token, *w.stride()
    grid, blocks = _blocks(tile, most, n, k, rank)
    arguments = *given, *blocks, dot_precision(x)
    launch(grouped_linear_kernel, grid, arguments, num_warps=tile.warps, num_stages=tile.stages)
    return y


@functools.lru_cache(SIZES_KEPT)
def _blocks(tile: Tile, most: int, n: int, k: int, rank: int) -> tuple[tuple[int, int, int], tuple]:
    """Grid and constants, but the precision, of so many tiles."""
    columns, depth = min(tile.n, max(MIN_DOT, power_of_2(n))), tile.k
    grid = ceil_div(most, BAND) * BAND * ceil_div(n, columns), 1, 1
    return grid, (tile.m, columns, depth, rank_block(rank), BAND, n % columns == 0, k % depth == 0)
