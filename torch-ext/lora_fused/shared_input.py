"""Projections that are called with the very same input run as one group, in any model.

Nobody declares siblings: they are observed. While modules run one by one, those that are called in
a row with the same tensor are noted; from a later pass on, the first of them computes all and
keeps the others' results until they are called. A result is given out only if the call is the
one it was computed for: the same tensor unchanged, the same operands, scaling and dropout, the
same grad mode and autocast. In every other case the module computes alone, so a sibling that is
skipped, replaced, moved or called with another input costs time, never correctness. "Unchanged" is what a version and
an address tell: a write that moves neither, as one through `.data`, is not seen between two siblings' calls with one
x. Between two passes everything is seen, since the first of the siblings computes again.

Results that nobody comes for, after an exception or where a sibling is skipped, go with their x, with the module that
led, with their thread, or when that thread leads another group, whichever is first. A result that is still there when a
backward call frees its graph is not given out any more (`separate_backward`).

One rule keeps checkpointing right, which must recompute what its forward did: the group of a module
changes only while no graph of its earlier calls is waiting for its backward, and never during a
backward pass. A reentrant checkpoint's forward has no graph, so calls in training without a gradient are counted until
as many came in a backward pass; until then no group changes that draws masks, which it does for all its members at
once. Calls that nobody computes again, as those of reinforcement learning, count until an optimizer has changed the
adapter.

A module that was called alone, when no graph of its calls waits, is known as such from then on: PEFT's own forward
serves its small calls, which are seen here no more.

Under `torch.use_deterministic_algorithms` every module computes alone: what runs together is learnt while a model runs,
and a run that is taken up again in a new process would add dx in another order than the run that it continues.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .call_context import FORWARD, CallContext, new_tuple
from .functional import dispatch
from .last_call import GROUPED
from .peft import linear as peft_linear, linear_call, small_batch
from .peft.linear import AdaptedLinear
from .specs import Fallback, Projection

# A group that keeps changing, as with alternating inputs, is not worth following.
MAX_CHANGES = 8


class _GraphToken:
    """Of one call's graph: lives as long as that may still run backward, and counts itself in and out.
    `separate_backward` asks it."""

    __slots__ = ("given", "may_be_recomputed", "waiting")

    def __init__(self, waiting: dict[int, None], outputs: int, may_be_recomputed: bool):
        self.waiting = waiting
        self.given = [True] + [False] * (outputs - 1)  # to whom called for it, by output; empty when that has ended
        self.may_be_recomputed = may_be_recomputed
        waiting[id(self)] = None

    def __del__(self):
        self.waiting.pop(id(self), None)

    def withdraw(self) -> list[bool]:
        given = self.given.copy()
        self.given.clear()
        return given


class _Leader:
    """What is known about a module that is called first: the group it computes, the siblings that
    were last observed, and the graphs of its calls that wait for backward."""

    def __init__(self):
        self.group: tuple[weakref.ref, ...] = ()
        self.observed: tuple[weakref.ref, ...] = ()
        self.waiting: dict[int, None] = {}
        self.not_recomputed = 0  # calls in training without a gradient that no backward pass has computed again
        self.adapter: list[tuple[weakref.ref, int]] = []  # of the last of them, as it was: each matrix and its version
        self.changes = 0
        self.was_alone = False  # when last observed
        self.stays_alone = False

    def update_group(self) -> None:
        """Takes over what was observed, where no earlier call can be recomputed."""
        if self.observed != self.group and self.may_take(self.observed):
            self.changes += 1
            self.group = self.observed if self.changes <= MAX_CHANGES else ()

    def may_take(self, observed: Sequence[weakref.ref]) -> bool:
        """Whether the group changes at the next call, `observed` being what was seen before it."""
        if observed == self.group or self.waiting or self.changes > MAX_CHANGES:
            return False
        members = _alive((*observed, *self.group))
        leaders = [self, *(_leaders[member] for member in members if member in _leaders)]
        awaits = any([leader.awaits_recomputation() for leader in leaders])
        return not (awaits and any(map(peft_linear.has_dropout, members)))

    def is_alone(self, module: nn.Module) -> bool:
        """Asked before a call of `module`, whose calls these are: one that goes one way has to go the same way when a
        checkpoint computes it again."""
        if self.stays_alone:
            return True
        if self.waiting or torch._C._current_graph_task_id() != FORWARD:
            return False
        return self.was_alone or _is_seen_alone(module)

    def awaits_recomputation(self) -> bool:
        """A matrix that is gone says nothing: FSDP1 has others in every pass."""
        if self.not_recomputed and any(
            [(now := ref()) is not None and now._version != was for ref, was in self.adapter]
        ):
            self.not_recomputed = 0
        return self.not_recomputed > 0

    def count(self, call: CallContext, projection: Projection) -> None:
        """Of a call in training. Where a graph waits, what a backward pass computes again may be of that one."""
        if call.backward_pass == FORWARD and not call.grad:
            self.not_recomputed += 1
            matrices = (projection.operands.lora_a, projection.operands.lora_b)
            self.adapter = [(weakref.ref(m), m._version) for m in matrices if m is not None and not m.is_inference()]
        elif call.backward_pass != FORWARD and self.not_recomputed and not self.waiting:
            self.not_recomputed -= 1


_Version = tuple[int, bool, int]


class _Result(NamedTuple):
    """Of one sibling: what its call has to be like, y, and where its graph's token notes that it was given, None
    without a graph."""

    state: AdaptedLinear
    versions: list[_Version]
    y: Tensor
    given: list[bool] | None
    output: int


class _Owner(weakref.ref):
    """Lets `results` go with the object that it refers to. They hold parameters and a graph, and so must not outlive
    their model, whatever came instead of the calls that they were computed for."""

    __slots__ = ("results",)
    results: dict[int, _Result]


def _let_go(owner: _Owner) -> None:
    owner.results.clear()


def _owned_by(results: dict[int, _Result], thing: object) -> _Owner:
    owner = _Owner(thing, _let_go)
    owner.results = results
    return owner


class _Precomputed:
    """Results computed ahead of calls with one x, by module. They go with x, which no graph of theirs holds, and with
    the module that led. A checkpoint's graph may hold both: `_let_go_of_checkpoints`."""

    __slots__ = ("call", "in_checkpoint", "leaders", "pointer", "results", "version", "x")

    def __init__(self, x: Tensor, call: CallContext):
        self.results: dict[int, _Result] = {}
        self.x = _owned_by(self.results, x)
        self.leaders: list[_Owner] = []
        self.version, self.pointer, self.call, self.in_checkpoint = x._version, x.data_ptr(), call, False

    def is_for(self, x: Tensor, call: CallContext) -> bool:
        """`.data` may replace x's memory under the same version."""
        return self.x() is x and self.version == x._version and self.pointer == x.data_ptr() and self.call == call


