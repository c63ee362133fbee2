"""Who computes: the native ops, Triton, or plain PyTorch. `select` is the one place that chooses.

`native` is the module of the native ops, or where a variant has no library (torch-rocm, torch-xpu) `without_ops`, which
says so by `available`.
"""

from .._ops import ops

if hasattr(ops, "lora_forward"):
    from . import native as native
else:
    from . import without_ops as native  # type: ignore[no-redef]  # noqa: F401
