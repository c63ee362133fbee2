"""Which choice goes where: the choices of tokens in the order of their experts, in two launches without a wait.

A counting sort: one program a block of choices counts them by expert, then one a block gives each its place, from the
counts of all blocks and of those before it. Ties stay in order, so that all that follows is deterministic. Few choices
are one block, which needs the second launch alone. Choices from E on have places behind all others.

`tiles` says of each tile of rows in the grouped products which expert's it is, so that their programs need not look for
it: [3, tiles] with the expert, -1 beyond the last tile, its first row, and the end of the expert's rows. There is room
for the most tiles that there can be.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...call_context import new_tuple
from ..reference.grouped import Rows
from .launch import MIN_DOT, SIZES_KEPT, ceil_div, launch, power_of_2

MOST_IN_ONE = 512  # choices of one program, where there is one; else as many programs as count and are counted fast
PROGRAMS = 128
COMPARISONS = 16384  # of choices with experts at once: 64 a thread
_INT32, _INT64 = torch.int32, torch.int64


@triton.jit
def experts_of(index_ptr, choices, S, E):
    """The expert of each choice, E where it is of none."""
    chosen = tl.load(index_ptr + choices, mask=choices < S, other=E)
    return tl.where((chosen < 0) | (chosen > E), E, chosen).to(tl.int32)


@triton.jit
def count_choices(index_ptr, first, S, E, BLOCK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    """[BLOCK_E]: how many of a block's choices are of each expert, those of none under E."""
    experts = tl.arange(0, BLOCK_E)
    counts = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for start in range(0, BLOCK, CHUNK):
        choices = first + start + tl.arange(0, CHUNK)
        chosen = experts_of(index_ptr, choices, S, E)
        own = (chosen[:, None] == experts[None, :]) & (choices < S)[:, None]
        counts += tl.sum(own.to(tl.int32), 0)
    return counts


@triton.jit
def count_kernel(index_ptr, counts_ptr, S, E, BLOCK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    block = tl.program_id(0)
    counts = count_choices(index_ptr, block * BLOCK, S, E, BLOCK, CHUNK, BLOCK_E)
    tl.store(counts_ptr + block * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(debug=True)
def place_kernel(
    index_ptr,
    counts_ptr,  # [blocks, BLOCK_E], or None where there is one block
    order_ptr,
    place_ptr,
    ends_ptr,
    tiles_ptr,
    S,
    E,
    blocks,
    most,  # tiles
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    block = tl.program_id(0)
    experts, numbers = tl.arange(0, BLOCK_E), tl.arange(0, CHUNK)
    total = tl.zeros((BLOCK_E,), dtype=tl.int32)
    before = tl.zeros((BLOCK_E,), dtype=tl.int32)
    if counts_ptr is None:
        total = count_choices(index_ptr, 0, S, E, BLOCK, CHUNK, BLOCK_E)
    else:
        for start in range(0, blocks, CHUNK):
            each = start + numbers
            counts = tl.load(
                counts_ptr + each[:, None] * BLOCK_E + experts[None, :], mask=(each < blocks)[:, None], other=0
            )
            total += tl.sum(counts, 0)
            before += tl.sum(tl.where((each < block)[:, None], counts, 0), 0)
    ends = tl.cumsum(total, 0)
    starts = ends - total

    tiles = tl.where(experts < E, (total + BLOCK_M - 1) // BLOCK_M, 0)
    tile_ends = tl.cumsum(tiles, 0)
    if block == 0:
        tl.store(ends_ptr + experts, ends, mask=experts < E)
    for start in range(block * CHUNK, most, tl.num_programs(0) * CHUNK):
        each = start + numbers
        expert = tl.sum(((tile_ends[None, :] <= each[:, None]) & (experts < E)[None, :]).to(tl.int32), 1)
        own = experts[None, :] == expert[:, None]
        number = each - tl.sum(tl.where(own, (tile_ends - tiles)[None, :], 0), 1)
        row = tl.sum(tl.where(own, starts[None, :], 0), 1) + number * BLOCK_M
        tl.store(tiles_ptr + each, tl.where(expert < E, expert, -1), mask=each < most)
        tl.store(tiles_ptr + most + each, row, mask=each < most)
        tl.store(tiles_ptr + 2 * most + each, tl.sum(tl.where(own, ends[None, :], 0), 1), mask=each < most)

    base = starts + before
    for start in range(block * BLOCK, tl.minimum(block * BLOCK + BLOCK, S), CHUNK):
        choices = start + numbers
        inside = choices < S
        found = tl.load(index_ptr + choices, mask=inside, other=0)
        tl.device_assert(found >= 0, "negative expert in index")
        chosen = experts_of(index_ptr, choices, S, E)
        own = (chosen[:, None] == experts[None, :]) & inside[:, None]
        earlier = (chosen[:, None] == chosen[None, :]) & (numbers[None, :] < numbers[:, None])
        place = tl.sum(tl.where(own, base[None, :], 0), 1) + tl.sum(earlier.to(tl.int32), 1)
        tl.store(place_ptr + choices, place, mask=inside)
        tl.store(order_ptr + place, choices.to(tl.int64), mask=inside)
        base += tl.sum(own.to(tl.int32), 0)


def most_tiles(choices: int, experts: int, tile_rows: int) -> int:
    """How many tiles there can be."""
    return min(choices, experts) + choices // tile_rows


@functools.lru_cache(SIZES_KEPT)
def _plan(count: int, experts: int, tile_rows: int) -> tuple[int, int, tuple[int, int, int]]:
    """(tiles, programs, (BLOCK, CHUNK, BLOCK_E)) for so many choices."""
    block_e = power_of_2(experts + 1)
    block = MOST_IN_ONE if count <= MOST_IN_ONE else min(MOST_IN_ONE, max(128, power_of_2(ceil_div(count, PROGRAMS))))
    chunk = min(128, max(MIN_DOT, COMPARISONS // block_e))
    return most_tiles(count, experts, tile_rows), ceil_div(count, block), (block, chunk, block_e)


def sort_rows(
    index: Tensor, experts: int, tile_rows: int, leaves_out: bool, backend: str = "", tile: Any = None
) -> Rows:
    """The rows of index [T, k], at least one choice, with their places and the table of tiles of so many rows; backend
    and tile as `Rows` has them."""
    (tokens, per_token), index = index.shape, index.contiguous()
    count = tokens * per_token
    most, blocks, sizes = _plan(count, experts, tile_rows)
    order, place = index.new_empty(count, dtype=_INT64), index.new_empty(count, dtype=_INT32)
    ends, tiles = index.new_empty(experts, dtype=_INT32), index.new_empty((3, most), dtype=_INT32)
    counts = None
    if blocks > 1:
        counts = index.new_empty((blocks, sizes[2]), dtype=_INT32)
        launch(count_kernel, (blocks, 1, 1), (index, counts, count, experts, *sizes), num_warps=8)
    given = index, counts, order, place, ends, tiles, count, experts, blocks, most, tile_rows, *sizes
    launch(place_kernel, (blocks, 1, 1), given, num_warps=8, sanitize_overflow=False)
    return new_tuple(Rows, (order, ends, tokens, per_token, leaves_out, place, tiles, backend, tile))
