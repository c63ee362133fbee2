"""out[t] = Σ_k w·y over the rows of each token, which are read once where they are: no permuted copy, no product in
memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device


@triton.jit
def combine_rows_kernel(
    y_ptr,
    weights_ptr,  # [T, k] by choice, or None
    place_ptr,
    ends_ptr,
    out_ptr,
    E,
    N,
    per_token,
    stride_y,
    BLOCK_N: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    count = tl.load(ends_ptr + E - 1)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < N
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for choice in range(0, per_token):
        row = tl.load(place_ptr + token * per_token + choice).to(tl.int64)
        y = tl.load(y_ptr + row * stride_y + columns, mask=mask & (row < count), other=0.0).to(tl.float32)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + token * per_token + choice).to(tl.float32)
            y = tl.where(row < count, y * weight, 0.0)
        total += y
    tl.store(out_ptr + token * N + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


def combine_rows(y: Tensor, weights: Tensor | None, place: Tensor, ends: Tensor, per_token: int, dtype) -> Tensor:
    """out [T, N] in `dtype`, sums in float32, of y [S, N]; place [T·k]: which row a choice is, beyond ends[-1] none;
    weights [T, k] of any float dtype."""
    tokens, n = place.shape[0] // per_token, y.shape[1]
    out = torch.empty((tokens, n), dtype=dtype, device=y.device)
    block = min(1024, triton.next_power_of_2(n))
    with on_device(y):
        combine_rows_kernel[(tokens, triton.cdiv(n, block))](
            y, weights, place, ends, out, ends.shape[0], n, per_token, y.stride(0), BLOCK_N=block, num_warps=4
        )
    return out
