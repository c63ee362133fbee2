"""The gate of experts and its backward, one pass over the rows each.

    h = f(α·g)/α · (u + c)      dg = w·dh · (u + c) · f'(α·g)      du = w·dh · f(α·g)/α      dot = Σ dh·h

w is the row's routing weight, dh the gradient before it, so that dot is the routing weight's own gradient; both are by
choice, as the router made them. Bound by traffic: the backward reads z and dh and writes h again, for the gradient of
the second product's adapter, dz and dot. float32 inside, one rounding. Formulas are those of `reference.gates`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...specs import Gate
from .gated_act import value_and_slope
from .launch import SIZES_KEPT, ceil_div, launch

BLOCK = 1024  # columns of h that a program takes at once


@triton.jit
def load_gate(z_ptr, columns, mask, I, limit, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, LIMITED: tl.constexpr):
    """(g, u, whether g is kept, whether u is) after the limit, in float32."""
    step: tl.constexpr = 2 if INTERLEAVED else 1
    g = tl.load(z_ptr + step * columns, mask=mask, other=0.0).to(tl.float32)
    u = tl.zeros_like(g)
    if GATED:
        second = z_ptr + (1 if INTERLEAVED else I)
        u = tl.load(second + step * columns, mask=mask, other=0.0).to(tl.float32)
    keeps_g, keeps_u = mask, mask
    if LIMITED:  # a comparison with NaN is false, so NaN stays
        keeps_g, keeps_u = (g > limit) == 0, (tl.abs(u) > limit) == 0
        g = tl.where(keeps_g, g, limit)
        u = tl.where(keeps_u, u, tl.where(u > 0.0, limit, -limit))
    return g, u, keeps_g, keeps_u


@triton.jit
def expert_gate_fwd_kernel(
    z_ptr,
    h_ptr,
    I,
    stride_z,
    limit,
    slope,
    offset,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMITED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < I
    g, u, _, _ = load_gate(z_ptr + row * stride_z, columns, mask, I, limit, GATED, INTERLEAVED, LIMITED)
    value, _ = value_and_slope(g * slope, ACTIVATION)
    h = value / slope
    if GATED:
        h = h * (u + offset)
    tl.store(h_ptr + row * I + columns, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def expert_gate_bwd_kernel(
    z_ptr,
    dh_ptr,
    routing_ptr,  # [T·k] by choice
    order_ptr,
    ends_ptr,
    h_ptr,
    dz_ptr,
    dots_ptr,  # [T·k] by choice
    E,
    I,
    stride_z,
    stride_dh,
    stride_dz,
    limit,
    slope,
    offset,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMITED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(order_ptr + row)
    weight = tl.load(routing_ptr + choice).to(tl.float32)
    step: tl.constexpr = 2 if INTERLEAVED else 1
    dots = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, I, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < I
        dh = tl.load(dh_ptr + row * stride_dh + columns, mask=mask, other=0.0).to(tl.float32)
        g, u, keeps_g, keeps_u = load_gate(z_ptr + row * stride_z, columns, mask, I, limit, GATED, INTERLEAVED, LIMITED)
        value, derivative = value_and_slope(g * slope, ACTIVATION)
        value = value / slope
        factor = tl.full((BLOCK,), 1.0, dtype=tl.float32)
        if GATED:
            factor = u + offset
        h = value * factor
        dots += dh * h
        tl.store(h_ptr + row * I + columns, h.to(h_ptr.dtype.element_ty), mask=mask)
        dh = dh * weight
        dg = tl.where(keeps_g, dh * factor * derivative, 0.0)
        to_g = dz_ptr + row * stride_dz + step * columns
        tl.store(to_g, dg.to(dz_ptr.dtype.element_ty), mask=mask)
        if GATED:
            du = tl.where(keeps_u, dh * value, 0.0)
            to_u = to_g + (1 if INTERLEAVED else I)
            tl.store(to_u, du.to(dz_ptr.dtype.element_ty), mask=mask)
    # Rows of no expert hold what memory held.
    dot = tl.where(row < tl.load(ends_ptr + E - 1), tl.sum(dots, 0), 0.0)
    tl.store(dots_ptr + choice, dot.to(dots_ptr.dtype.element_ty))


def expert_gate(z: Tensor, gate: Gate) -> Tensor:
    """h [S, I] of z [S, 2I], or of z [S, I] where there is no gate; in z's dtype."""
    rows, width = z.shape
    i = width // 2 if gate.gated else width
    h = z.new_empty((rows, i))
    launch(expert_gate_fwd_kernel, (rows, ceil_div(i, BLOCK), 1), (z, h, i, z.stride(0), *_how(gate)), num_warps=4)
    return h


def expert_gate_backward(
    z: Tensor, dh: Tensor, routing: Tensor, order: Tensor, ends: Tensor, gate: Gate, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """(h [S, I], dz of z's shape, dots [T, k] in `dtype`) of contiguous z and dh [S, I], routing [T, k]; order [S] says
    which choice a row is, ends [E] where rows end: of those beyond, dots are zero."""
    h, dz, dots = z.new_empty(dh.shape), z.new_empty(z.shape), z.new_empty(routing.shape, dtype=dtype)
    given = z, dh, routing.contiguous(), order, ends, h, dz, dots, ends.shape[0], dh.shape[1]
    strides = z.stride(0), dh.stride(0), dz.stride(0)
    launch(expert_gate_bwd_kernel, (z.shape[0], 1, 1), (*given, *strides, *_how(gate)), num_warps=4)
    return h, dz, dots


def numbers_of(gate: Gate) -> tuple[float, float, float]:
    """Limit, slope and offset as kernels take them."""
    return 0.0 if gate.limit is None else float(gate.limit), float(gate.slope), float(gate.offset)


@functools.lru_cache(SIZES_KEPT)
def _how(gate: Gate) -> tuple:
    """What both kernels take at their end."""
    return *numbers_of(gate), gate.activation, gate.gated, gate.interleaved, gate.limit is not None, BLOCK
