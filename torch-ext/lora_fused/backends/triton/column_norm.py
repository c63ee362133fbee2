"""Column norm of an adapted table: ‖W + s·(B·A)ᵀ‖ over the vocabulary, one read of W.

Bound by the read of W [V, H]: V·H·2 bytes against 2·V·H·R operations on tensor cores. A program
holds BLOCK_H columns of B and walks through every SPLIT-th block of rows: W's tile is added to s times
A's tile times B, squares are summed element by element in float32 and reduced once. Neighbouring
programs take the same rows, so A comes from L2. The partial sums of the SPLIT walks are combined in
a fixed order: deterministic. A B that is wider than W enters as two parts, since its roundings would
not average out over the vocabulary, as A's do.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dot_precision, on_device, on_values, rank_block


@triton.jit
def _parts(b, dtype: tl.constexpr):
    """b rounded, and what the rounding leaves out."""
    high = b.to(dtype)
    return high, (b.to(tl.float32) - high.to(tl.float32)).to(dtype)


@triton.jit
def column_norm_fwd_kernel(
    w_ptr,
    a_ptr,
    b_ptr,
    partial_ptr,
    scaling,
    V,
    H,
    R,
    stride_wv,
    stride_wh,
    stride_ar,
    stride_av,
    stride_bh,
    stride_br,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    IN_PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype = w_ptr.dtype.element_ty
    cols = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    col_mask = cols < H
    ranks = tl.arange(0, BLOCK_R)
    rank_mask = ranks < R
    b_at = b_ptr + cols[None, :].to(tl.int64) * stride_bh
    if ONE_BLOCK:
        up = tl.load(b_at + ranks[:, None] * stride_br, mask=rank_mask[:, None] & col_mask[None, :], other=0.0)
        high, low = _parts(up, dtype)
    squares = tl.zeros((BLOCK_V, BLOCK_H), dtype=tl.float32)
    # num_stages at the loop: only then is the load of W, no dot's own operand, pipelined as well.
    for start in tl.range(tl.program_id(1) * BLOCK_V, V, tl.num_programs(1) * BLOCK_V, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_V)
        row_mask = rows < V
        w = tl.load(
            w_ptr + rows[:, None].to(tl.int64) * stride_wv + cols[None, :] * stride_wh,
            mask=row_mask[:, None] & col_mask[None, :],
            other=0.0,
        )
        a_at = a_ptr + rows[:, None].to(tl.int64) * stride_av
        if ONE_BLOCK:
            a = tl.load(a_at + ranks[None, :] * stride_ar, mask=row_mask[:, None] & rank_mask[None, :], other=0.0)
            delta = tl.dot(a.to(dtype), high, input_precision=PRECISION)
            if IN_PARTS:
                delta = tl.dot(a.to(dtype), low, delta, input_precision=PRECISION)
        else:
            delta = tl.zeros((BLOCK_V, BLOCK_H), dtype=tl.float32)
            for start_r in tl.range(0, R, BLOCK_R, num_stages=1):
                block = start_r + ranks
                block_mask = block < R
                a = tl.load(
                    a_at + block[None, :].to(tl.int64) * stride_ar,
                    mask=row_mask[:, None] & block_mask[None, :],
                    other=0.0,
                )
                b = tl.load(b_at + block[:, None] * stride_br, mask=block_mask[:, None] & col_mask[None, :], other=0.0)
                high, low = _parts(b, dtype)
                delta = tl.dot(a.to(dtype), high, delta, input_precision=PRECISION)
                if IN_PARTS:
                    delta = tl.dot(a.to(dtype), low, delta, input_precision=PRECISION)
        merged = w.to(tl.float32) + scaling * delta
        squares += merged * merged
    tl.store(partial_ptr + tl.program_id(1) * H + cols, tl.sqrt(tl.sum(squares, 0)), mask=col_mask)


class NormTile(NamedTuple):
    """Launch configuration."""

    v: int
    h: int
    warps: int
    stages: int
    waves: int  # programs a multiprocessor


HALF = NormTile(64, 128, 4, 3, 2)
SINGLE = NormTile(32, 64, 4, 2, 2)  # float32 and the interpreter


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@on_values
def column_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, tile: NormTile | None = None) -> Tensor:
    """‖W + s·(B·A)ᵀ‖ by column for weight [V, H], lora_a [R, V], lora_b [H, R] of any strides: [H] in
    float32. A is rounded to weight's dtype in registers, B to two parts of it."""
    (v, h), r = weight.shape, lora_a.shape[0]
    tile = tile or (HALF if weight.element_size() == 2 and weight.is_cuda else SINGLE)
    blocks = triton.cdiv(h, tile.h)
    split = max(1, min(triton.cdiv(v, tile.v), tile.waves * _multiprocessors(weight.device) // max(blocks, 1)))
    partial = torch.empty((split, h), dtype=torch.float32, device=weight.device)
    block_r = rank_block(r)
    if h > 0:
        with on_device(weight):
            column_norm_fwd_kernel[(blocks, split)](
                weight,
                lora_a,
                lora_b,
                partial,
                scaling,
                v,
                h,
                r,
                *weight.stride(),
                *lora_a.stride(),
                *lora_b.stride(),
                BLOCK_V=tile.v,
                BLOCK_H=tile.h,
                BLOCK_R=block_r,
                ONE_BLOCK=r <= block_r,
                IN_PARTS=weight.element_size() == 2 and lora_b.dtype != weight.dtype,
                STAGES=tile.stages,
                PRECISION=dot_precision(weight),
                num_warps=tile.warps,
            )
    return torch.linalg.vector_norm(partial, dim=0)
