"""Gated activation h = f(g)·u and its backward, one pass over the projections each.

Bound by traffic: the forward reads g and u and writes h, the backward reads dh, g and u and
writes dg, du and, for the down projection's gradient, h again. float32 inside, one rounding.
Formulas are those of `reference.activations`. Each program reads its elements before it writes them, so
results may take the place of operands.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.activations import TANH_CUBIC, TANH_SATURATED, TANH_SCALE
from .launch import on_device, on_values

_CUBIC = tl.constexpr(TANH_CUBIC)
_SATURATED = tl.constexpr(TANH_SATURATED)
_TWICE_SCALE = tl.constexpr(2.0 * TANH_SCALE)
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))

BLOCK = 1024  # columns of one row: 16 bytes a thread and tensor in half precision


@triton.jit
def value_and_slope(g, ACTIVATION: tl.constexpr):
    """(f(g), f'(g)) in float32."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(g)
        value = g * sigmoid
        slope = sigmoid * (1.0 + g * (1.0 - sigmoid))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(g * _SQRT_HALF))
        value = g * cdf
        slope = cdf + g * _DENSITY * tl.exp(-0.5 * g * g)
    elif ACTIVATION == "gelu_tanh":
        near = tl.minimum(tl.maximum(g, -_SATURATED), _SATURATED)
        square = near * near
        exponent = _TWICE_SCALE * near * (1.0 + _CUBIC * square)
        exponent_slope = _TWICE_SCALE * (1.0 + 3.0 * _CUBIC * square)
        sigmoid = tl.sigmoid(exponent)
        value = g * sigmoid
        slope = sigmoid * (1.0 + g * exponent_slope * tl.sigmoid(-exponent))
    elif ACTIVATION == "relu":
        value = tl.where(g <= 0.0, 0.0, g)  # NaN stays, which a maximum would lose
        slope = tl.where(g <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.where(g <= 0.0, 0.0, g)
        value = positive * positive
        slope = 2.0 * positive
    return value, slope


@triton.jit
def gated_fwd_kernel(
    gate_ptr,
    up_ptr,
    h_ptr,
    I,
    stride_gate,
    stride_up,
    stride_h,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(I, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < I
    gate = tl.load(gate_ptr + row * stride_gate + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + cols, mask=mask, other=0.0).to(tl.float32)
    value, _ = value_and_slope(gate, ACTIVATION)
    tl.store(h_ptr + row * stride_h + cols, (value * up).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_bwd_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    h_ptr,
    dgate_ptr,
    dup_ptr,
    I,
    stride_dh,
    stride_gate,
    stride_up,
    stride_h,
    stride_dgate,
    stride_dup,
    ACTIVATION: tl.constexpr,
    NEED_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(I, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < I
    dh = tl.load(dh_ptr + row * stride_dh + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + cols, mask=mask, other=0.0).to(tl.float32)
    value, slope = value_and_slope(gate, ACTIVATION)
    if NEED_H:
        tl.store(h_ptr + row * stride_h + cols, (value * up).to(h_ptr.dtype.element_ty), mask=mask)
    dgate = slope * up * dh
    tl.store(dgate_ptr + row * stride_dgate + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * stride_dup + cols, (value * dh).to(dup_ptr.dtype.element_ty), mask=mask)


@on_values
def gated(gate: Tensor, up: Tensor, activation: str, *, out: Tensor | None = None) -> Tensor:
    """h = f(gate)·up for gate and up [M, I] with contiguous rows of any row stride: [M, I] in gate's
    dtype, into `out` (contiguous rows; it may be gate or up) where given."""
    m, i = gate.shape
    h = torch.empty((m, i), dtype=gate.dtype, device=gate.device) if out is None else out
    if gate.numel() == 0:
        return h
    with on_device(gate):
        gated_fwd_kernel[(m * triton.cdiv(i, BLOCK),)](
            gate,
            up,
            h,
            i,
            gate.stride(0),
            up.stride(0),
            h.stride(0),
            ACTIVATION=activation,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return h


@on_values
def gated_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    need_h: bool = True,
    *,
    dgate: Tensor | None = None,
    dup: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(h, dgate, dup) as `activations.gated_backward`, one pass; h is None unless needed.

    dh, gate and up are [M, I] with contiguous rows of any row stride; so are `dgate` and `dup`,
    which receive the gradients where given: the two halves of one [M, 2I], or gate and up.
    """
    m, i = gate.shape

    def fresh() -> Tensor:
        return torch.empty((m, i), dtype=gate.dtype, device=gate.device)

    h = fresh() if need_h else None
    dgate = fresh() if dgate is None else dgate
    dup = fresh() if dup is None else dup
    if gate.numel() == 0:
        return h, dgate, dup
    with on_device(gate):
        gated_bwd_kernel[(m * triton.cdiv(i, BLOCK),)](
            dh,
            gate,
            up,
            h,
            dgate,
            dup,
            i,
            dh.stride(0),
            gate.stride(0),
            up.stride(0),
            h.stride(0) if need_h else 0,
            dgate.stride(0),
            dup.stride(0),
            ACTIVATION=activation,
            NEED_H=need_h,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return h, dgate, dup
