"""Triton kernels behind the functions of `reference`: one kernel and its launcher per file.

Skinny products over all tokens are plain matrix products, which the library does best.
"""

from ..reference import dropout, outer, scale, token_sum
from .column_norm import column_norm
from .dequantize_4bit import dequantize_4bit
from .down import down
from .gated_act import gated, gated_backward
from .gather_add import gather_add
from .gather_backward import gather_backward
from .row_norm import row_norm, row_norm_fits
from .scale_sum import scale_sum
from .scatter_rows import scatter_rows
from .up_add import up_add, up_add_dropped, up_add_scaled

__all__ = [
    "column_norm",
    "dequantize_4bit",
    "down",
    "dropout",
    "gated",
    "gated_backward",
    "gather_add",
    "gather_backward",
    "outer",
    "row_norm",
    "row_norm_fits",
    "scale",
    "scale_sum",
    "scatter_rows",
    "token_sum",
    "up_add",
    "up_add_dropped",
    "up_add_scaled",
]
