"""The formulas in plain PyTorch: the oracle, and the path of CPU tensors. A backend is a module with these
operations."""

from .activations import gated, gated_backward
from .linear import (
    code_4bit,
    dequantize_4bit,
    dropout,
    linear_expand,
    linear_expand_dropped,
    linear_expand_scaled,
    outer,
    rescale,
    row_norm,
    scale,
    scale_sum,
    shrink,
    token_sum,
    writable,
)  # fmt: skip

__all__ = [
    "code_4bit",
    "dequantize_4bit",
    "dropout",
    "gated",
    "gated_backward",
    "linear_expand",
    "linear_expand_dropped",
    "linear_expand_scaled",
    "outer",
    "rescale",
    "row_norm",
    "scale",
    "scale_sum",
    "shrink",
    "token_sum",
    "writable",
]  # fmt: skip
