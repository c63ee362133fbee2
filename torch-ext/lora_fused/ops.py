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


@torch.library.register_fake(add_op_namespace_prefix("gain"))
def _gain_fake(magnitude: Tensor, norm: Tensor) -> Tensor:
    return torch.empty_like(norm)


def gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """magnitude / norm [N] in norm's dtype, and exactly 1 where they differ by the norm's rounding alone."""
    return ops.gain(magnitude.to(norm.dtype).contiguous(), norm)


@torch.library.register_fake(add_op_namespace_prefix("dropout"))
def _dropout_fake(x: Tensor, seed: Tensor, p: float, out: Tensor, accumulate: bool = False) -> None:
    return None


def dropout(x: Tensor, mask: Mask, dtype: torch.dtype) -> Tensor:
    """mask ∘ x / (1 - p) for x [M, K], in `dtype`, computed by the C++ (CPU) or CUDA op."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    ops.dropout(x.contiguous(), mask.seed, mask.p, out)
    return out


@torch.library.register_fake(add_op_namespace_prefix("lora_forward"))
def _lora_forward_fake(x, weights, biases, lora_a, lora_b, scalings, seeds, dropouts):
    ranks = sum(a.shape[0] for a in lora_a if a is not None)
    ys = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    return ys, x.new_empty(x[..., 0].numel(), ranks)


def _gradients(x, dys, lora_a, lora_b, need_dx, needs_a, needs_b):
    """Fakes of (dx), dA's and dB's as the native ops give them."""
    used = [dy is not None for dy in dys]
    das = [torch.empty_like(a) for a, need, use in zip(lora_a, needs_a, used) if need and use]
    dbs = [torch.empty_like(b) for b, need, use in zip(lora_b, needs_b, used) if need and use]
    return [torch.empty_like(x)] if need_dx else [], das, dbs


@torch.library.register_fake(add_op_namespace_prefix("lora_backward"))
def _lora_backward_fake(
    dys, x, t, weights, lora_a, lora_b, scalings, seeds, dropouts, dx, need_dx, needs_a, needs_b
):
    return _gradients(x, dys, lora_a, lora_b, need_dx and dx is None, needs_a, needs_b)


@torch.library.register_fake(add_op_namespace_prefix("gated_forward"))
def _gated_forward_fake(x, weights, biases, lora_a, lora_b, scalings, seeds, dropouts, activation, gate_half):
    rows = x[..., 0].numel()
    ranks = [0 if a is None else a.shape[0] for a in lora_a]
    outputs = [x.new_empty(rows, weight.shape[0]) for weight in weights[:-1]]
    ts = [x.new_empty(rows, sum(ranks[:-1])), x.new_empty(rows, ranks[-1])]
    return x.new_empty(*x.shape[:-1], weights[-1].shape[0]), outputs, ts


@torch.library.register_fake(add_op_namespace_prefix("gated_backward"))
def _gated_backward_fake(
    dy, x, outputs, ts, weights, lora_a, lora_b, scalings, seeds, dropouts, activation, gate_half,
    need_dx, needs_a, needs_b,
):  # fmt: skip
    return _gradients(x, [dy] * len(weights), lora_a, lora_b, need_dx, needs_a, needs_b)


# Called inside autograd Functions alone: what the dispatcher does for operands that need a gradient,
# at every call, has no use there.
_dispatch = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "IMPL")
for _name in ("lora_forward", "lora_backward", "gated_forward", "gated_backward"):
    for _key in ("Autograd", "ADInplaceOrView"):
        _dispatch.impl(_name, torch.library.fallthrough_kernel, _key)

lora_forward = ops.lora_forward.default
lora_backward = ops.lora_backward.default
gated_forward = ops.gated_forward.default
gated_backward = ops.gated_backward.default
