"""The one place that chooses who computes: Triton on a GPU, plain PyTorch elsewhere.

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


@functools.lru_cache(maxsize=None)
def _triton_is_there() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the backend for x on `device`, computed in `dtype`.

    Half precision on a GPU goes to Triton. float32 stays with the vendor's matrix products,
    which follow torch's own TF32 setting.
    """
    if device.type == "cuda" and dtype in _TRITON_DTYPES and _triton_is_there():
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
