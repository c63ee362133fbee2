"""GEMM with the LoRA term inside: y = x Wᵀ + t Uᵀ + b, one accumulator, y written once.

The rank-R product runs as extra K-steps of the tile's own loop, so it costs R/K of the base
product and no second pass over y. The backward is the same kernel: dx = dy W + dropout(dt A), with W
and A read transposed, added to the dx of other projections where there is one. For DoRA the kernel
writes z = x Wᵀ + t Uᵀ and y = g∘z + b from one accumulator. x and W come through tensor descriptors (bulk tensor copies
on Hopper and later, plain loads below) where base address and row stride are multiples of 16 bytes, and through
pointers elsewhere.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...specs import Mask
from .. import device_config, reference
from .launch import dot_precision, on_device, on_values, rank_block, shared_memory
from .mask import arguments, dropped

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton without tensor descriptors: every load goes through pointers
    TensorDescriptor = None


@triton.jit
def _add_lora(
    acc, t_ptr, u_ptr, rows, cols, row_mask, col_mask, R, stride_tm, stride_un, stride_ur,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + t Uᵀ."""
    # Not pipelined: one or two steps for common ranks, and stages of a float32 U would not fit.
    for start_r in tl.range(0, R, BLOCK_R, num_stages=1):
        ranks = start_r + tl.arange(0, BLOCK_R)
        rank_mask = ranks < R
        t = tl.load(
            t_ptr + rows[:, None] * stride_tm + ranks[None, :],
            mask=row_mask[:, None] & rank_mask[None, :],
            other=0.0,
        )
        u = tl.load(
            u_ptr + cols[None, :] * stride_un + ranks[:, None].to(tl.int64) * stride_ur,
            mask=col_mask[None, :] & rank_mask[:, None],
            other=0.0,
        )
        acc = tl.dot(t, u.to(t.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["threshold"])
def linear_expand_kernel(
    x_ptr,
    w_ptr,
    t_ptr,
    u_ptr,
    bias_ptr,
    gain_ptr,
    z_ptr,
    y_ptr,
    scaling,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_wn,
    stride_wk,
    stride_tm,
    stride_un,
    stride_ur,
    stride_ym,
    seed_ptr,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    X_DESCRIPTOR: tl.constexpr,
    W_DESCRIPTOR: tl.constexpr,
    W_ROWS_ARE_N: tl.constexpr,
    HAS_LORA: tl.constexpr,
    IS_SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ADD_TO_Y: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Programs in bands of GROUP_M row blocks: neighbours share W tiles in L2.
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    band = pid // (GROUP_M * blocks_n)
    first_m = band * GROUP_M
    band_m = tl.minimum(blocks_m - first_m, GROUP_M)
    within = pid - band * GROUP_M * blocks_n
    start_m = (first_m + within % band_m) * BLOCK_M
    start_n = (within // band_m) * BLOCK_N

    rows = start_m.to(tl.int64) + tl.arange(0, BLOCK_M)
    cols = start_n.to(tl.int64) + tl.arange(0, BLOCK_N)
    row_mask = rows < M
    col_mask = cols < N

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if IS_SCALED:  # first, so that one accumulator serves both products
        acc = _add_lora(
            acc, t_ptr, u_ptr, rows, cols, row_mask, col_mask, R, stride_tm, stride_un, stride_ur, BLOCK_R, PRECISION
        )
        acc *= scaling
    for start_k in range(0, K, BLOCK_K):
        inner = start_k + tl.arange(0, BLOCK_K)
        inner_mask = inner < K
        if X_DESCRIPTOR:
            x = x_ptr.load([start_m, start_k])
        else:
            x = tl.load(
                x_ptr + rows[:, None] * stride_xm + inner[None, :],
                mask=row_mask[:, None] & inner_mask[None, :],
                other=0.0,
            )
        if W_DESCRIPTOR and W_ROWS_ARE_N:
            w = w_ptr.load([start_n, start_k]).T
        elif W_DESCRIPTOR:
            w = w_ptr.load([start_k, start_n])
        else:
            w = tl.load(
                w_ptr + cols[None, :] * stride_wn + inner[:, None].to(tl.int64) * stride_wk,
                mask=col_mask[None, :] & inner_mask[:, None],
                other=0.0,
            )
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    if HAS_LORA and not IS_SCALED:
        lora = acc
        if HAS_MASK:  # a sum of its own, since only this term is dropped
            lora = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        lora = _add_lora(
            lora, t_ptr, u_ptr, rows, cols, row_mask, col_mask, R, stride_tm, stride_un, stride_ur, BLOCK_R, PRECISION
        )
        if HAS_MASK:
            acc += dropped(lora, seed_ptr, threshold, keep_scale, rows, start_n, BLOCK_N)
        else:
            acc = lora

    at = rows[:, None] * stride_ym + cols[None, :]
    tile_mask = row_mask[:, None] & col_mask[None, :]
    if HAS_GAIN:
        tl.store(z_ptr + at, acc.to(z_ptr.dtype.element_ty), mask=tile_mask)
        acc *= tl.load(gain_ptr + cols, mask=col_mask, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if ADD_TO_Y:
        acc += tl.load(y_ptr + at, mask=tile_mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=tile_mask)


class Tile(NamedTuple):
    """Launch configuration of one tile."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


LARGE_SHARED_MEMORY = 200 * 1024  # Hopper and Blackwell data centre parts: 227 KiB for a block
_HALF_LARGE = Tile(128, 256, 64, 8, 3)  # 48 KiB of x and W a stage
_HALF_MASKED = Tile(128, 128, 64, 8, 3)  # two accumulators and the mask's words in registers
_HALF_NARROW = Tile(64, 128, 64, 4, 4)  # few rows: more programs, each with less to wait for
_HALF_SMALL = Tile(128, 128, 32, 4, 3)  # 48 KiB in all: fits every GPU since compute capability 8.0
_SINGLE = Tile(64, 64, 32, 4, 2)  # float32 and the interpreter


def choose_tile(x: Tensor, n: int, masked: bool = False) -> Tile:
    """Tile for x [M, K] times [K, n] on its device."""
    if x.element_size() != 2 or not x.is_cuda:
        return _SINGLE
    m, k = x.shape
    return _half_tile(x.device, _bucket(m), _bucket(n), _bucket(k), masked)


def _bucket(size: int) -> int:
    """The next power of two, so that few shapes are looked up anew."""
    return 1 << max(size - 1, 0).bit_length()


@functools.cache
def _half_tile(device: torch.device, m: int, n: int, k: int, masked: bool) -> Tile:
    """The one measured for the nearest shape, without a mask; else by rule."""
    measured = None if masked else device_config.nearest(device_config.of(device).linear_expand_tiles, (m, n, k))
    if measured is not None:
        return Tile(*measured)
    if shared_memory(device) < LARGE_SHARED_MEMORY:
        return _HALF_SMALL
    if m <= 512:
        return _HALF_NARROW
    return _HALF_MASKED if masked else _HALF_LARGE


def _descriptor_fits(matrix: Tensor) -> bool:
    bytes_per_row = matrix.stride(0) * matrix.element_size()
    return (
        TensorDescriptor is not None
        and matrix.stride(1) == 1
        and matrix.data_ptr() % 16 == 0
        and bytes_per_row % 16 == 0
        and min(matrix.shape) > 0
    )


@on_values
def linear_expand(
    x: Tensor,
    weight: Tensor,
    t: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Mask | None = None,
    out: Tensor | None = None,
    *,
    scaling: float = 1.0,
    descriptors: bool = True,
    tile: Tile | None = None,
) -> Tensor:
    """y = x weightᵀ + dropout(scaling · t upᵀ) + bias: [M, N] in x's dtype, summed in float32; with a mask the scaling
    is 1. With `out` [M, N], contiguous, the sum is added to it, in place.

    x [M, K] and t [M, R] with contiguous rows, weight [N, K] in x's dtype, contiguous or the
    transpose of a contiguous matrix, up [N, R] of any strides and dtype. `descriptors=False`
    reads everything through pointers; `tile` is the one to run instead of the chosen one.
    """
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device) if out is None else out
    lora = t, up, scaling
    _launch(x, weight, lora, bias, y, mask=mask, add=out is not None, descriptors=descriptors, tile=tile)
    return y


@on_values
def linear_expand_scaled(
    x: Tensor, weight: Tensor, t: Tensor | None, up: Tensor | None, mag_norm_scale: Tensor, bias: Tensor | None = None,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, z) with z = x weightᵀ + scaling · t upᵀ and y = mag_norm_scale∘z + bias, mag_norm_scale [N] in float32; z of
    an x in float16 in float32, as in `reference.linear_expand_scaled`; else as `linear_expand`."""
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype
    y, z = (torch.empty((x.shape[0], weight.shape[0]), dtype=dtype, device=x.device) for dtype in (x.dtype, wide))
    _launch(x, weight, (t, up, scaling), bias, y, scaled=(mag_norm_scale, z))
    return y, z


@on_values
def linear_expand_dropped(
    x: Tensor, d: Tensor, weight: Tensor, t: Tensor, up: Tensor, mag_norm_scale: Tensor, bias: Tensor | None = None,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, z) with z = d weightᵀ + s·t upᵀ and y = x weightᵀ + s·t upᵀ + bias + (mag_norm_scale - 1)∘z for the scaling
    s, nothing of y rounded before the mag_norm_scale, as in `reference.linear_expand_dropped`; else as
    `linear_expand_scaled`."""
    if x.dtype == torch.float16:  # which may not hold g∘U
        return reference.linear_expand_dropped(x, d, weight, t, up, mag_norm_scale, bias, scaling)
    y, z = linear_expand_scaled(d, weight, None, None, mag_norm_scale - 1, bias)
    y = linear_expand(x, weight, t, up * mag_norm_scale[:, None], out=y, scaling=scaling)
    return y, z.addmm_(t, up.to(t.dtype).t(), alpha=scaling)


def _launch(
    x, weight, lora, bias, y, *, mask=None, add=False, scaled=(None, None), descriptors=True, tile=None
) -> None:
    (m, k), n, (t, up, scaling) = x.shape, weight.shape[0], lora
    if m == 0 or n == 0:
        return
    tile = tile or choose_tile(x, n, mask is not None)
    rows_are_n = weight.stride(1) == 1
    stored = weight if rows_are_n else weight.t()
    x_descriptor = descriptors and _descriptor_fits(x)
    w_descriptor = descriptors and _descriptor_fits(stored)
    x_arg = TensorDescriptor.from_tensor(x, [tile.m, tile.k]) if x_descriptor else x
    w_block = [tile.n, tile.k] if rows_are_n else [tile.k, tile.n]
    w_arg = TensorDescriptor.from_tensor(stored, w_block) if w_descriptor else weight
    grid = (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)
    r = 0 if t is None else t.shape[1]
    mag_norm_scale, z = scaled
    with on_device(x):
        linear_expand_kernel[grid](
            x_arg,
            w_arg,
            t,
            up,
            bias,
            mag_norm_scale,
            z,
            y,
            scaling,
            m,
            n,
            k,
            r,
            x.stride(0),
            weight.stride(0),
            weight.stride(1),
            0 if t is None else t.stride(0),
            0 if up is None else up.stride(0),
            0 if up is None else up.stride(1),
            y.stride(0),
            *arguments(mask),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            BLOCK_R=rank_block(max(r, 1)),
            GROUP_M=8,
            X_DESCRIPTOR=x_descriptor,
            W_DESCRIPTOR=w_descriptor,
            W_ROWS_ARE_N=rows_are_n,
            HAS_LORA=t is not None,
            IS_SCALED=t is not None and scaling != 1.0,
            HAS_BIAS=bias is not None,
            HAS_GAIN=mag_norm_scale is not None,
            HAS_MASK=mask is not None,
            ADD_TO_Y=add,
            PRECISION=dot_precision(x),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
