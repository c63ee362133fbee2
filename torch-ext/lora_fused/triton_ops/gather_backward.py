"""Backward of `gather_add` in one launch: drows = s·e·(g∘dy) B, dB = s·e·(g∘dy)ᵀ rows, and dm.

Bound by dy, M·H elements, and W[i] once more for DoRA. The first programs take blocks of tokens and
run along the hidden dimension (drows); the others take blocks of the hidden dimension and run along the
tokens (dB, dm). Both read dy, at the same time, so the second read finds much of it in L2. Every
sum has one owner: deterministic. Where g∘B is not exact in dy's half type it enters as two parts:
terms of one token's drows may cancel, and a single rounding of B would show.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..table import Table, TableSpec
from .gather_add import own_scale
from .launch import dot_precision, on_device, rank_block


@triton.jit
def _gain(gain_ptr, cols, col_mask, DORA: tl.constexpr):
    if DORA:
        return tl.load(gain_ptr + cols, mask=col_mask, other=0.0)
    else:
        return tl.full(cols.shape, 1.0, tl.float32)


@triton.jit
def _rows_grad(
    block,
    dy_ptr,
    b_ptr,
    gain_ptr,
    drows_ptr,
    on_delta,
    M,
    H,
    R,
    stride_bh,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DORA: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tokens = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = tokens < M
    for start_r in tl.range(0, R, BLOCK_R, num_stages=1):
        ranks = start_r + tl.arange(0, BLOCK_R)
        rank_mask = ranks < R
        total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for start in range(0, H, BLOCK_H):
            cols = start + tl.arange(0, BLOCK_H)
            col_mask = cols < H
            dy = tl.load(dy_ptr + tokens[:, None] * H + cols[None, :], mask=live[:, None] & col_mask[None, :], other=0.0)
            b_at = b_ptr + cols[:, None].to(tl.int64) * stride_bh + ranks[None, :] * stride_br
            b = tl.load(b_at, mask=col_mask[:, None] & rank_mask[None, :], other=0.0).to(tl.float32)
            b *= _gain(gain_ptr, cols, col_mask, DORA)[:, None]
            high = b.to(dy.dtype)
            if IN_PARTS:
                low = (b - high.to(tl.float32)).to(dy.dtype)
                total = tl.dot(dy, low, total, input_precision=PRECISION)
            total = tl.dot(dy, high, total, input_precision=PRECISION)
        tl.store(drows_ptr + tokens[:, None] * R + ranks[None, :], total * on_delta, mask=live[:, None] & rank_mask[None, :])


@triton.jit
def _columns_grad(
    block,
    dy_ptr,
    ids_ptr,
    rows_ptr,
    w_ptr,
    b_ptr,
    gain_ptr,
    norm_ptr,
    db_ptr,
    dm_ptr,
    on_base,
    on_delta,
    M,
    H,
    R,
    stride_wv,
    stride_wh,
    stride_bh,
    stride_br,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DORA: tl.constexpr,
    NEEDS_DB: tl.constexpr,
    NEEDS_DM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
    col_mask = cols < H
    dm = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start_r in tl.range(0, R, BLOCK_R, num_stages=1):
        ranks = start_r + tl.arange(0, BLOCK_R)
        rank_mask = ranks < R
        total = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
        for start in range(0, M, BLOCK_T):
            tokens = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
            live = tokens < M
            dy = tl.load(dy_ptr + tokens[:, None] * H + cols[None, :], mask=live[:, None] & col_mask[None, :], other=0.0)
            rows = tl.load(
                rows_ptr + tokens[:, None] * R + ranks[None, :], mask=live[:, None] & rank_mask[None, :], other=0.0
            )
            total = tl.dot(tl.trans(dy), rows, total, input_precision=PRECISION)
        mask = col_mask[:, None] & rank_mask[None, :]
        if NEEDS_DM:
            b_at = b_ptr + cols[:, None].to(tl.int64) * stride_bh + ranks[None, :] * stride_br
            dm += tl.sum(total * tl.load(b_at, mask=mask, other=0.0).to(tl.float32), 1)
        if NEEDS_DB:
            db = total * on_delta * _gain(gain_ptr, cols, col_mask, DORA)[:, None]
            db_at = db_ptr + cols[:, None].to(tl.int64) * R + ranks[None, :]
            tl.store(db_at, db.to(db_ptr.dtype.element_ty), mask=mask)
    if NEEDS_DM:
        products = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
        for start in range(0, M, BLOCK_T):
            tokens = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
            live = tokens < M
            mask = live[:, None] & col_mask[None, :]
            ids = tl.load(ids_ptr + tokens, mask=live, other=0).to(tl.int64)
            dy = tl.load(dy_ptr + tokens[:, None] * H + cols[None, :], mask=mask, other=0.0)
            w = tl.load(w_ptr + ids[:, None] * stride_wv + cols[None, :] * stride_wh, mask=mask, other=0.0)
            products += dy.to(tl.float32) * w.to(tl.float32)
        norm = tl.load(norm_ptr + cols, mask=col_mask, other=1.0)
        dm = (on_base * tl.sum(products, 0) + on_delta * dm) / norm
        tl.store(dm_ptr + cols, dm.to(dm_ptr.dtype.element_ty), mask=col_mask)


@triton.jit
def gather_backward_bwd_kernel(
    dy_ptr,
    ids_ptr,
    rows_ptr,
    w_ptr,
    b_ptr,
    gain_ptr,
    norm_ptr,
    scale_ptr,
    drows_ptr,
    db_ptr,
    dm_ptr,
    scaling,
    number,
    token_programs,
    M,
    H,
    R,
    stride_wv,
    stride_wh,
    stride_bh,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DORA: tl.constexpr,
    BY_ROWS: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    NEEDS_DB: tl.constexpr,
    NEEDS_DM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    IN_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    on_base = own_scale(scale_ptr, number, w_ptr.dtype.element_ty, HAS_SCALE)
    on_delta = own_scale(scale_ptr, number, b_ptr.dtype.element_ty, HAS_SCALE) * scaling
    pid = tl.program_id(0)
    # Constants around the branches: one whose pointers are None must not even be compiled.
    if BY_ROWS:
        if pid < token_programs:
            _rows_grad(
                pid, dy_ptr, b_ptr, gain_ptr, drows_ptr, on_delta, M, H, R, stride_bh, stride_br,
                BLOCK_M, BLOCK_H, BLOCK_R, DORA, IN_PARTS, PRECISION,
            )  # fmt: skip
    if BY_COLUMNS:
        if pid >= token_programs:
            _columns_grad(
                pid - token_programs, dy_ptr, ids_ptr, rows_ptr, w_ptr, b_ptr, gain_ptr, norm_ptr, db_ptr, dm_ptr,
                on_base, on_delta, M, H, R, stride_wv, stride_wh, stride_bh, stride_br,
                BLOCK_T, BLOCK_C, BLOCK_R, DORA, NEEDS_DB, NEEDS_DM, PRECISION,
            )  # fmt: skip


BLOCK_M = 16
BLOCK_H = 128
BLOCK_T = 64
COLUMNS = (32, 16)  # of a program that runs along the tokens: the fewer, the more programs
FULL = 128  # programs from which the GPU is full


def gather_backward(
    dy: Tensor,
    ids: Tensor,
    rows: Optional[Tensor],
    table: Table,
    spec: TableSpec,
    gain: Optional[Tensor],
    norm: Optional[Tensor],
    needs: Table,
) -> tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """(drows [M, R] in float32, dB, dm) for contiguous dy [M, H] and flat ids [M], as
    `reference_embedding.gather_backward`."""
    weight, lora_a, lora_b, magnitude, scale = table
    (m, h), r = dy.shape, lora_a.shape[0]
    drows = torch.empty((m, r), dtype=torch.float32, device=dy.device) if needs.lora_a else None
    db = torch.empty((h, r), dtype=lora_b.dtype, device=dy.device) if needs.lora_b else None
    dm = torch.empty((h,), dtype=magnitude.dtype, device=dy.device) if needs.magnitude else None
    columns = COLUMNS[0] if triton.cdiv(h, COLUMNS[0]) >= FULL else COLUMNS[1]
    token_programs = triton.cdiv(m, BLOCK_M) if needs.lora_a else 0
    column_programs = triton.cdiv(h, columns) if needs.lora_b or needs.magnitude else 0
    if token_programs + column_programs == 0:
        return drows, db, dm
    with on_device(dy):
        gather_backward_bwd_kernel[(token_programs + column_programs,)](
            dy,
            ids.contiguous(),
            rows,
            weight,
            lora_b,
            gain,
            norm,
            scale,
            drows,
            db,
            dm,
            spec.scaling,
            spec.scale,
            token_programs,
            m,
            h,
            r,
            *weight.stride(),
            *lora_b.stride(),
            BLOCK_M=BLOCK_M,
            BLOCK_H=BLOCK_H,
            BLOCK_T=BLOCK_T,
            BLOCK_C=columns,
            BLOCK_R=rank_block(r),
            DORA=gain is not None,
            BY_ROWS=needs.lora_a,
            BY_COLUMNS=needs.lora_b or needs.magnitude,
            NEEDS_DB=needs.lora_b,
            NEEDS_DM=needs.magnitude,
            HAS_SCALE=scale is not None,
            IN_PARTS=dy.element_size() == 2 and (gain is not None or lora_b.dtype != dy.dtype),
            PRECISION=dot_precision(dy),
            num_warps=4,
            num_stages=4,
        )
    return drows, db, dm
