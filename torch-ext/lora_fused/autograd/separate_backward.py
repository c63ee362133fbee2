"""Outputs of one Function that are differentiated by separate backward calls.

Modules that share no node have a graph each: a backward call through one leaves the others' graphs as they are. Here they
share a node, which torch frees as a whole. So a call that reaches some outputs and frees the graph leaves what was saved
with the node, for the outputs that are left, and a later call works on that. Where torch would raise, so does that call:
for an output whose graph was freed, and where x or what its own gradients are made of has changed in place since. What is
left lives as long as the graph.

A Function that takes part has `ctx.kept`, None at first, and `ctx.token`, None or an object of who made the call:
`withdraw()` says which outputs were given to somebody, and ends the giving; `may_be_recomputed` whether a checkpoint may
run the call again as long as its graph is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_CHANGED = "one of the variables needed for gradient computation has been modified by an inplace operation"
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph

# Of a saved tensor that gradients are made of: its name, and the output that they are of, None for all.
Operand = tuple[str, int | None]


class _Unpacked(list):
    """Saved tensors, unpacked one by one since torch refuses all where one has changed: why it refuses some, by index."""

    def __init__(self):
        self.refused: dict[int, str] = {}


class Kept(NamedTuple):
    """What was saved, each tensor's version then, and the outputs whose graph is not freed."""

    saved: Sequence[Tensor | None]
    versions: list[int | None]
    left: list[bool]


def saved_tensors(ctx, used: Sequence[bool], operands: Callable) -> Sequence[Tensor | None]:
    """What `ctx` saved, for the backward of the outputs that are `used`; `operands(ctx)` gives an `Operand` of each tensor,
    None of one that is not read or that nobody else has."""
    kept = ctx.kept
    if kept is None or any([use and not left for use, left in zip(used, kept.left)]):
        try:
            return ctx.saved_tensors  # where it is freed, torch says so
        except RuntimeError as error:
            if _CHANGED not in str(error) or not hasattr(torch._C._autograd.SavedTensor, "unpack"):
                raise
        return _unpacked(ctx, used, operands(ctx))
    for i, (operand, tensor) in enumerate(zip(operands(ctx), kept.saved)):
        if tensor is not None and _is_read(operand, used):
            why = _refused(kept.saved).get(i)
            if why is not None or _version(tensor) != kept.versions[i]:
                raise RuntimeError(why or _changed(operand, tensor, kept.versions[i]))
    return kept.saved


def _unpacked(ctx, used: Sequence[bool], operands: Sequence[Operand | None]) -> _Unpacked:
    found = _Unpacked()
    for i, (operand, saved) in enumerate(zip(operands, ctx._raw_saved_tensors)):
        try:
            found.append(saved.unpack())
        except RuntimeError as error:
            if _is_read(operand, used):
                raise
            found.append(saved.data)
            found.refused[i] = str(error)
    return found


def _is_read(operand: Operand | None, used: Sequence[bool]) -> bool:
    return operand is not None and (operand[1] is None or used[operand[1]])


def _refused(saved: Sequence[Tensor | None]) -> dict[int, str]:
    return saved.refused if isinstance(saved, _Unpacked) else {}


def ran(ctx, used: Sequence[bool], saved: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    """Keeps `saved` for the outputs that are left, where the backward that has just run, which gives `grads`, frees the
    graph."""
    token, kept, waits = ctx.token, ctx.kept, _keeps_graph()
    if not waits and (kept is not None or not all(used)):
        if kept is None:
            left = [True] * len(used) if token is None else token.withdraw()
            kept = Kept(saved, [_version(tensor) for tensor in saved], left)
        if _is_wanted(ctx, grads):
            kept = kept._replace(left=[left and not use for left, use in zip(kept.left, used)])
        waits = any(kept.left)
        ctx.kept = kept if waits else None
    if token is not None and not (waits and token.may_be_recomputed):
        ctx.token = None


def _is_wanted(ctx, grads: Sequence[Tensor | None]) -> bool:
    """Whether somebody waits for one of `grads`. `autograd.grad` for the operands of other outputs wants none of them, and
    where outputs have graphs of their own it would come to none of these."""
    nodes = [node for node, _ in ctx.next_functions if node is not None]
    made = [grad for grad, needed in zip(grads, ctx.needs_input_grad) if needed]
    return any([grad is not None and _is_run(node) for node, grad in zip(nodes, made)])


def _is_run(node) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf of `autograd.grad`
        return True


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


def _changed(operand: Operand, tensor: Tensor, version: int) -> str:
    name, output = operand
    whose = name if output is None else f"{name} of output {output}"
    return (
        f"{_CHANGED}: [{tensor.type()} {list(tensor.shape)}], {whose}, is at version {tensor._version}; expected version "
        f"{version} instead, as at the first backward call through this group of projections."
    )
