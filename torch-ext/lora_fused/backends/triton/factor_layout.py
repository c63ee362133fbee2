"""Factors of all experts laid out row by row, scaled and rounded once: PEFT stores B with the expert as its fastest
index, of which a product with one expert's matrix would read a sector an element."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, launch

BLOCK_E, BLOCK_L = 32, 64


@triton.jit
def _lay_out(from_ptr, to_ptr, scaling, rank, E, R, L, stride_e, stride_r, stride_l, BLOCK_E: tl.constexpr,
             BLOCK_L: tl.constexpr):  # fmt: skip
    experts = (tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
    columns = (tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    mask = (experts < E)[:, None] & (columns < L)[None, :]
    from_ptrs = from_ptr + experts[:, None] * stride_e + columns[None, :] * stride_l + rank * stride_r
    value = tl.load(from_ptrs, mask=mask, other=0.0).to(tl.float32) * scaling
    tl.store(to_ptr + (experts[:, None] * R + rank) * L + columns[None, :], value.to(to_ptr.dtype.element_ty), mask)


@triton.jit
def lay_out_kernel(
    a_ptr,
    b_ptr,
    laid_a_ptr,
    laid_b_ptr,
    scaling,  # of B
    E,
    R,
    K,
    N,
    stride_ae,
    stride_ar,
    stride_ak,
    stride_be,
    stride_br,
    stride_bn,
    SKIP_A: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(1)
    if row < R:
        _lay_out(b_ptr, laid_b_ptr, scaling, row, E, R, N, stride_be, stride_br, stride_bn, BLOCK_E, BLOCK_L)
    elif not SKIP_A:
        _lay_out(a_ptr, laid_a_ptr, 1.0, row - R, E, R, K, stride_ae, stride_ar, stride_ak, BLOCK_E, BLOCK_L)


def lay_out(a: Tensor, b: Tensor, dtype: torch.dtype, scaling: float) -> tuple[Tensor, Tensor]:
    """(A, scaling · B) in `dtype`, contiguous, of A [E, R, K] and B [E, R, N] of any strides and dtype; A itself where
    it is that."""
    (experts, rank, k), n = a.shape, b.shape[2]
    keeps_a = a.dtype == dtype and a.is_contiguous()
    laid_a = a if keeps_a else torch.empty(a.shape, dtype=dtype, device=a.device)
    laid_b = torch.empty(b.shape, dtype=dtype, device=b.device)
    widest, rows = (n, rank) if keeps_a else (max(k, n), 2 * rank)
    sizes = float(scaling), experts, rank, k, n
    given = a, b, laid_a, laid_b, *sizes, *a.stride(), *b.stride(), keeps_a, BLOCK_E, BLOCK_L
    launch(lay_out_kernel, (ceil_div(widest, BLOCK_L), rows, ceil_div(experts, BLOCK_E)), given, num_warps=4)
    return laid_a, laid_b
