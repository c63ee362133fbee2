"""Factors of all experts laid out row by row, scaled and rounded once, those of both products in one launch: PEFT
stores B with the expert as its fastest index, of which a product with one expert's matrix would read a sector an
element."""

from __future__ import annotations

import triton
import triton.language as tl

from ...call_context import new_tuple
from ...specs import ExpertWeights
from ..reference.grouped import NO_FACTORS, Factors
from .launch import ceil_div, launch

BLOCK_E, BLOCK_L = 32, 64


@triton.jit
def lay_out_row(from_ptr, to_ptr, scaling, row, E, R, L, stride_e, stride_r, stride_l, BLOCK_E: tl.constexpr,
                BLOCK_L: tl.constexpr):  # fmt: skip
    """A block of columns of row `row` of a factor [E, R, L], for a block of experts."""
    if tl.program_id(0) * BLOCK_L < L:
        experts = (tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
        columns = (tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
        mask = (experts < E)[:, None] & (columns < L)[None, :]
        from_ptrs = from_ptr + experts[:, None] * stride_e + columns[None, :] * stride_l + row * stride_r
        value = tl.load(from_ptrs, mask=mask, other=0.0).to(tl.float32) * scaling
        to_ptrs = to_ptr + (experts[:, None] * R + row) * L + columns[None, :]
        tl.store(to_ptrs, value.to(to_ptr.dtype.element_ty), mask)


@triton.jit
def lay_out_kernel(
    from_ptr,
    from1_ptr,  # None from the first factor on that is not there
    from2_ptr,
    from3_ptr,
    to_ptr,
    to1_ptr,
    to2_ptr,
    to3_ptr,
    E,
    scaling,
    R,
    L,
    stride_e,
    stride_r,
    stride_l,
    scaling1,
    R1,
    L1,
    stride_e1,
    stride_r1,
    stride_l1,
    scaling2,
    R2,
    L2,
    stride_e2,
    stride_r2,
    stride_l2,
    scaling3,
    R3,
    L3,
    stride_e3,
    stride_r3,
    stride_l3,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(1)
    if row < R:
        lay_out_row(from_ptr, to_ptr, scaling, row, E, R, L, stride_e, stride_r, stride_l, BLOCK_E, BLOCK_L)
    row -= R
    if from1_ptr is not None:
        if (row >= 0) & (row < R1):
            lay_out_row(from1_ptr, to1_ptr, scaling1, row, E, R1, L1, stride_e1, stride_r1, stride_l1, BLOCK_E, BLOCK_L)
        row -= R1
    if from2_ptr is not None:
        if (row >= 0) & (row < R2):
            lay_out_row(from2_ptr, to2_ptr, scaling2, row, E, R2, L2, stride_e2, stride_r2, stride_l2, BLOCK_E, BLOCK_L)
        row -= R2
    if from3_ptr is not None:
        if row >= 0:
            lay_out_row(from3_ptr, to3_ptr, scaling3, row, E, R3, L3, stride_e3, stride_r3, stride_l3, BLOCK_E, BLOCK_L)


_NO_SIZES = 1.0, 0, 0, 0, 0, 0


def lay_out(up: ExpertWeights, down: ExpertWeights) -> tuple[Factors, Factors]:
    """(A, scaling · B) of both, [E, R, K] and [E, R, N], contiguous and in the weights' dtype, of A [E, R, K] and B
    [E, N, R] of any strides and dtype; A itself where it is that, nothing where there is no adapter."""
    dtype, experts = up.weight.dtype, up.weight.shape[0]
    found, sources, targets, rows, widest = [], [], [], 0, 0
    sizes: list[float] = []
    for _, _, a, b, scaling in (up, down):
        if a is None:
            found.append(NO_FACTORS)
            continue
        (_, n, rank), (by_expert, by_column, by_rank) = b.shape, b.stride()
        laid_a, laid_b = a, b.new_empty((experts, rank, n), dtype=dtype)
        sources.append(b)
        targets.append(laid_b)
        sizes += float(scaling), rank, n, by_expert, by_rank, by_column
        rows, widest = rows + rank, max(widest, n)
        if a.dtype != dtype or not a.is_contiguous():
            k, laid_a = a.shape[2], a.new_empty(a.shape, dtype=dtype)
            sources.append(a)
            targets.append(laid_a)
            sizes += 1.0, rank, k, *a.stride()
            rows, widest = rows + rank, max(widest, k)
        found.append(new_tuple(Factors, (laid_a, laid_b)))
    if sources:
        missing = 4 - len(sources)
        nothing = (None,) * missing
        given = *sources, *nothing, *targets, *nothing, experts, *sizes, *_NO_SIZES * missing, BLOCK_E, BLOCK_L
        grid = ceil_div(widest, BLOCK_L), rows, ceil_div(experts, BLOCK_E)
        launch(lay_out_kernel, grid, given, num_warps=4)
    return found[0], found[1]
