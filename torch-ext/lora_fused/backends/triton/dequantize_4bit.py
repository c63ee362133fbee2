"""Four-bit weights to floating point: the twin of the native `dequantize_4bit`
(kernel-src/common/four_bit.h has the formula).

Bound by memory: half a byte read and an element written per value, nested absmax in the same pass.
The two values of a byte are joined in registers, so that a program stores one contiguous piece.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...specs import FourBit, Operands
from ..reference import code_4bit
from .launch import on_device, on_values

BLOCK = 2048  # bytes of a program: 16 of each of 128 threads

_code = functools.lru_cache(maxsize=None)(code_4bit)


@triton.jit
def dequantize_4bit_fwd_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    code_ptr,
    out_ptr,
    first,
    count,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = 2 * at < count
    byte = tl.load(packed_ptr + first // 2 + at, mask=inside, other=0).to(tl.int32)
    block = (first + 2 * at) // BLOCKSIZE
    absmax = tl.load(absmax_ptr + block, mask=inside, other=0)
    if NESTED_BLOCKSIZE > 0:
        scale = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=inside, other=0.0)
        absmax = tl.load(nested_code_ptr + absmax.to(tl.int32)) * scale + tl.load(offset_ptr)
    high = tl.load(code_ptr + (byte >> 4)) * absmax
    low = tl.load(code_ptr + (byte & 15)) * absmax
    values = tl.reshape(tl.join(high, low), (2 * BLOCK,))
    to = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out_ptr + to, values.to(out_ptr.dtype.element_ty), mask=to < count)


@on_values
def dequantize_4bit(operands: Operands, quantized: FourBit, first: int, out: Tensor) -> Tensor:
    """Elements [first, first + out.numel()) of the flat weight written to `out` (contiguous float32, bfloat16
    or float16); first is even."""
    if out.numel() == 0:
        return out
    packed, code = operands.weight.detach().view(torch.uint8), _code(quantized.fp4, out.device)
    grid = (triton.cdiv(out.numel(), 2 * BLOCK),)
    # Unfused: bitsandbytes rounds between product and sum.
    options = {"enable_fp_fusion": False} if out.is_cuda else {}
    with on_device(out):
        dequantize_4bit_fwd_kernel[grid](
            packed, operands.absmax, operands.nested_absmax, operands.nested_code, operands.offset, code, out,
            first, out.numel(), BLOCKSIZE=quantized.blocksize, NESTED_BLOCKSIZE=quantized.nested_blocksize,
            BLOCK=BLOCK, **options,
        )  # fmt: skip
    return out