class _Calls:
    """Of one thread: results computed ahead of their calls, and the modules called with the last input."""

    __slots__ = ("precomputed", "seen", "seen_version", "seen_x")

    def __init__(self):
        self.precomputed: _Precomputed | None = None
        self.seen_x: weakref.ref | None = None
        self.seen_version = 0
        self.seen: list[weakref.ref] = []


class _Threads(threading.local):
    def __init__(self):
        self.calls = _Calls()


_is_deterministic = torch._C._get_deterministic_algorithms
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_leaders: weakref.WeakKeyDictionary[nn.Module, _Leader] = weakref.WeakKeyDictionary()
_threads = _Threads()


def _saves_by_hooks() -> bool:
    """As in a checkpoint, which runs calls again for what their graph needs."""
    return _top_hooks(True) is not None


def _let_go_of_checkpoints(phase: str, _: dict, threads: _Threads = _threads) -> None:
    """What a checkpoint has saved holds the function that it runs again, and so modules, and what that is called with:
    results of a checkpoint that was left may hold themselves. They are let go when their thread collects garbage."""
    precomputed = getattr(getattr(threads, "calls", None), "precomputed", None)  # no calls yet: making them collects
    if phase == "start" and precomputed is not None and precomputed.in_checkpoint and not _saves_by_hooks():
        precomputed.results.clear()


