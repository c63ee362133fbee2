"""The DoRA pass over dy: dy' = g∘dy and Σ dy∘z over tokens, dy and z read once.

Bound by memory: reads of dy and z [M, N] and the write of dy'. Each program owns a block of columns
and every SPLITS-th block of rows; its partial sums are added in a fixed order, so the result is
deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device, on_values

BLOCK_M, BLOCK_N = 32, 128
PROGRAMS = 1024  # about eight for each multiprocessor of a large GPU


@triton.jit
def scale_sum_fwd_kernel(
    dy_ptr,
    z_ptr,
    gain_ptr,
    scaled_ptr,
    partial_ptr,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < N
    mag_norm_scale = tl.load(gain_ptr + cols, mask=col_mask, other=0.0)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(tl.program_id(1) * BLOCK_M, M, tl.num_programs(1) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        at = rows[:, None] * N + cols[None, :]
        mask = (rows < M)[:, None] & col_mask[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(scaled_ptr + at, (dy * mag_norm_scale[None, :]).to(scaled_ptr.dtype.element_ty), mask=mask)
        total += tl.sum(dy * z, axis=0)
    tl.store(partial_ptr + tl.program_id(1) * N + cols, total, mask=col_mask)


@on_values
def scale_sum(dy: Tensor, z: Tensor, mag_norm_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(g∘dy [M, N] in dy's dtype, Σ dy∘z over tokens [N] in float32) for contiguous dy and z [M, N] and
    mag_norm_scale [N] in float32."""
    m, n = dy.shape
    scaled = torch.empty_like(dy)
    columns = triton.cdiv(n, BLOCK_N)
    splits = max(1, min(triton.cdiv(m, BLOCK_M), PROGRAMS // max(columns, 1)))
    partial = torch.empty((splits, n), dtype=torch.float32, device=dy.device)
    if n > 0:
        with on_device(dy):
            scale_sum_fwd_kernel[(columns, splits)](
                dy, z, mag_norm_scale, scaled, partial, m, n, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N
            )
    return scaled, partial.sum(0)
