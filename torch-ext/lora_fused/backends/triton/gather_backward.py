"""Backward of `gather_add`: two library products over dy, and for DoRA a pass over dy and W[i].

    drows = s·e·dy (g∘B)      dB = s·e·g∘(dyᵀ rows)      dm = (e·Σ dy∘W[i] + s·e·Σ_r (dyᵀ rows)∘B) / norm

Bound by dy, M·H elements, read once by each; the products' second operands have a rank's width and sums
are float32. Where g∘B is not exact in dy's half type it enters as two parts side by side: terms of one
token's drows may cancel, and a single rounding of B would show. Sums have a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...specs import EmbeddingOperands, EmbeddingSpec
from ..reference.embedding import own_scale
from .launch import on_device, on_values

BLOCK_M, BLOCK_H = 32, 128
PROGRAMS = 1024  # about eight for each multiprocessor of a large GPU


@triton.jit
def base_sum_bwd_kernel(
    dy_ptr, ids_ptr, w_ptr, partial_ptr, M, H, stride_wv, stride_wh, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    col_mask = cols < H
    total = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    for start in range(tl.program_id(1) * BLOCK_M, M, tl.num_programs(1) * BLOCK_M):
        tokens = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        live = tokens < M
        mask = live[:, None] & col_mask[None, :]
        ids = tl.load(ids_ptr + tokens, mask=live, other=0).to(tl.int64)
        dy = tl.load(dy_ptr + tokens[:, None] * H + cols[None, :], mask=mask, other=0.0)
        w = tl.load(w_ptr + ids[:, None] * stride_wv + cols[None, :] * stride_wh, mask=mask, other=0.0)
        total += dy.to(tl.float32) * w.to(tl.float32)
    tl.store(partial_ptr + tl.program_id(1) * H + cols, tl.sum(total, 0), mask=col_mask)


def _base_sum(dy: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """Σ dy∘W[i] over tokens: [H] in float32."""
    m, h = dy.shape
    columns = triton.cdiv(h, BLOCK_H)
    splits = max(1, min(triton.cdiv(m, BLOCK_M), PROGRAMS // max(columns, 1)))
    partial = torch.empty((splits, h), dtype=torch.float32, device=dy.device)
    if h > 0:
        with on_device(dy):
            base_sum_bwd_kernel[(columns, splits)](
                dy, ids.contiguous(), weight, partial, m, h, *weight.stride(), BLOCK_M=BLOCK_M, BLOCK_H=BLOCK_H
            )
    return partial.sum(0)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left right in float32, of matrices of one dtype."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


@on_values
def gather_backward(
    dy: Tensor,
    ids: Tensor,
    rows: Tensor | None,
    table: EmbeddingOperands,
    spec: EmbeddingSpec,
    mag_norm_scale: Tensor | None,
    norm: Tensor | None,
    needs: EmbeddingOperands,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(drows [M, R] in float32, dB, dm) for contiguous dy [M, H] and flat ids [M], as
    `reference.embedding.gather_backward`."""
    weight, _, lora_b, magnitude, _ = table
    drows = db = dm = None
    on_delta = _own_scale(table, spec, lora_b.dtype) * spec.scaling
    if needs.lora_a:
        drows = _rows_grad(dy, lora_b, mag_norm_scale) * on_delta
    if needs.lora_b or needs.magnitude:
        outer = _product(dy.t(), rows)
    if needs.lora_b:
        db = (outer if mag_norm_scale is None else outer * mag_norm_scale[:, None]) * on_delta
        db = db.to(lora_b.dtype)
    if needs.magnitude:
        base = _base_sum(dy, ids, weight) * _own_scale(table, spec, weight.dtype)
        dm = ((base + on_delta * (outer * lora_b).sum(1)) / norm).to(magnitude.dtype)
    return drows, db, dm


def _own_scale(table: EmbeddingOperands, spec: EmbeddingSpec, dtype: torch.dtype):
    """e as it multiplies a tensor of `dtype`, in float32 where it is a tensor."""
    scale = own_scale(table, spec, dtype)
    return scale.float() if isinstance(scale, Tensor) else scale


def _rows_grad(dy: Tensor, lora_b: Tensor, mag_norm_scale: Tensor | None) -> Tensor:
    """dy (g∘B) in float32."""
    if mag_norm_scale is None and lora_b.dtype == dy.dtype:
        return _product(dy, lora_b)
    up = lora_b.float() if mag_norm_scale is None else lora_b.float() * mag_norm_scale[:, None]
    if dy.dtype == torch.float32:
        return _product(dy, up)
    high = up.to(dy.dtype)
    both = _product(dy, torch.cat((high, (up - high.float()).to(dy.dtype)), 1))
    rank = lora_b.shape[1]
    return both[:, :rank] + both[:, rank:]
