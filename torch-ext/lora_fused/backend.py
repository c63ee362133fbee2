"""The one place that chooses who computes: Triton for large work on a GPU, PyTorch elsewhere.

A backend is a module with `down` and `up_add` as `reference` defines them; `reference.outer`
serves both, since a skinny product over all tokens is a plain matrix product.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from . import reference

REFERENCE = "reference"
TRITON = "triton"
_TRITON_DTYPES = (torch.bfloat16, torch.float16)
# Multiply-adds of one base product from which its GPU time hides the launches: below, a step
# waits for the host, and two library products cost it less than two Triton launches.
TRITON_FROM = 2**37


@functools.lru_cache(maxsize=None)
def triton_is_there() -> bool:
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
    if device.type == "cuda" and dtype in _TRITON_DTYPES and work >= TRITON_FROM and triton_is_there():
        return TRITON
    return REFERENCE


def get(name: str) -> ModuleType:
    """The module behind a backend's name."""
    if name == REFERENCE:
        return reference
    if name == TRITON:
        from . import triton_ops

        return triton_ops
    raise ValueError(f"backend: {name!r} is unknown, expected {REFERENCE!r} or {TRITON!r}")
