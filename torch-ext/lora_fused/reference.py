"""The formula and its backward in plain PyTorch: the oracle, and the path of CPU tensors.

    y = x Wᵀ + b + (s · x Aᵀ) Bᵀ

Shapes: x [M, K], weight [N, K], bias [N], lora_a [R, K], lora_b [N, R], t and dt [M, R].
The base product runs in x's dtype. The LoRA path runs in `lora_dtype` where one is given
(autocast) and in the adapter's own dtype otherwise, as PEFT computes it.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


def down(x: Tensor, a: Tensor, scaling: float, lora_dtype: Optional[torch.dtype] = None) -> Tensor:
    """t = s · x aᵀ for x [M, K] and a [R, K]: [M, R] in `lora_dtype` or a's dtype."""
    dtype = lora_dtype or a.dtype
    return (x.to(dtype) @ a.to(dtype).t()).mul_(scaling)


def up_add(
    x: Tensor,
    weight: Tensor,
    t: Tensor,
    up: Tensor,
    bias: Optional[Tensor] = None,
) -> Tensor:
    """y = x weightᵀ + t upᵀ + bias for weight [N, K], t [M, R], up [N, R]: [M, N] in x's dtype."""
    y = torch.nn.functional.linear(x, weight, bias)
    if t.dtype == y.dtype:
        return y.addmm_(t, up.to(t.dtype).t())
    return (y + t @ up.to(t.dtype).t()).to(y.dtype)


def outer(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """leftᵀ right for left [M, P] and right [M, Q]: [P, Q] in `dtype`, summed over tokens."""
    wide = torch.promote_types(left.dtype, right.dtype)
    return (left.to(wide).t() @ right.to(wide)).to(dtype)


def row_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + s·B·A‖ by row with the B·A matrix formed: the oracle of the native op. [N] in float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(wide) + scaling * (lora_b.to(wide) @ lora_a.to(wide))
    return torch.linalg.vector_norm(merged, dim=1).to(torch.float32)
