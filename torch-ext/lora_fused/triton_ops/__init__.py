"""Triton kernels behind the functions of `reference`: one kernel and its launcher per file.

Skinny products over all tokens are plain matrix products, which the library does best.
"""

from ..reference import dropout, outer, scale, token_sum
from .down import down
from .gated_act import gated, gated_backward
from .row_norm import row_norm, row_norm_fits
from .scale_sum import scale_sum
from .up_add import up_add, up_add_scaled

__all__ = [
    "down",
    "dropout",
    "gated",
    "gated_backward",
    "outer",
    "row_norm",
    "row_norm_fits",
    "scale",
    "scale_sum",
    "token_sum",
    "up_add",
    "up_add_scaled",
]
