"""The native ops of this build, with the shape functions that torch.compile needs."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend
from ._ops import add_op_namespace_prefix, ops


@torch.library.register_fake(add_op_namespace_prefix("row_norm"))
def _row_norm_fake(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=torch.float32)


# On an H200 Triton halves the CUDA op's GPU time at rank 384, equals it at 128 and is behind at
# 64, for 130 to 220 µs more host time: it gets large ranks of large weights (N·K·R products).
TRITON_FROM_RANK = 128
TRITON_FROM = 2**34


def _triton_pays(weight: Tensor, rank: int) -> bool:
    return (
        weight.is_cuda
        and rank >= TRITON_FROM_RANK
        and weight.numel() * rank >= TRITON_FROM
        and backend.triton_is_there()
        and not torch.compiler.is_compiling()
    )


def row_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + s·B·A‖ by row in float32: the C++ (CPU) or CUDA op, Triton for large ranks."""
    if _triton_pays(weight, lora_a.shape[0]):
        kernels = backend.get(backend.TRITON)
        if kernels.row_norm_fits(weight, lora_a, lora_b):
            return kernels.row_norm(weight, lora_a, lora_b, scaling)
    return ops.row_norm(weight, lora_a, lora_b, scaling)
