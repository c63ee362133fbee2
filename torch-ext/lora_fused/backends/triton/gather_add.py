"""Embedding with the adapter inside: y = e·g∘(W[i] + s·A[:, i]ᵀ Bᵀ), y written once.

Bound by W[i] and y, 2·M·H elements. A program gathers A[:, i]ᵀ once, R scattered elements a token,
and runs along its share of the hidden dimension. An id outside the vocabulary stops the kernel with
a device-side assertion, as it stops torch's own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...specs import EmbeddingOperands, EmbeddingSpec
from .launch import dot_precision, on_device, on_values, rank_block


@triton.jit
def own_scale(scale_ptr, number, dtype, HAS_SCALE: tl.constexpr):
    """e as it multiplies a tensor of `dtype`, in float32."""
    if HAS_SCALE:
        return tl.load(scale_ptr).to(dtype).to(tl.float32)
    else:
        return number


@triton.jit(debug=True)
def gather_add_fwd_kernel(
    ids_ptr,
    w_ptr,
    a_ptr,
    b_ptr,
    gain_ptr,
    scale_ptr,
    y_ptr,
    rows_ptr,
    scaling,
    number,
    M,
    V,
    H,
    R,
    columns,
    stride_wv,
    stride_wh,
    stride_ar,
    stride_av,
    stride_bh,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    KEEP: tl.constexpr,
    DORA: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype = w_ptr.dtype.element_ty
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = tokens < M
    ids = tl.load(ids_ptr + tokens, mask=live, other=0).to(tl.int64)
    tl.device_assert((ids >= 0) & (ids < V), "index out of range in self")
    on_base = own_scale(scale_ptr, number, dtype, HAS_SCALE)
    on_delta = own_scale(scale_ptr, number, b_ptr.dtype.element_ty, HAS_SCALE) * scaling
    first = tl.program_id(1) * columns
    ranks = tl.arange(0, BLOCK_R)
    a_at = a_ptr + ids[:, None] * stride_av

    if KEEP and tl.program_id(1) == 0:
        for start_r in tl.range(0, R, BLOCK_R, num_stages=1):
            block = start_r + ranks
            kept_mask = live[:, None] & (block < R)[None, :]
            kept = tl.load(a_at + block[None, :].to(tl.int64) * stride_ar, mask=kept_mask, other=0.0)
            tl.store(rows_ptr + tokens[:, None] * R + block[None, :], kept.to(dtype), mask=kept_mask)
    if ONE_BLOCK:
        rows_mask = live[:, None] & (ranks < R)[None, :]
        down = tl.load(a_at + ranks[None, :].to(tl.int64) * stride_ar, mask=rows_mask, other=0.0).to(dtype)

    for start in range(first, tl.minimum(first + columns, H), BLOCK_H):
        cols = start + tl.arange(0, BLOCK_H)
        col_mask = cols < H
        mask = live[:, None] & col_mask[None, :]
        w = tl.load(w_ptr + ids[:, None] * stride_wv + cols[None, :] * stride_wh, mask=mask, other=0.0)
        b_at = b_ptr + cols[None, :].to(tl.int64) * stride_bh
        delta = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
        if ONE_BLOCK:
            up = tl.load(b_at + ranks[:, None] * stride_br, mask=(ranks < R)[:, None] & col_mask[None, :], other=0.0)
            delta = tl.dot(down, up.to(dtype), delta, input_precision=PRECISION)
        else:
            for start_r in tl.range(0, R, BLOCK_R, num_stages=1):
                block = start_r + ranks
                rank_mask = block < R
                a = tl.load(
                    a_at + block[None, :].to(tl.int64) * stride_ar,
                    mask=live[:, None] & rank_mask[None, :],
                    other=0.0,
                )
                up = tl.load(b_at + block[:, None] * stride_br, mask=rank_mask[:, None] & col_mask[None, :], other=0.0)
                delta = tl.dot(a.to(dtype), up.to(dtype), delta, input_precision=PRECISION)
        y = w.to(tl.float32) * on_base + delta * on_delta
        if DORA:
            y *= tl.load(gain_ptr + cols, mask=col_mask, other=0.0)[None, :]
        tl.store(y_ptr + tokens[:, None] * H + cols[None, :], y.to(dtype), mask=mask)


BLOCK_M = 16
BLOCK_H = 128
PROGRAMS = 512  # from which the GPU is full


@on_values
def gather_add(
    ids: Tensor, table: EmbeddingOperands, spec: EmbeddingSpec, mag_norm_scale: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(y [*ids.shape, H], rows [M, R] if `keep`), both in the table's dtype."""
    weight, lora_a, lora_b, _, scale = table
    (v, h), r, m = weight.shape, lora_a.shape[0], ids.numel()
    y = torch.empty((*ids.shape, h), dtype=weight.dtype, device=weight.device)
    rows = torch.empty((m, r), dtype=weight.dtype, device=weight.device) if keep else None
    if y.numel() == 0:
        return y, rows
    blocks, block_r = triton.cdiv(m, BLOCK_M), rank_block(r)
    split = max(1, min(triton.cdiv(h, BLOCK_H), PROGRAMS // blocks))
    columns = triton.cdiv(triton.cdiv(h, BLOCK_H), split) * BLOCK_H
    with on_device(weight):
        gather_add_fwd_kernel[(blocks, triton.cdiv(h, columns))](
            ids.contiguous(),
            weight,
            lora_a,
            lora_b,
            mag_norm_scale,
            scale,
            y,
            rows,
            spec.scaling,
            spec.scale,
            m,
            v,
            h,
            r,
            columns,
            *weight.stride(),
            *lora_a.stride(),
            *lora_b.stride(),
            BLOCK_M=BLOCK_M,
            BLOCK_H=BLOCK_H,
            BLOCK_R=block_r,
            ONE_BLOCK=r <= block_r,
            KEEP=keep,
            DORA=mag_norm_scale is not None,
            HAS_SCALE=scale is not None,
            PRECISION=dot_precision(weight),
            num_warps=4,
            num_stages=3,
            sanitize_overflow=False,
        )
    return y, rows
