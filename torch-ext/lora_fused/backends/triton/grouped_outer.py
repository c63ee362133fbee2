"""x_eᵀ y_e for each expert e, over rows that are sorted by expert: the gradients of an adapter's factors.

One program makes one expert's tile and goes through its rows in order: deterministic, without a wait for where they
end, and zero where there are none. Either operand may be gathered as it is loaded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MIN_DOT, dot_precision, on_device


@triton.jit
def grouped_outer_kernel(
    x_ptr,
    y_ptr,
    x_order_ptr,
    y_order_ptr,
    out_ptr,
    ends_ptr,
    M,
    N,
    per_token,
    stride_x,
    stride_y,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.program_id(2)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    ms = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, end, BLOCK_S):
        rows = first + tl.arange(0, BLOCK_S)
        mask = rows < end
        x_rows, y_rows = rows.to(tl.int64), rows.to(tl.int64)
        if x_order_ptr is not None:
            x_rows = tl.load(x_order_ptr + rows, mask=mask, other=0) // per_token
        if y_order_ptr is not None:
            y_rows = tl.load(y_order_ptr + rows, mask=mask, other=0) // per_token
        x = tl.load(x_ptr + x_rows[None, :] * stride_x + ms[:, None], mask=mask[None, :] & (ms < M)[:, None], other=0.0)
        y = tl.load(y_ptr + y_rows[:, None] * stride_y + ns[None, :], mask=mask[:, None] & (ns < N)[None, :], other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    tl.store(
        out_ptr + expert.to(tl.int64) * M * N + ms[:, None] * N + ns[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(ms < M)[:, None] & (ns < N)[None, :],
    )


def grouped_outer(
    x: Tensor, y: Tensor, ends: Tensor, x_order: Tensor | None, y_order: Tensor | None, per_token: int
) -> Tensor:
    """[E, M, N] in x's dtype, sums in float32: of x [S, M] and y [S, N] by row, or by token with an order [S]."""
    m, n, experts = x.shape[1], y.shape[1], ends.shape[0]
    x, y = (each if each.stride(1) == 1 else each.contiguous() for each in (x, y))
    out = torch.empty((experts, m, n), dtype=x.dtype, device=x.device)
    block_m, block_n = (min(128, max(MIN_DOT, triton.next_power_of_2(size))) for size in (m, n))
    with on_device(x):
        grouped_outer_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, block_n), experts)](
            x,
            y,
            x_order,
            y_order,
            out,
            ends,
            m,
            n,
            per_token,
            x.stride(0),
            y.stride(0),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_S=32,
            PRECISION=dot_precision(x),
            num_warps=4,
        )
    return out
