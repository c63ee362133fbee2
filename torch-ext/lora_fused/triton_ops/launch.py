"""What the launchers share: block sizes of a rank, dot precision, the current device."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

MIN_DOT = 16  # tl.dot needs at least 16 in every dimension
MAX_RANK_BLOCK = 64


def rank_block(rank: int) -> int:
    """Rows of a rank that one dot takes: a rank beyond MAX_RANK_BLOCK is looped over."""
    return min(MAX_RANK_BLOCK, max(MIN_DOT, triton.next_power_of_2(rank)))


def dot_precision(x: Tensor) -> str:
    """float32 products use TF32 only where torch's own matrix products may."""
    if x.dtype == torch.float32 and x.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"


def on_device(x: Tensor):
    """Context in which a launch goes to x's GPU."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