gc.callbacks.append(_let_go_of_checkpoints)


def take_precomputed(module: nn.Module, x: Tensor, call: CallContext) -> Tensor | None:
    """y of `module` where a sibling's call has computed it, and nothing that this call depends on has changed since."""
    calls = _threads.calls
    precomputed = calls.precomputed
    if precomputed is None or precomputed.x() is not x or _is_deterministic():
        return None
    result = precomputed.results.pop(id(module), None)
    if result is None or not precomputed.is_for(x, call):
        return None
    state = peft_linear.read_linear(module, result.state)
    if state is not result.state or result.versions != _versions(state.projection):
        return None
    if result.given is not None:
        if not result.given:  # its graph is freed
            return None
        result.given[result.output] = True
    if call.backward_pass == FORWARD:
        _observe(calls, module, x)
    if not precomputed.results:
        calls.precomputed = None
    return _in_result_dtype(result.y, state, x)


def compute(module: nn.Module, x: Tensor, call: CallContext, state: AdaptedLinear) -> Tensor:
    """y of `module`, and with it what its siblings' calls are expected to ask for."""
    if x.is_inference() or _is_deterministic():  # the first keeps no version, so a change of x would go unseen
        y = dispatch.compute_group(x, (state.projection,), call)[0]
        return _in_result_dtype(y, state, x)
    calls = _threads.calls
    forward = call.backward_pass == FORWARD
    if forward:
        _observe(calls, module, x)
    leader = _leaders.get(module)
    if leader is None:
        leader = _leaders[module] = _Leader()
    if forward:
        leader.update_group()
    return _in_result_dtype(_compute_group(calls, module, leader, x, call, state), state, x)


def _in_result_dtype(y: Tensor, state: AdaptedLinear, x: Tensor) -> Tensor:
    return y if state.base.quantized is None else y.to(linear_call.result_dtype(state, x))


def small_reason(module: nn.Module, x: Tensor, call: CallContext, rows: int | None = None) -> str | None:
    """Why PEFT's own forward is the fastest for a call of `module`, as far as a glance tells."""
    reason = small_batch.small_reason(module, x, call, rows)
    if reason is not None:
        return reason
    reason = small_batch.small_alone_reason(module, x, call, rows)
    if reason is None or _is_deterministic():
        return None
    leader = _leaders.get(module)
    if leader is None or not leader.is_alone(module):
        return None
    if rows is None:  # a call
        leader.stays_alone = True
    return reason


