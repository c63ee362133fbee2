"""The native ops of this build, with the shape functions that torch.compile needs."""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .projection import Mask


@torch.library.register_fake(add_op_namespace_prefix("row_norm"))
def _row_norm_fake(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=torch.float32)


def row_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + s·B·A‖ by row in float32, computed by the C++ (CPU) or CUDA op."""
    return ops.row_norm(weight, lora_a, lora_b, scaling)


@torch.library.register_fake(add_op_namespace_prefix("dropout"))
def _dropout_fake(x: Tensor, seed: Tensor, p: float, out: Tensor, accumulate: bool = False) -> None:
    return None


def dropout(x: Tensor, mask: Mask, dtype: torch.dtype) -> Tensor:
    """mask ∘ x / (1 - p) for x [M, K], in `dtype`, computed by the C++ (CPU) or CUDA op."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    ops.dropout(x.contiguous(), mask.seed, mask.p, out)
    return out


@torch.library.register_fake(add_op_namespace_prefix("lora_forward"))
def _lora_forward_fake(x, weights, biases, lora_a, lora_b, scalings, seed, p, lead):
    ys = [x.new_empty(*lead, weight.shape[0]) for weight in weights]
    return ys, [x.new_empty(x.shape[0], sum(a.shape[0] for a in lora_a))] if lora_a else []


@torch.library.register_fake(add_op_namespace_prefix("lora_backward"))
def _lora_backward_fake(dys, x, t, weights, lora_a, lora_b, scalings, seed, p, dx, need_dx, needs_a, needs_b):
    new_dx = [torch.empty_like(x)] if need_dx and dx is None else []
    das = [torch.empty_like(a) for a, need in zip(lora_a, needs_a) if need]
    return new_dx, das, [torch.empty_like(b) for b, need in zip(lora_b, needs_b) if need]


# Called inside autograd Functions alone: what the dispatcher does for operands that need a gradient,
# at every call, has no use there.
_dispatch = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "IMPL")
for _name in ("lora_forward", "lora_backward"):
    for _key in ("Autograd", "ADInplaceOrView"):
        _dispatch.impl(_name, torch.library.fallthrough_kernel, _key)

lora_forward = ops.lora_forward.default
lora_backward = ops.lora_backward.default
