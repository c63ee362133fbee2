"""What the launchers share: block sizes of a rank, dot precision, shared memory, the current device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from ..values import with_values

MIN_DOT = 16  # tl.dot needs at least 16 in every dimension
MAX_RANK_BLOCK = 64
SMALL_SHARED_MEMORY = 99 * 1024  # compute capability 8.6 and 8.9


def rank_block(rank: int) -> int:
    """Rows of a rank that one dot takes: a rank beyond MAX_RANK_BLOCK is looped over."""
    return min(MAX_RANK_BLOCK, max(MIN_DOT, triton.next_power_of_2(rank)))


def dot_precision(x: Tensor) -> str:
    """float32 products use TF32 only where torch's own matrix products may."""
    # `allow_tf32` raises where somebody has set this, as transformers' Trainer does.
    if x.dtype == torch.float32 and x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use; the interpreter is given a small GPU's."""
    if device.type != "cuda":
        return SMALL_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)  # AMD's GPUs give no more than unasked
    return getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block


def on_device(x: Tensor):
    """Context in which a launch goes to x's GPU."""
    if x.is_cpu:
        return contextlib.nullcontext()
    gpus = torch.cuda if x.is_cuda else torch.xpu
    return contextlib.nullcontext() if x.device.index == gpus.current_device() else gpus.device(x.device)


def on_values(launcher: Callable) -> Callable:
    """A launcher that is given what its tensors stand for, since a kernel reads memory alone."""

    @functools.wraps(launcher)
    def launch(*args, **kwargs):
        return launcher(*map(with_values, args), **{name: with_values(arg) for name, arg in kwargs.items()})

    return launch
