"""Autocast's state for a tensor, asked for several times in a layer."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def device_type(x: Tensor) -> str:
    """`x.device.type`, which torch writes anew at every call: 4 µs in a model, where caches are cold."""
    return "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype on x's device; None where it is off."""
    if x.is_cuda and not torch.is_autocast_enabled():  # a name as its argument would cost as much again
        return None
    kind = device_type(x)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Dtypes are settled by the caller; entering the context costs host time, so only where it acts."""
    return contextlib.nullcontext() if autocast_dtype(x) is None else torch.autocast(device_type(x), enabled=False)
