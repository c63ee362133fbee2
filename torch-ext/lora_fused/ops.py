"""The native ops of this build, with the shape functions that torch.compile needs."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend
from ._ops import add_op_namespace_prefix, ops


@torch.library.register_fake(add_op_namespace_prefix("row_norm"))
def _row_norm_fake(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=torch.float32)


# From this rank on the product is the cost, and Triton's tensor-core loop beats the CUDA op.
TRITON_FROM_RANK = 128


def row_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + s·B·A‖ by row in float32: the C++ (CPU) or CUDA op, Triton for large ranks."""
    if weight.is_cuda and lora_a.shape[0] >= TRITON_FROM_RANK and not torch.compiler.is_compiling():
        kernels = backend.get(backend.TRITON) if backend.triton_is_there() else None
        if kernels is not None and kernels.row_norm_fits(weight, lora_a, lora_b):
            return kernels.row_norm(weight, lora_a, lora_b, scaling)
    return ops.row_norm(weight, lora_a, lora_b, scaling)
