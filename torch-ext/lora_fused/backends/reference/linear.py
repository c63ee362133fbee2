"""The formula and its backward in plain PyTorch: the oracle, and the path of CPU tensors.

    y = x Wᵀ + b + (g - 1)∘(d Wᵀ) + g∘(t Bᵀ)        d = dropout(x), t = s·d Aᵀ

Shapes: x [M, K], weight [N, K], bias [N], lora_a [R, K], lora_b [N, R], t and dt [M, R], mag_norm_scale g [N].
The base product runs in x's dtype. The LoRA path runs in `dtype` where one is given (autocast) and
in the adapter's own dtype otherwise, as PEFT computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...specs import FourBit, Mask, Operands
from .. import native

_dispatch_modes, _is_compiling = torch._C._len_torch_dispatch_stack, torch.compiler.is_compiling


def writable(product: Tensor) -> Tensor:
    """A product that is about to be written to: a copy of it where a mode may keep it, as a selective checkpoint does
    for its recomputation. In a graph nothing is written."""
    return product.clone() if _dispatch_modes() and not _is_compiling() else product


def dropout(x: Tensor, mask: Mask, dtype: torch.dtype | None = None) -> Tensor:
    """mask ∘ x / (1 - p) for x [M, K], in `dtype` or x's."""
    return native.dropout(x, mask, dtype or x.dtype)


def shrink(x: Tensor, a: Tensor, scaling: float, dtype: torch.dtype | None = None, mask: Mask | None = None) -> Tensor:
    """t = s · dropout(x) aᵀ for x [M, K] and a [R, K]: [M, R] in `dtype` or a's dtype."""
    dtype = dtype or a.dtype
    x = x.to(dtype) if mask is None else dropout(x, mask, dtype)
    # beta=0: nothing is read of the first argument; s is applied before the one rounding.
    return torch.addmm(x.new_empty((1,)), x, a.to(dtype).t(), beta=0, alpha=scaling)


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
) -> Tensor:
    """y = x weightᵀ + dropout(scaling · t upᵀ) + bias for weight [N, K], t [M, R], up [N, R]: [M, N] in x's
    dtype. With `out` [M, N] the sum is added to it, in place, and no bias is taken."""
    if bias is not None and bias.dtype != x.dtype:
        return _wide(x, weight, t, up, bias, scaling).to(x.dtype)
    y = torch.nn.functional.linear(x, weight, bias) if out is None else out.addmm_(x, weight.t())
    if t is None:
        return y
    up, y = up.to(t.dtype), writable(y) if out is None else y
    if mask is None and t.dtype == y.dtype:
        return y.addmm_(t, up.t(), alpha=scaling)
    delta = t @ up.t()
    return y.add_(delta if mask is None else dropout(delta, mask), alpha=scaling)


def _wide(x: Tensor, weight: Tensor, t: Tensor | None, up: Tensor | None, bias: Tensor | None, scaling: float):
    """`linear_expand` of half-precision products that are summed in float32: a sum may be beyond float16 where they are
    not."""
    rounded = bias is None or bias.dtype == x.dtype
    y = torch.nn.functional.linear(x, weight, bias if rounded else None).float()
    if not rounded:
        y += bias
    return y if t is None else y.add_(t @ up.to(t.dtype).t(), alpha=scaling)


def outer(left: Tensor, right: Tensor, dtype: torch.dtype, mask: Mask | None = None, scaling: float = 1.0) -> Tensor:
    """scaling · leftᵀ dropout(right) for left [M, P] and right [M, Q]: [P, Q] in `dtype`, summed over tokens."""
    wide = torch.promote_types(left.dtype, right.dtype)
    right = right.to(wide) if mask is None else dropout(right, mask, wide)
    left = left.to(wide).t()
    if scaling == 1.0:
        return (left @ right).to(dtype)
    return torch.addmm(right.new_empty((1,)), left, right, beta=0, alpha=scaling).to(dtype)


