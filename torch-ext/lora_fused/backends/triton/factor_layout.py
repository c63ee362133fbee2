"""A factor of all experts laid out row by row, scaled and rounded once: PEFT stores B with the expert as its fastest
index, of which a product with one expert's matrix would read a sector an element."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device

BLOCK_E, BLOCK_L = 32, 64


@triton.jit
def lay_out_kernel(
    factor_ptr,
    out_ptr,
    scaling,
    E,
    R,
    L,
    stride_e,
    stride_r,
    stride_l,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    rank = tl.program_id(1)
    experts = (tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
    columns = (tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    mask = (experts < E)[:, None] & (columns < L)[None, :]
    from_ptrs = factor_ptr + experts[:, None] * stride_e + columns[None, :] * stride_l + rank * stride_r
    value = tl.load(from_ptrs, mask=mask, other=0.0).to(tl.float32) * scaling
    tl.store(out_ptr + (experts[:, None] * R + rank) * L + columns[None, :], value.to(out_ptr.dtype.element_ty), mask)


def lay_out(factor: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """scaling · factor [E, R, L] in `dtype`, contiguous: the factor itself where it is that."""
    if scaling == 1.0 and factor.dtype == dtype and factor.is_contiguous():
        return factor
    experts, rank, length = factor.shape
    out = torch.empty((experts, rank, length), dtype=dtype, device=factor.device)
    with on_device(factor):
        lay_out_kernel[(triton.cdiv(length, BLOCK_L), rank, triton.cdiv(experts, BLOCK_E))](
            factor,
            out,
            scaling,
            experts,
            rank,
            length,
            *factor.stride(),
            BLOCK_E=BLOCK_E,
            BLOCK_L=BLOCK_L,
            num_warps=4,
        )
    return out