def groups_of(module: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
    """Siblings that the first of them computes together if its next call is fused, `module` among them."""
    if _is_deterministic():
        return
    seen = tuple(_threads.calls.seen)  # the last ones of a pass, which its leader learns of at the next call
    for head, leader in list(_leaders.items()):
        observed = leader.observed
        if seen and seen[0]() is head:
            observed = () if len(seen) == 1 else seen
        takes = leader.changes < MAX_CHANGES and leader.may_take(observed)
        group = _alive(observed if takes else leader.group)
        if module in group:
            yield group


def states_led(group: Sequence[nn.Module], x: Tensor, call: CallContext, rows: int) -> list[AdaptedLinear | None]:
    """What siblings are that another one's call computes before theirs, for `rows` rows like those of x; None of one
    that it leaves out."""
    return [_sibling_state(each, x, call, x.shape[-1], rows) for each in group]


def _alive(group: Sequence[weakref.ref]) -> tuple[nn.Module, ...]:
    members = (ref() for ref in group)
    return tuple(member for member in members if member is not None)


def _compute_group(calls, module, leader: _Leader, x: Tensor, call: CallContext, state: AdaptedLinear) -> Tensor:
    members, states = [module], [state]
    for ref in leader.group:
        sibling = ref()
        if sibling is not None and sibling is not module:
            known = _sibling_state(sibling, x, call, state.base.shape[1])
            if known is not None:
                members.append(sibling)
                states.append(known)
    if calls.precomputed is not None and not calls.precomputed.is_for(x, call):
        calls.precomputed = None  # results that nobody came for
    if module.training:
        leader.count(call, state.projection)
    by_hooks = _saves_by_hooks()
    token = _GraphToken(leader.waiting, len(members), by_hooks) if call.grad else None
    outputs = dispatch.compute_group(x, [each.projection for each in states], call, token=token)
    if len(members) > 1:
        precomputed = _Precomputed(x, call) if calls.precomputed is None else calls.precomputed
        precomputed.in_checkpoint |= by_hooks
        precomputed.leaders.append(_owned_by(precomputed.results, module))
        given = None if token is None else token.given
        for i in range(1, len(members)):
            result = new_tuple(_Result, (states[i], _versions(states[i].projection), outputs[i], given, i))
            precomputed.results[id(members[i])] = result
        calls.precomputed = precomputed
    return outputs[0]


def _sibling_state(
    sibling: nn.Module, x: Tensor, call: CallContext, features: int, rows: int | None = None
) -> AdaptedLinear | None:
    """What the sibling computes, if that can be computed before its call, of an x [..., features] that another takes.
    Its own pre-hooks may change what it computes, so it must have none. `rows` in place of x's own, where given."""
    bound = sibling.__dict__.get("forward")
    if getattr(bound, "__func__", None) not in GROUPED or sibling._forward_pre_hooks:
        return None
    if small_reason(sibling, x, call, rows):
        return None
    state = peft_linear.read_linear(sibling)
    if (
        isinstance(state, Fallback)
        or linear_call.input_fallback(state, x, call, features)
        or linear_call.own_forward_reason(state, x, call, rows)
    ):
        return None
    return state


def _versions(projection: Projection) -> list[_Version]:
    """Of every operand its version, whether it is trained, and where its memory is, which `.data` may replace under the
    same version."""
    operands, scaling, spec = projection
    tensors = operands if type(scaling) is float else (*operands, scaling)
    if spec.quantized is None:
        return _versions_of(tensors)
    with torch._C.DisableTorchFunctionSubclass():  # a quantized weight is a subclass
        return _versions_of(tensors)


def _versions_of(tensors: tuple) -> list[_Version]:
    try:
        return [(t._version, t.requires_grad, t.data_ptr()) for t in tensors if t is not None]
    except RuntimeError:  # those of inference mode keep no version
        return [
            (-1 if t.is_inference() else t._version, t.requires_grad, t.data_ptr()) for t in tensors if t is not None
        ]


def _observe(calls: _Calls, module: nn.Module, x: Tensor) -> None:
    seen, ref = calls.seen_x() if calls.seen_x is not None else None, weakref.ref(module)
    if seen is x and calls.seen_version == x._version:
        if ref not in calls.seen:
            calls.seen.append(ref)
            return
        calls.precomputed = None  # another pass over the same input: what is left of the last one has its graph
    _note_siblings(calls.seen)
    calls.seen_x, calls.seen_version, calls.seen = weakref.ref(x), x._version, [ref]


def _is_seen_alone(module: nn.Module) -> bool:
    """Whether a module was the last one called, with an x that no other was called with; asked before its next call,
    which is when that is noted."""
    seen = _threads.calls.seen
    return len(seen) == 1 and seen[0]() is module


def _note_siblings(seen: list[weakref.ref]) -> None:
    first = seen[0]() if seen else None
    leader = _leaders.get(first) if first is not None else None
    if leader is not None:
        alone = len(seen) == 1
        leader.observed, leader.was_alone = () if alone else tuple(seen), alone
