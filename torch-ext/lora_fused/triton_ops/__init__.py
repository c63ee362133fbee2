"""Triton kernels behind the functions of `reference`: one kernel and its launcher per file."""

from .down import down
from .up_add import up_add

__all__ = ["down", "up_add"]
