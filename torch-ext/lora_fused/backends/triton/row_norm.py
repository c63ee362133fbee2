"""DoRA's norm for large ranks: out[n] = ‖W[n] + s·(B·A)[n]‖, B·A only in accumulators.

Bound by the product's 2·N·K·R operations. The steps over ranks of all tiles of one program form
one loop, so the next tile's loads run under this tile's sum of squares. K is split where N alone
cannot fill the GPU; the partial sums are added in a fixed order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device, on_values, shared_memory
from .linear_expand import LARGE_SHARED_MEMORY, TensorDescriptor, _descriptor_fits

BLOCK_N, BLOCK_K, BLOCK_R = 128, 256, 64
HALVES = (torch.bfloat16, torch.float16)


@triton.jit
def row_norm_fwd_kernel(
    w_desc,
    a_desc,
    b_desc,
    partial_ptr,
    scaling,
    N,
    col_tiles,
    tiles_per_split,
    rank_steps,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    start_n = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    first = split * tiles_per_split
    tiles = tl.minimum(tiles_per_split, col_tiles - first)
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for i in range(tiles * rank_steps):
        step = i % rank_steps
        start_k = (first + i // rank_steps) * BLOCK_K
        acc = tl.dot(b_desc.load([start_n, step * BLOCK_R]), a_desc.load([step * BLOCK_R, start_k]), acc)
        if step == rank_steps - 1:
            value = acc * scaling + w_desc.load([start_n, start_k]).to(tl.float32)
            sums += tl.sum(value * value, axis=1)
            acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    rows = start_n + tl.arange(0, BLOCK_N)
    tl.store(partial_ptr + split.to(tl.int64) * N + rows, sums, mask=rows < N)


def row_norm_fits(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether `row_norm` takes these: one tile's W, A and B in shared memory, rows aligned."""
    return (
        weight.dtype in HALVES
        and weight.shape[1] % 8 == 0
        and lora_a.shape[0] % 8 == 0
        and all(_descriptor_fits(t) for t in (weight, lora_a, lora_b))
        and shared_memory(weight.device) >= LARGE_SHARED_MEMORY
    )


def _halves(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B in one half type with the same product.

    What is not one already becomes high and low bfloat16 parts, three terms stacked along the
    rank, the small ones first: each entry keeps 16 bits, a product's error is below 2⁻¹⁶ and
    falls with √R in the norm.
    """
    if lora_a.dtype == lora_b.dtype and lora_a.dtype in HALVES:
        return lora_a, lora_b
    a_high, b_high = lora_a.bfloat16(), lora_b.bfloat16()
    a_low, b_low = (lora_a.float() - a_high).bfloat16(), (lora_b.float() - b_high).bfloat16()
    return torch.cat([a_low, a_high, a_high]), torch.cat([b_high, b_low, b_high], dim=1)


@functools.cache
def _programs(device: torch.device) -> int:
    """Programs that run at once: one a multiprocessor, by its shared memory."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _splits(row_blocks: int, col_tiles: int, programs: int) -> int:
    """Parts of K that finish first: rounds of programs times tiles in each, plus a third of a
    tile for a program's start and end."""

    def cost(splits: int) -> float:
        return triton.cdiv(row_blocks * splits, programs) * (triton.cdiv(col_tiles, splits) + 1 / 3)

    return min(range(1, min(col_tiles, 32) + 1), key=cost)


@on_values
def row_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + s·B·A‖ by row: [N] in float32, from operands that `row_norm_fits`."""
    lora_a, lora_b = _halves(lora_a, lora_b)
    n, k = weight.shape
    row_blocks, col_tiles = triton.cdiv(n, BLOCK_N), triton.cdiv(k, BLOCK_K)
    splits = _splits(row_blocks, col_tiles, _programs(weight.device))
    tiles_per_split = triton.cdiv(col_tiles, splits)
    splits = triton.cdiv(col_tiles, tiles_per_split)
    partial = torch.empty((splits, n), dtype=torch.float32, device=weight.device)
    with on_device(weight):
        row_norm_fwd_kernel[(row_blocks, splits)](
            TensorDescriptor.from_tensor(weight, [BLOCK_N, BLOCK_K]),
            TensorDescriptor.from_tensor(lora_a, [BLOCK_R, BLOCK_K]),
            TensorDescriptor.from_tensor(lora_b, [BLOCK_N, BLOCK_R]),
            partial,
            scaling,
            n,
            col_tiles,
            tiles_per_split,
            triton.cdiv(lora_a.shape[0], BLOCK_R),
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            BLOCK_R=BLOCK_R,
            num_warps=8,
            num_stages=3,
        )
    return partial.sum(0).sqrt_()
