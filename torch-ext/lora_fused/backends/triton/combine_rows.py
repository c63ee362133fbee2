"""out[t] = Σ_k w·y over the rows of each token, which are read once where they are: no permuted copy, no product in
memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, launch, power_of_2


@triton.jit
def combine_rows_kernel(
    y_ptr,
    routing_ptr,  # [T·k] by choice, or None
    place_ptr,  # [T·k]: the row of a choice; None: rows are by choice, and index_ptr has their experts
    index_ptr,
    ends_ptr,
    out_ptr,
    E,
    N,
    PER_TOKEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < N
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for each in tl.static_range(PER_TOKEN):
        choice = token * PER_TOKEN + each
        if place_ptr is not None:
            row = tl.load(place_ptr + choice).to(tl.int64)
            is_there = row < tl.load(ends_ptr + E - 1)
        else:
            row, expert = choice, tl.load(index_ptr + choice)
            is_there = (expert >= 0) & (expert < E)
        # Not `mask & is_there`: of a scalar beside a block Triton's interpreter makes integers, from 3.9 on no mask.
        y = tl.load(y_ptr + row * N + columns, mask=columns < tl.where(is_there, N, 0), other=0.0).to(tl.float32)
        if routing_ptr is not None:
            weight = tl.load(routing_ptr + choice).to(tl.float32)
            y = tl.where(is_there, y * weight, 0.0)
        total += y
    tl.store(out_ptr + token * N + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


def _combine(y: Tensor, routing: Tensor | None, where, experts: int, tokens: int, dtype) -> Tensor:
    y, n = y.contiguous(), y.shape[1]
    out = y.new_empty((tokens, n), dtype=dtype)
    block = min(1024, power_of_2(n))
    routing = None if routing is None else routing.contiguous()
    given = y, routing, *where, out, experts, n, y.shape[0] // tokens, block
    launch(combine_rows_kernel, (tokens, ceil_div(n, block), 1), given, num_warps=4)
    return out


def combine_rows(y: Tensor, routing: Tensor | None, place: Tensor, ends: Tensor, tokens: int, dtype) -> Tensor:
    """out [T, N] in `dtype`, sums in float32, of y [S, N]; place [T·k]: which row a choice is, beyond
    ends[-1] none; routing [T, k] of any float dtype."""
    return _combine(y, routing, (place, None, ends), ends.shape[0], tokens, dtype)


def combine_choices(y: Tensor, routing: Tensor, index: Tensor, experts: int, dtype) -> Tensor:
    """The same of rows that are by choice, those left out whose index [T, k] is of no expert."""
    return _combine(y, routing, (None, index, None), experts, routing.shape[0], dtype)
