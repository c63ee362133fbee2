"""Projections that are called with the very same input run as one group, in any model.

Nobody declares siblings: they are observed. While modules run one by one, those that are called in
a row with the same tensor are noted; from a later pass on, the first of them computes all and
keeps the others' results until they are called. A result is given out only if the call is the
one it was computed for: the same tensor unchanged, the same operands, scaling and dropout, the
same grad mode and autocast. In every other case the module computes alone, so a sibling that is
skipped, replaced, moved or called with another input costs time, never correctness.

One rule keeps checkpointing right, which must recompute what its forward did: the group of a module
changes only while no graph of its earlier calls is waiting for its backward, and never during a
backward pass. A reentrant checkpoint's forward has no graph, so calls in training without a gradient are counted until as
many came in a backward pass; until then no group changes that draws masks, which it does for all its members at once. Calls
that nobody computes again, as those of reinforcement learning, count until an optimizer has changed the adapter.

A module that was called alone, when no graph of its calls waits, is known as such from then on: PEFT's own forward serves
its small calls, which are seen here no more.
"""

from __future__ import annotations

import operator
import threading
import weakref
from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn

from . import functional, peft_small, peft_state
from .autocast import autocast_dtype
from .projection import Projection

# A group that keeps changing, as with alternating inputs, is not worth following.
MAX_CHANGES = 8


class _Token:
    """Lives as long as a graph that may still run backward, and counts itself in and out."""

    __slots__ = ("waiting",)

    def __init__(self, waiting: dict[int, None]):
        self.waiting = waiting
        waiting[id(self)] = None

    def __del__(self):
        self.waiting.pop(id(self), None)


# What a call depends on besides its operands: grad mode, whether x needs a gradient, autocast's dtype, and the backward
# pass that it is in, since what a forward computed has the forward's graph.
_Mode = tuple[bool, bool, Optional[torch.dtype], int]
_FORWARD = -1  # in place of a backward pass


class _Leader:
    """What is known about a module that is called first: the group it computes, the siblings that
    were last observed, and the graphs of its calls that wait for backward."""

    def __init__(self):
        self.group: tuple[weakref.ref, ...] = ()
        self.observed: tuple[weakref.ref, ...] = ()
        self.waiting: dict[int, None] = {}
        self.unrepeated = 0  # calls in training without a gradient that no backward pass has computed again
        self.adapter: list[tuple[weakref.ref, int]] = []  # of the last of them, as it was: each matrix and its version
        self.changes = 0
        self.was_alone = False  # when last observed
        self.stays_alone = False

    def settle(self) -> None:
        """Takes over what was observed, where no earlier call can be recomputed."""
        if self.observed == self.group or self.waiting or self.changes > MAX_CHANGES:
            return
        members = _alive((*self.observed, *self.group))
        leaders = [self, *(_leaders[member] for member in members if member in _leaders)]
        if any([leader.awaits_repetition() for leader in leaders]) and any(map(peft_state.has_dropout, members)):
            return
        self.changes += 1
        self.group = self.observed if self.changes <= MAX_CHANGES else ()

    def is_alone(self) -> bool:
        """Asked before a call: one that goes one way has to go the same way when a checkpoint computes it again."""
        if self.was_alone and not self.waiting and torch._C._current_graph_task_id() == _FORWARD:
            self.stays_alone = True
        return self.stays_alone

    def awaits_repetition(self) -> bool:
        """A matrix that is gone says nothing: FSDP1 has others in every pass."""
        if self.unrepeated and any([(now := ref()) is not None and now._version != was for ref, was in self.adapter]):
            self.unrepeated = 0
        return self.unrepeated > 0

    def count(self, mode: _Mode, projection: Projection) -> None:
        """Of a call in training. Where a graph waits, what a backward pass computes again may be of that one."""
        gradient, *_, backward_pass = mode
        if backward_pass == _FORWARD and not gradient:
            self.unrepeated += 1
            matrices = (projection.operands.lora_a, projection.operands.lora_b)
            self.adapter = [(weakref.ref(m), m._version) for m in matrices if m is not None and not m.is_inference()]
        elif backward_pass != _FORWARD and self.unrepeated and not self.waiting:
            self.unrepeated -= 1


def _mode(x: Tensor) -> _Mode:
    return torch.is_grad_enabled(), x.requires_grad, autocast_dtype(x), torch._C._current_graph_task_id()


_State = tuple[int, bool, int]


class _Result(NamedTuple):
    projection: Projection
    states: list[_State]
    y: Tensor


class _Calls(threading.local):
    """Of one thread: results computed ahead, and the modules called with the last input."""

    def __init__(self):
        self.x: Optional[Tensor] = None
        self.version = 0
        self.mode: Optional[_Mode] = None
        self.results: dict[int, _Result] = {}
        self.seen_x: Optional[weakref.ref] = None
        self.seen_version = 0
        self.seen: list[weakref.ref] = []


_leaders: weakref.WeakKeyDictionary[nn.Module, _Leader] = weakref.WeakKeyDictionary()
_calls = _Calls()


