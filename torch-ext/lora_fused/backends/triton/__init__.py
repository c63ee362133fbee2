"""Triton kernels behind the functions of `reference`: one kernel and its launcher per file.

Skinny products over all tokens are plain matrix products, which the library does best.
"""

from ..reference import dropout, outer, scale, token_sum
from .column_norm import column_norm
from .dequantize_4bit import dequantize_4bit
from .gated_act import gated, gated_backward
from .gather_add import gather_add
from .gather_backward import gather_backward
from .linear_expand import linear_expand, linear_expand_dropped, linear_expand_scaled
from .row_norm import row_norm, row_norm_fits
from .scale_sum import scale_sum
from .scatter_rows import scatter_rows
from .shrink import shrink

__all__ = [
    "column_norm",
    "dequantize_4bit",
    "dropout",
    "gated",
    "gated_backward",
    "gather_add",
    "gather_backward",
    "linear_expand",
    "linear_expand_dropped",
    "linear_expand_scaled",
    "outer",
    "row_norm",
    "row_norm_fits",
    "scale",
    "scale_sum",
    "scatter_rows",
    "shrink",
    "token_sum",
]
