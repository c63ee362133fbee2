"""Down projection: t = s · dropout(x) Aᵀ, one read of x for all ranks up to 64.

Bound by the read of x [M, K]: M·K·2 bytes, against 2·M·K·R operations. A is read in its own
dtype and rounded to x's in registers; sums are float32. The dropout mask is drawn at the load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...specs import Mask
from .launch import dot_precision, on_device, on_values, rank_block, shared_memory
from .mask import arguments, dropped


@triton.jit(do_not_specialize=["threshold"])
def down_fwd_kernel(
    x_ptr,
    a_ptr,
    t_ptr,
    scaling,
    M,
    K,
    R,
    stride_xm,
    stride_ar,
    stride_ak,
    stride_tm,
    seed_ptr,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask = rows < M
    rank_mask = ranks < R
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        col_mask = cols < K
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + cols[None, :],
            mask=row_mask[:, None] & col_mask[None, :],
            other=0.0,
        )
        if HAS_MASK:
            x = dropped(x.to(tl.float32), seed_ptr, threshold, keep_scale, rows, start, BLOCK_K).to(x.dtype)
        a = tl.load(
            a_ptr + ranks[None, :].to(tl.int64) * stride_ar + cols[:, None].to(tl.int64) * stride_ak,
            mask=rank_mask[None, :] & col_mask[:, None],
            other=0.0,
        )
        acc = tl.dot(x, a.to(x.dtype), acc, input_precision=PRECISION)
    acc *= scaling
    tl.store(
        t_ptr + rows[:, None] * stride_tm + ranks[None, :],
        acc.to(t_ptr.dtype.element_ty),
        mask=row_mask[:, None] & rank_mask[None, :],
    )


STAGES = 3


def choose_tile(x: Tensor, a: Tensor) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_K): rows so that about a hundred programs share the GPU, and as many columns
    as let STAGES tiles of x and A fit into its shared memory: bytes in flight set the speed."""
    m = x.shape[0]
    block_m = 64 if m >= 8192 else 32 if m >= 4096 else 16
    block_k = 256
    column_bytes = block_m * x.element_size() + rank_block(a.shape[0]) * a.element_size()
    while block_k > 32 and STAGES * block_k * column_bytes > shared_memory(x.device):
        block_k //= 2
    return block_m, block_k


@on_values
def shrink(x: Tensor, a: Tensor, scaling: float, dtype: torch.dtype | None = None, mask: Mask | None = None) -> Tensor:
    """t = s · dropout(x) aᵀ for x [M, K] (rows contiguous) and a [R, K] of any strides: [M, R] in x's
    dtype, which `dtype` is wherever this backend is chosen; the adapter is never copied.
    """
    m, k = x.shape
    r = a.shape[0]
    t = torch.empty((m, r), dtype=x.dtype, device=x.device)
    if m == 0:
        return t
    block_m, block_k = choose_tile(x, a)
    block_r = rank_block(r)
    grid = (triton.cdiv(m, block_m), triton.cdiv(r, block_r))
    with on_device(x):
        down_fwd_kernel[grid](
            x,
            a,
            t,
            scaling,
            m,
            k,
            r,
            x.stride(0),
            a.stride(0),
            a.stride(1),
            t.stride(0),
            *arguments(mask),
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            BLOCK_R=block_r,
            HAS_MASK=mask is not None,
            PRECISION=dot_precision(x),
            num_warps=4,
            num_stages=STAGES,
        )
    return t
