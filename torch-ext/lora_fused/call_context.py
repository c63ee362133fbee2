"""What a call depends on besides its module and its operands, and autocast's state for a tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORWARD = -1  # in place of a backward pass
# Bound once: attributes of modules cost as much as the answers.
_is_grad_enabled, _current_backward = torch.is_grad_enabled, torch._C._current_graph_task_id
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_UNCHANGED = contextlib.nullcontext()
# Of a NamedTuple with all its fields: its constructor, a function of Python's that calls this one, takes twice as long.
new_tuple = tuple.__new__


def device_type(x: Tensor) -> str:
    """`x.device.type`, which torch writes anew at every call: 4 µs in a model, where caches are cold."""
    return "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype on x's device; None where it is off."""
    if not _is_any_autocast_enabled():  # nearly always, and a name as an argument would cost three times as much
        return None
    kind = device_type(x)
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):  # meta
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class CallContext(NamedTuple):
    """Of one call with x, asked for once and handed down.

    grad: whether a graph is recorded. x_requires_grad: whether that reaches x. autocast: its dtype on x's device, None
    where it is off. backward_pass: the one that runs the call again, as a checkpoint does, else FORWARD.
    """

    grad: bool
    x_requires_grad: bool
    autocast: torch.dtype | None
    backward_pass: int

    @classmethod
    def of(cls, x: Tensor) -> CallContext:
        return new_tuple(cls, (_is_grad_enabled(), x.requires_grad, autocast_dtype(x), _current_backward()))


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Dtypes are settled by the caller; entering the context costs host time, so only where it acts."""
    return _UNCHANGED if autocast_dtype(x) is None else torch.autocast(device_type(x), enabled=False)


def apart(function: Callable, *args: Any) -> Any:
    """What a function gives in a thread of its own, where nothing of the caller's holds: autocast, inference, modes,
    a checkpoint's hooks on saved tensors."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args).result()
