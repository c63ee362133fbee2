"""The formula and its backward in plain PyTorch: the oracle, and the path of CPU tensors.

    y = x Wᵀ + b + (g - 1)∘(d Wᵀ) + g∘(t Bᵀ)        d = dropout(x), t = s·d Aᵀ

Shapes: x [M, K], weight [N, K], bias [N], lora_a [R, K], lora_b [N, R], t and dt [M, R], gain g [N].
The base product runs in x's dtype. The LoRA path runs in `dtype` where one is given (autocast) and
in the adapter's own dtype otherwise, as PEFT computes it.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from . import ops
from .activation import gated, gated_backward  # noqa: F401  (a backend has them)
from .projection import Mask


def dropout(x: Tensor, mask: Mask, dtype: Optional[torch.dtype] = None) -> Tensor:
    """mask ∘ x / (1 - p) for x [M, K], in `dtype` or x's."""
    return ops.dropout(x, mask, dtype or x.dtype)


def down(
    x: Tensor, a: Tensor, scaling: float, dtype: Optional[torch.dtype] = None, mask: Optional[Mask] = None
) -> Tensor:
    """t = s · dropout(x) aᵀ for x [M, K] and a [R, K]: [M, R] in `dtype` or a's dtype."""
    dtype = dtype or a.dtype
    x = x.to(dtype) if mask is None else dropout(x, mask, dtype)
    # beta=0: nothing is read of the first argument; s is applied before the one rounding.
    return torch.addmm(x.new_empty((1,)), x, a.to(dtype).t(), beta=0, alpha=scaling)


def up_add(
    x: Tensor,
    weight: Tensor,
    t: Optional[Tensor] = None,
    up: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    mask: Optional[Mask] = None,
    out: Optional[Tensor] = None,
) -> Tensor:
    """y = x weightᵀ + dropout(t upᵀ) + bias for weight [N, K], t [M, R], up [N, R]: [M, N] in x's
    dtype. With `out` [M, N] the sum is added to it, in place, and no bias is taken."""
    y = torch.nn.functional.linear(x, weight, bias) if out is None else out.addmm_(x, weight.t())
    if t is None:
        return y
    up = up.to(t.dtype)
    if mask is None and t.dtype == y.dtype:
        return y.addmm_(t, up.t())
    delta = t @ up.t()
    return y.add_(delta if mask is None else dropout(delta, mask))


def outer(left: Tensor, right: Tensor, dtype: torch.dtype, mask: Optional[Mask] = None) -> Tensor:
    """leftᵀ dropout(right) for left [M, P] and right [M, Q]: [P, Q] in `dtype`, summed over tokens."""
    wide = torch.promote_types(left.dtype, right.dtype)
    right = right.to(wide) if mask is None else dropout(right, mask, wide)
    return (left.to(wide).t() @ right).to(dtype)


def scale(z: Tensor, gain: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """z∘g + b for z [M, N] and g [N], multiplied in g's dtype: [M, N] in z's dtype."""
    if bias is None:
        return torch.mul(z, gain, out=torch.empty_like(z))
    return (z * gain + bias).to(z.dtype)


def up_add_scaled(
    x: Tensor, weight: Tensor, t: Tensor, up: Tensor, gain: Tensor, bias: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """(y, z) with z = x weightᵀ + t upᵀ and y = z∘g + b."""
    return rescale(up_add(x, weight, t, up, bias), gain, bias)


def rescale(y: Tensor, gain: Tensor, bias: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    """(z∘g + b, z) for y = z + b [M, N]; exactly y where g is 1."""
    if bias is None:
        return scale(y, gain), y
    z = y - bias
    return (y + z * (gain - 1)).to(y.dtype), z


def scale_sum(dy: Tensor, z: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """(dy∘g [M, N] in dy's dtype, Σ dy∘z over tokens [N] in g's dtype)."""
    return scale(dy, gain), (dy.to(gain.dtype) * z).sum(0)


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
