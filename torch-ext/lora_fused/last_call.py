"""What the last call of each module ran, so that `explain` need not guess what it cannot see: torch.compile may have
traced a module from outside of the model, and sharded weights are whole in calls alone.

A note is None where our forward computed the call, TRACED where a graph did, else the reason why the module's own did.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

TRACED = "in a graph of torch.compile"
NEVER = "not called yet"  # in place of a note

# Forwards of ours whose modules run in groups and in gated MLPs; `layers`, which is above, puts them here.
GROUPED: set[Callable] = set()

_PACKAGE = __name__.rpartition(".")[0]
notes: dict[int, str | None] = {}  # by id: a dict of weak references costs a call five times as much
_references: dict[int, weakref.ref] = {}
_traced: set[int] = set()  # what torch.compile has traced at some time


def note(module: nn.Module, reason: str | None) -> None:
    """`module` runs: our forward, or its own for `reason`."""
    if notes.get(id(module), NEVER) is not reason:
        _change(module, reason)


def _change(module: nn.Module, reason: str | None) -> None:
    key = id(module)
    if key not in _references:
        _references[key] = weakref.ref(module, functools.partial(_forget, key))
    notes[key] = reason


def forget(module: nn.Module) -> None:
    """What a module ran does not count any more."""
    _forget(id(module))


def _forget(key: int, _: weakref.ref | None = None) -> None:
    _references.pop(key, None)
    notes.pop(key, None)
    _traced.discard(key)


def of(module: nn.Module) -> str | None:
    """The note of a module's last call; NEVER before the first."""
    return notes.get(id(module), NEVER)


def is_of_kernel(module: nn.Module) -> bool:
    """Whether a forward of this kernel is bound to a module."""
    return _is_of_package(module.__dict__.get("forward"))


def ends_in_kernel(module: nn.Module) -> bool:
    """Whether a call of a module ends in a forward of this kernel, which notes it."""
    return _is_of_package(called_forward(module))


def called_forward(module: nn.Module) -> Any:
    """The forward on an instance, None for its class's; of another tool's, which keeps the module's own of this kernel
    that it found and calls it, that one."""
    bound = module.__dict__.get("_old_forward" if is_hooked(module) else "forward")
    if bound is None or is_of_any_build(bound):
        return bound
    return next((kept for kept in ours_kept_by(bound) if kept.__self__ is module), bound)


def is_hooked(module: nn.Module) -> bool:
    """Whether the forward on an instance is a hook of accelerate's."""
    bound = module.__dict__.get("forward")
    return isinstance(bound, functools.partial) and bound.func.__module__ == "accelerate.hooks"


def ours_kept_by(bound: object) -> list[types.MethodType]:
    """Forwards of this kernel, of any build, that another tool's function keeps."""
    return [kept for kept in _kept_by(bound) if isinstance(kept, types.MethodType) and is_of_any_build(kept)]


def _kept_by(bound: object) -> Iterator[object]:
    """What a function has found, as far as it shows: what it says that it wraps, what its closure and defaults hold."""
    function = getattr(bound, "__func__", bound)
    yield getattr(function, "__wrapped__", None)
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty one
            yield cell.cell_contents
    yield from getattr(function, "__defaults__", None) or ()


def _is_of_package(bound: object) -> bool:
    forward = getattr(bound, "__func__", None)
    return forward is not None and forward.__module__.startswith(_PACKAGE)


def is_of_any_build(bound: object) -> bool:
    """Whether a bound method is a forward of this kernel, or of another build of it, which has its own package."""
    module = getattr(getattr(bound, "__func__", None), "__module__", None) or ""
    return module.startswith(f"{_PACKAGE}.") or re.fullmatch(r"_?lora_fused\w*\.layers", module) is not None


def ran_since_trace(module: nn.Module) -> bool:
    """Whether a module that torch.compile has traced was called outside of the graph since."""
    return id(module) in _traced and of(module) is not TRACED


def note_trace() -> list[nn.Module]:
    """Called while torch.compile traces a forward of this kernel, without a break of its graph. It takes no argument,
    since Dynamo would compile again for every other one: one graph may serve all layers of a model. So all that is
    below the modules that are running is noted; each notes itself again when it is called outside of a graph."""
    found = [module for module in {m: None for root in _running() for m in root.modules()} if ends_in_kernel(module)]
    for module in found:
        note(module, TRACED)
        _traced.add(id(module))
    return found


def _running() -> Iterable[nn.Module]:
    """The modules whose methods are running, or what they and a compiled function's callers hold, in lists and objects
    too: the first of these that has a module of this kernel."""
    frame: types.FrameType | None = sys._getframe(1)
    running, held = list[nn.Module](), list[object]()
    while frame is not None:
        found = frame.f_locals
        if isinstance(found.get("self"), nn.Module):
            running.append(found["self"])
        if not frame.f_globals.get("__name__", "").startswith("torch."):
            held += found.values()
        frame = frame.f_back
    looks = itertools.chain((running,), (list(_modules_in([*running, *held], depth)) for depth in range(3)))
    return next((found for found in looks if any(ends_in_kernel(m) for root in found for m in root.modules())), ())


_MOST_ITEMS = 100  # of a list that may hold models, and no data


def _modules_in(values: Iterable[object], depth: int) -> Iterator[nn.Module]:
    for value in values:
        if isinstance(value, nn.Module):
            yield value
        if depth and not isinstance(value, (type, types.ModuleType, torch.Tensor)):
            inner = value if isinstance(value, (dict, list, tuple)) else getattr(value, "__dict__", ())
            if len(inner) <= _MOST_ITEMS:
                yield from _modules_in(list(inner.values() if isinstance(inner, dict) else inner), depth - 1)
