"""The formulas in plain PyTorch: the oracle, and the path of CPU tensors. A backend is a module with these operations."""

from .activations import gated, gated_backward
from .linear import (
    code_4bit, dequantize_4bit, down, dropout, outer, rescale, row_norm, scale, scale_sum, token_sum, up_add,
    up_add_dropped, up_add_scaled,
)  # fmt: skip

__all__ = [
    "code_4bit", "dequantize_4bit", "down", "dropout", "gated", "gated_backward", "outer", "rescale", "row_norm", "scale",
    "scale_sum", "token_sum", "up_add", "up_add_dropped", "up_add_scaled",
]  # fmt: skip