def scale(z: Tensor, mag_norm_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """z∘g + b for z [M, N] and g [N], multiplied in g's dtype: [M, N] in z's dtype."""
    if bias is None:
        return torch.mul(z, mag_norm_scale, out=torch.empty_like(z))
    return (z * mag_norm_scale + bias).to(z.dtype)


def linear_expand_scaled(
    x: Tensor,
    weight: Tensor,
    t: Tensor,
    up: Tensor,
    mag_norm_scale: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(y, z) with z = x weightᵀ + scaling · t upᵀ and y = z∘g + b, of an x in float16 z in float32: it may leave
    float16's range where g brings y back."""
    if x.dtype != torch.float16:
        return rescale(linear_expand(x, weight, t, up, bias, scaling=scaling), mag_norm_scale, bias)
    y, z = rescale(_wide(x, weight, t, up, bias, scaling), mag_norm_scale, bias)
    return y.to(x.dtype), z


def linear_expand_dropped(
    x: Tensor, d: Tensor, weight: Tensor, t: Tensor, up: Tensor, mag_norm_scale: Tensor, bias: Tensor | None = None,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, z) with z = d weightᵀ + s·t upᵀ and y = x weightᵀ + s·t upᵀ + b + (g - 1)∘z for the scaling s, z as in
    `linear_expand_scaled`.

    y is summed as x weightᵀ + b + (g - 1)∘(d weightᵀ) + g∘(s·t upᵀ): a large t upᵀ makes the norm large and
    g small, so a sum rounded before g is applied would cost y its last bits.
    """
    z = writable(torch.nn.functional.linear(d, weight))
    y = writable(torch.nn.functional.linear(x, weight, bias))
    up = up.to(t.dtype)
    if x.dtype == torch.float16:
        y, z, delta = y.float(), z.float(), (t @ up.t()).float().mul_(scaling)
        return y.addcmul_(z, mag_norm_scale - 1).addcmul_(delta, mag_norm_scale).to(x.dtype), z.add_(delta)
    y.addcmul_(z, mag_norm_scale - 1)
    if t.dtype == z.dtype:
        gained = (up * mag_norm_scale[:, None]).to(up.dtype)
        return y.addmm_(t, gained.t(), alpha=scaling), z.addmm_(t, up.t(), alpha=scaling)
    delta = t @ up.t()
    return y.addcmul_(delta, mag_norm_scale, value=scaling), z.add_(delta, alpha=scaling)


def rescale(y: Tensor, mag_norm_scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(z∘g + b, z) for y = z + b [M, N]; exactly y where g is 1, and rounded at the size of y∘g where it is small."""
    if bias is None:
        return scale(y, mag_norm_scale), y
    return (y * mag_norm_scale + bias * (1 - mag_norm_scale)).to(y.dtype), y - bias


def scale_sum(dy: Tensor, z: Tensor, mag_norm_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(dy∘g [M, N] in dy's dtype, Σ dy∘z over tokens [N] in g's dtype)."""
    return scale(dy, mag_norm_scale), (dy.to(mag_norm_scale.dtype) * z).sum(0)


def token_sum(dy: Tensor) -> Tensor:
    """Σ dy over tokens: [N] in at least float32."""
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))


def row_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + s·B·A‖ by row with the B·A matrix formed: the oracle of the native op. [N] in float32,
    or float64 where an operand is."""
    wide = torch.float32
    for tensor in (weight, lora_a, lora_b):
        wide = torch.promote_types(wide, tensor.dtype)
    return torch.linalg.vector_norm(weight.to(wide) + scaling * (lora_b.to(wide) @ lora_a.to(wide)), dim=1)


_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_HALF = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 0.5, 2 / 12, 0.25)


def code_4bit(fp4: bool, device: torch.device) -> Tensor:
    """The 16 values of FP4 or NF4 in float32."""
    values = (*_FP4_HALF, *(-value for value in _FP4_HALF)) if fp4 else _NF4
    return torch.tensor(values, dtype=torch.float32, device=device)


def dequantize_4bit(operands: Operands, quantized: FourBit, first: int, out: Tensor) -> Tensor:
    """Elements [first, first + out.numel()) of a flat four-bit weight written to `out`, as
    kernel-src/common/four_bit.h has the formula: the oracle of the native op."""
    at = torch.arange(first, first + out.numel(), device=out.device)
    byte = operands.weight.detach().view(torch.uint8).flatten()[at // 2].long()
    block = at // quantized.blocksize
    absmax = operands.absmax[block]
    if quantized.nested_blocksize > 0:
        scale = operands.nested_absmax[block // quantized.nested_blocksize]
        absmax = operands.nested_code[absmax.long()] * scale + operands.offset
    values = code_4bit(quantized.fp4, out.device)[torch.where(at % 2 == 0, byte >> 4, byte & 15)]
    return out.copy_((values * absmax).view(out.shape))
