"""dA from the gradient of gathered rows: repeated tokens summed, deterministic, no sort and no atomics.

One program a token looks at all ids: the first token of an id sums the rows of every token with
that id, in order, and writes a column of dA; the others leave. That is M² comparisons against a
sort's many launches, so it serves few tokens; beyond, torch's own sorted scatter does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import embedding as reference_embedding
from .launch import on_device, on_values, rank_block

PAIRWISE_UP_TO = 4096  # tokens
CHUNK = 128


@triton.jit
def scatter_rows_bwd_kernel(
    drows_ptr,
    ids_ptr,
    da_ptr,
    padding,
    M,
    V,
    R,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    token = tl.program_id(0)
    own = tl.load(ids_ptr + token).to(tl.int64)
    earlier = tl.zeros((CHUNK,), dtype=tl.int32)
    for start in range(0, token, CHUNK):
        others = start + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + others, mask=others < token, other=-1).to(tl.int64)
        earlier |= (ids == own).to(tl.int32)
    if (tl.max(earlier, 0) == 0) & (own != padding):
        ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        rank_mask = ranks < R
        total = tl.zeros((CHUNK, BLOCK_R), dtype=tl.float32)
        for start in range(token, M, CHUNK):
            others = start + tl.arange(0, CHUNK)
            ids = tl.load(ids_ptr + others, mask=others < M, other=-1).to(tl.int64)
            total += tl.load(
                drows_ptr + others[:, None].to(tl.int64) * R + ranks[None, :],
                mask=(ids == own)[:, None] & rank_mask[None, :],
                other=0.0,
            )
        column = tl.sum(total, 0).to(da_ptr.dtype.element_ty)
        tl.store(da_ptr + ranks.to(tl.int64) * V + own, column, mask=rank_mask)


@on_values
def scatter_rows(drows: Tensor, ids: Tensor, lora_a: Tensor, padding_idx: int | None) -> Tensor:
    """dA [R, V] in A's dtype from drows [M, R] in float32, as `reference.embedding.scatter_rows`."""
    m, (r, v) = ids.shape[0], lora_a.shape
    if m > PAIRWISE_UP_TO:
        return reference_embedding.scatter_rows(drows, ids, lora_a, padding_idx)
    da = torch.zeros((r, v), dtype=lora_a.dtype, device=lora_a.device)
    if m == 0:
        return da
    block_r = rank_block(r)
    with on_device(drows):
        scatter_rows_bwd_kernel[(m, triton.cdiv(r, block_r))](
            drows,
            ids.contiguous(),
            da,
            -1 if padding_idx is None else padding_idx,
            m,
            v,
            r,
            CHUNK=CHUNK,
            BLOCK_R=block_r,
            num_warps=4,
        )
    return da
