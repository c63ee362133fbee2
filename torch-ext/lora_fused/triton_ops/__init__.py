"""Triton kernels behind the functions of `reference`: one kernel and its launcher per file."""

from .down import down
from .row_norm import row_norm, row_norm_fits
from .up_add import up_add

__all__ = ["down", "row_norm", "row_norm_fits", "up_add"]
