"""Experts for few tokens without a gradient: a product, its adapter and what follows in one launch each, read from the
weights of the experts that are used alone.

    h = gate(x W1ᵀ + (x A1ᵀ) (s1·B1)ᵀ + b1)      y = h W2ᵀ + (h A2ᵀ) (s2·B2)ᵀ + b2      out = Σ_k w·y

Choices are not sorted: a program takes one expert's columns and finds the rows in the index itself, most experts' leave
at once. A tile is made transposed, weights times rows, as warps divide the first side of a product among them: each
would read all weights otherwise. Bound by reading the weights of the used experts once. h [T·k, I] and y [T·k, H'] are
by choice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...specs import ExpertWeights, Gate
from .combine_rows import combine_choices
from .expert_gate import numbers_of
from .gated_act import value_and_slope
from .launch import MAX_RANK_BLOCK, MIN_DOT, ceil_div, dot_precision, launch, power_of_2, rank_block

MOST_TOKENS, MOST_CHOICES = 64, 1024
MANY_EXPERTS = 64
_NONE = 0, 0, 0  # strides of what is not there
# Of a thread, so that three programs share a multiprocessor. What is spilled then is read outside the loop over K.
_REGISTERS = {} if torch.version.hip else {"maxnreg": 168}


@triton.jit
def gate_of(z, limit, slope, offset, ACTIVATION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
            LIMITED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """h of a tile of zᵀ in float32, whose rows are g's and u's, alternating or one after the other."""
    if GATED:
        if INTERLEAVED:
            pairs = tl.permute(tl.reshape(z, (BLOCK_N, 2, BLOCK_M)), (0, 2, 1))
        else:
            pairs = tl.permute(tl.reshape(z, (2, BLOCK_N, BLOCK_M)), (1, 2, 0))
        g, u = tl.split(pairs)
        if LIMITED:  # a comparison with NaN is false, so NaN stays
            g = tl.where(g > limit, limit, g)
            u = tl.where(tl.abs(u) > limit, tl.where(u > 0.0, limit, -limit), u)
        value, _ = value_and_slope(g * slope, ACTIVATION)
        return value / slope * (u + offset)
    else:
        value, _ = value_and_slope(z * slope, ACTIVATION)
        return value / slope


@triton.jit
def few_rows_kernel(
    x_ptr,
    index_ptr,  # [S]: the expert of a choice
    w_ptr,
    a_ptr,
    b_ptr,
    bias_ptr,
    y_ptr,
    scaling,
    S,
    N,  # columns of y
    K,
    R,
    per_token,
    stride_we,
    stride_wn,
    stride_wk,
    stride_ae,
    stride_ar,
    stride_ak,
    stride_be,
    stride_bn,
    stride_br,
    limit,
    slope,
    offset,
    ACTIVATION: tl.constexpr,  # None: no gate follows
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMITED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.program_id(1)
    choices = tl.arange(0, BLOCK_S)
    mine = (tl.load(index_ptr + choices, mask=choices < S, other=-1) == expert).to(tl.int32)
    count = tl.sum(mine, 0)
    number = tl.cumsum(mine, 0) - 1  # of a choice among the expert's
    own = expert.to(tl.int64)
    dtype = x_ptr.dtype.element_ty
    WIDTH: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N  # columns of z
    js = tl.arange(0, WIDTH)
    start_n = tl.program_id(0) * BLOCK_N
    if GATED and INTERLEAVED:
        columns = 2 * start_n + js
        column_mask = columns < 2 * N
    elif GATED:
        columns = start_n + js // BLOCK_N * N + js % BLOCK_N
        column_mask = start_n + js % BLOCK_N < N
    else:
        columns = start_n + js
        column_mask = columns < N
    ks, ranks = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    rank_mask = ranks < R
    for first in range(0, count, BLOCK_M):
        slots = first + tl.arange(0, BLOCK_M)
        picked = (number[None, :] == slots[:, None]) & (mine[None, :] > 0)
        rows = tl.sum(tl.where(picked, choices[None, :], 0), 1)
        row_mask = slots < count
        x_ptrs = x_ptr + (rows // per_token)[None, :].to(tl.int64) * K + ks[:, None]
        w_ptrs = w_ptr + own * stride_we + columns[:, None] * stride_wn + ks[None, :] * stride_wk
        z = tl.zeros((WIDTH, BLOCK_M), dtype=tl.float32)
        short = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.float32)
        if a_ptr is not None:
            a_ptrs = a_ptr + own * stride_ae + ranks[:, None] * stride_ar + ks[None, :] * stride_ak
        for start in range(0, K, BLOCK_K):
            k_mask = (ks < K - start) | EVEN_K
            x = tl.load(x_ptrs, mask=k_mask[:, None] & row_mask[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=column_mask[:, None] & k_mask[None, :], other=0.0)
            z = tl.dot(w, x, z, input_precision=PRECISION)
            if a_ptr is not None:
                a = tl.load(a_ptrs, mask=rank_mask[:, None] & k_mask[None, :], other=0.0)
                short = tl.dot(a.to(dtype), x, short, input_precision=PRECISION)
                a_ptrs += BLOCK_K * stride_ak
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * stride_wk
        if a_ptr is not None:
            b_ptrs = b_ptr + own * stride_be + columns[:, None] * stride_bn + ranks[None, :] * stride_br
            b = tl.load(b_ptrs, mask=column_mask[:, None] & rank_mask[None, :], other=0.0).to(tl.float32) * scaling
            z = tl.dot(b.to(dtype), short.to(dtype), z, input_precision=PRECISION)
        if bias_ptr is not None:
            width = 2 * N if GATED else N
            z += tl.load(bias_ptr + own * width + columns, mask=column_mask, other=0.0).to(tl.float32)[:, None]
        if ACTIVATION is not None:
            z = gate_of(z, limit, slope, offset, ACTIVATION, GATED, INTERLEAVED, LIMITED, BLOCK_M, BLOCK_N)
        out = start_n + tl.arange(0, BLOCK_N)
        tl.store(
            y_ptr + rows[None, :].to(tl.int64) * N + out[:, None],
            z.to(y_ptr.dtype.element_ty),
            mask=row_mask[None, :] & (out < N)[:, None],
        )


def fits(choices: int, tokens: int, up: ExpertWeights, down: ExpertWeights, gate) -> bool:
    """Whether experts of these weights are computed here."""
    ranks = [weights.lora_a.shape[1] for weights in (up, down) if weights.lora_a is not None]
    few = 0 < choices <= MOST_CHOICES and tokens <= MOST_TOKENS
    return few and isinstance(gate, Gate) and all(rank <= MAX_RANK_BLOCK for rank in ranks)


def few_rows(x: Tensor, index: Tensor, routing: Tensor, up: ExpertWeights, down: ExpertWeights, gate: Gate) -> Tensor:
    """out [T, H'] in the wider dtype of x and routing; operands as those of `lora_experts`, x in the weights' dtype."""
    index, per_token = index.contiguous(), index.shape[1]
    h = _linear(x.contiguous(), index, up, down.weight.shape[2], per_token, gate)
    y = _linear(h, index, down, down.weight.shape[1], 1, None)
    dtype = torch.promote_types(x.dtype, routing.dtype)
    return combine_choices(y, routing, index, up.weight.shape[0], dtype)


def _linear(x: Tensor, index: Tensor, weights: ExpertWeights, n: int, per_token: int, gate: Gate | None) -> Tensor:
    weight, bias, a, b, scaling = weights
    count, k, rank = index.numel(), weight.shape[2], 0 if a is None else a.shape[1]
    y = torch.empty((count, n), dtype=x.dtype, device=x.device)
    gated = gate is not None and gate.gated
    bias = None if bias is None else bias.contiguous()
    given = x, index, weight, a, b, bias, y, float(scaling), count, n, k, rank, per_token
    strides = (*weight.stride(), *(_NONE if a is None else a.stride()), *(_NONE if b is None else b.stride()))
    numbers = (0.0, 1.0, 0.0) if gate is None else numbers_of(gate)
    how = gate and gate.activation, gated, gated and gate.interleaved, gated and gate.limit is not None
    # Many experts fill the GPU with fewer, wider programs, each of which reads A.
    columns = (128 if min(count, weight.shape[0]) >= MANY_EXPERTS else 64) // (2 if gated else 1)
    depth = 32 if x.element_size() != 2 else 64 if columns * (2 if gated else 1) == 128 else 128
    blocks = max(MIN_DOT, power_of_2(count)), MIN_DOT, columns, depth, rank_block(rank)
    launch(
        few_rows_kernel,
        (ceil_div(n, columns), weight.shape[0], 1),
        (*given, *strides, *numbers, *how, *blocks, k % depth == 0, dot_precision(x)),
        num_warps=4,
        **_REGISTERS,
    )
    return y