def compute(module: nn.Module, x: Tensor, projection: Projection, layer: type) -> Tensor:
    """y of `module`, which `layer` serves, from the group's computation where there is one."""
    if x.is_inference():  # keeps no version, so a change of x would go unseen
        return functional.compute_group(x, (projection,))[0]
    mode = _mode(x)
    forward = mode[-1] == _FORWARD
    if forward:
        _observe(module, x)
    result = _claim(module, x, projection, mode)
    if result is not None:
        return result
    leader = _leaders.get(module)
    if leader is None:
        leader = _leaders[module] = _Leader()
    if forward:
        leader.settle()
    return _lead(module, leader, x, projection, mode, layer)


def small_reason(module: nn.Module, x: object, rows: Optional[int] = None) -> Optional[str]:
    """Why PEFT's own forward is the fastest for a call of `module`, as far as a glance tells."""
    reason = peft_small.small_reason(module, x, rows)
    if reason is not None:
        return reason
    reason = peft_small.small_alone_reason(module, x, rows)
    if reason is None:
        return None
    leader = _leaders.get(module)
    return reason if leader is not None and leader.is_alone() else None


def group_of(module: nn.Module) -> tuple[nn.Module, ...]:
    """The siblings that `module` leads or belongs to, itself included; empty where it is alone."""
    for leader in list(_leaders.values()):
        group = _alive(leader.group)
        if module in group:
            return group
    return ()


def _alive(group: Sequence[weakref.ref]) -> tuple[nn.Module, ...]:
    members = (ref() for ref in group)
    return tuple(member for member in members if member is not None)


def _lead(module, leader: _Leader, x: Tensor, projection: Projection, mode: _Mode, layer: type) -> Tensor:
    members, projections = [module], [projection]
    for sibling in _alive(leader.group):
        if sibling is not module:
            state = _ready(sibling, x, layer)
            if state is not None:
                members.append(sibling)
                projections.append(state)
    if _calls.x is not x or _calls.version != x._version or _calls.mode != mode:
        _forget()
    if module.training:
        leader.count(mode, projection)
    token = _Token(leader.waiting) if torch.is_grad_enabled() else None
    outputs = functional.compute_group(x, projections, token=token)
    if len(members) > 1:
        _calls.x, _calls.version, _calls.mode = x, x._version, mode
        for sibling, state, y in zip(members[1:], projections[1:], outputs[1:]):
            _calls.results[id(sibling)] = _Result(state, _states(state), y)
    return outputs[0]


def _ready(sibling: nn.Module, x: Tensor, layer: type) -> Optional[Projection]:
    """The sibling's projection if its call can be computed ahead. Its own pre-hooks may change what
    it computes, so it must have none."""
    bound = sibling.__dict__.get("forward")
    if getattr(bound, "__func__", None) is not layer.forward or sibling._forward_pre_hooks:
        return None
    if small_reason(sibling, x):
        return None
    state = peft_state.read_linear(sibling)
    if isinstance(state, str) or peft_state.call_reason(state, x, (), {}) or peft_state.called_reason(state, x):
        return None
    return state.projection


def _claim(module: nn.Module, x: Tensor, projection: Projection, mode: _Mode) -> Optional[Tensor]:
    if _calls.x is not x:
        return None
    result = _calls.results.pop(id(module), None)
    if result is None or _calls.version != x._version or _calls.mode != mode:
        return None
    if not _same(result.projection, projection) or result.states != _states(projection):
        return None
    if not _calls.results:
        _forget()
    return result.y


def _same(before: Projection, now: Projection) -> bool:
    same_tensors = all(map(operator.is_, before.operands, now.operands))
    same_scaling = before.scaling is now.scaling or before.scaling == now.scaling  # a tensor's value is not waited for
    return same_tensors and same_scaling and before.spec == now.spec


def _states(projection: Projection) -> list[_State]:
    """Of every operand its version, whether it is trained, and where its memory is, which `.data` may replace under the
    same version."""
    if projection.spec.quantized is None:
        return _states_of(projection)
    with torch._C.DisableTorchFunctionSubclass():  # a quantised weight is a subclass
        return _states_of(projection)


def _states_of(projection: Projection) -> list[_State]:
    tensors = projection.operands
    if type(projection.scaling) is not float:
        tensors = (*tensors, projection.scaling)
    return [
        (-1 if tensor.is_inference() else tensor._version, tensor.requires_grad, tensor.data_ptr())
        for tensor in tensors
        if tensor is not None
    ]


def _forget() -> None:
    """Results that nobody came for are let go."""
    _calls.x = None
    _calls.results.clear()


def _observe(module: nn.Module, x: Tensor) -> None:
    seen, ref = _calls.seen_x() if _calls.seen_x is not None else None, weakref.ref(module)
    if seen is x and _calls.seen_version == x._version:
        if ref not in _calls.seen:
            _calls.seen.append(ref)
            return
        _forget()  # another pass over the same input: what is left of the last one has its graph
    _note_siblings()
    _calls.seen_x, _calls.seen_version, _calls.seen = weakref.ref(x), x._version, [ref]


def _note_siblings() -> None:
    first = _calls.seen[0]() if _calls.seen else None
    leader = _leaders.get(first) if first is not None else None
    if leader is not None:
        alone = len(_calls.seen) == 1
        leader.observed, leader.was_alone = () if alone else tuple(_calls.seen), alone
