"""The one place that chooses who computes: Triton for large work on a GPU, the library elsewhere.

`reference` and `triton_ops` are modules of operations, which `compose` puts together. LIBRARY is
`reference`'s operations chained by one native op, see `library`. Memory-bound passes are
chosen apart from matrix products: one Triton kernel beats several library ones at any size.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from . import ops, reference

REFERENCE = "reference"
LIBRARY = "library"
TRITON = "triton"
_TRITON_DTYPES = (torch.bfloat16, torch.float16)
# Multiply-adds of one base product from which its GPU time hides the launches: below, a step
# waits for the host, and two library products cost it less than two Triton launches.
TRITON_FROM = 2**37


@functools.lru_cache(maxsize=None)
def _triton_is_there() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def choose(device: torch.device, dtype: torch.dtype, work: int) -> str:
    """Name of the backend for x on `device`, computed in `dtype`, with `work` = M·N·K.

    Large half-precision products on a GPU go to Triton. float32 stays with the vendor's matrix
    products, which follow torch's own TF32 setting.
    """
    if device.type == "cuda" and dtype in _TRITON_DTYPES and work >= TRITON_FROM and _triton_is_there():
        return TRITON
    return LIBRARY


def is_library(name: str) -> bool:
    """Whether the native op may take whole batches."""
    return name == LIBRARY


def get(name: str) -> ModuleType:
    """The module of operations behind a backend's name."""
    if name in (REFERENCE, LIBRARY):
        return reference
    if name == TRITON:
        from . import triton_ops

        return triton_ops
    raise ValueError(f"backend: {name!r} is unknown, expected {LIBRARY!r}, {REFERENCE!r} or {TRITON!r}")


def pointwise(x: Tensor) -> ModuleType:
    """The module for passes over x that multiply no matrices: `gated`, `gated_backward`, `scale`,
    `scale_sum`."""
    triton_can = x.is_cuda and x.dtype in _TRITON_DTYPES and _triton_is_there()
    return get(TRITON if triton_can else REFERENCE)


def row_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + s·B·A‖ by row: the native op, in float32; float64 operands have none and stay exact."""
    if torch.float64 in (weight.dtype, lora_a.dtype, lora_b.dtype):
        return reference.row_norm(weight, lora_a, lora_b, scaling)
    return ops.row_norm(weight, lora_a, lora_b, scaling)
