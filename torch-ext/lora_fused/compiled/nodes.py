"""Nodes of a torch.fx graph that take the place of others."""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node, map_arg

aten, prims = torch.ops.aten, torch.ops.prims
# What the partitioner, and checkpoints before it, decide by.
_TAGS = ("recompute", "ac_graph_id", "partitioner_tag")
# Of one tensor another dtype or shape, and itself.
RESHAPES = frozenset((
    aten._to_copy.default, prims.convert_element_type.default, aten.view.default, aten._unsafe_view.default,
    aten.reshape.default,
))  # fmt: skip
_ALIASES = frozenset((aten.alias.default, aten.detach.default))


def args_of(node: Node) -> tuple[Any, ...]:
    """Its arguments; torch's types say that they may be anything."""
    return node.args


def tags(node: Node) -> tuple:
    """What nodes that become one have to have in common."""
    return (*(node.meta.get(tag) for tag in _TAGS), node.meta.get("custom", {}).get("stream"))


def in_order(graph: Graph, targets: Collection[Any]) -> list[Node]:
    """A graph's calls of some targets."""
    return sorted(node for target in targets for node in graph.find_nodes(op="call_function", target=target))


def may_write(node: Node) -> bool:
    """Whether a node may write to memory that others read."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    return isinstance(node.target, HigherOrderOperator) or node.op in ("call_module", "call_method")


def values_of(node: Node, known: dict[Node, Hashable], writes: int) -> Hashable:
    """Equal for nodes of equal values, as autocast's casts of one x for each of its readers are; `known` has those of
    its inputs, `writes` counts what may have written to memory before."""
    if node.target in _ALIASES:
        return known[args_of(node)[0]]
    if node.target not in RESHAPES or not isinstance(args_of(node)[0], Node):
        return node
    return known[args_of(node)[0]], made_by(node), writes, tags(node)


def made_by(node: Node) -> tuple:
    """Of one of RESHAPES: all but its input."""
    return node.target, repr(args_of(node)[1:]), repr(sorted(node.kwargs.items()))


def add_call(graph: Graph, like: Node, target: Any, args: tuple, kwargs: dict | None = None) -> Node:
    """A node that does what `like` did, or a part of it."""
    kwargs = dict(kwargs or {})
    values = map_arg(args, lambda each: each.meta["val"])
    with torch.no_grad(), _fake_mode(like.meta["val"]):
        result = target(*values, **kwargs)
    node = _like(graph.call_function(target, args, kwargs), like, result)
    if "eager_input_vals" in like.meta:  # by which Inductor keeps the layouts that a custom op is given
        node.meta["eager_input_vals"] = (values, kwargs)
    return node


def _fake_mode(value: Any) -> AbstractContextManager:
    """In which a tensor has a shape and no memory, for ops that are given none."""
    first = value[0] if isinstance(value, (list, tuple)) else value
    return getattr(first, "fake_mode", nullcontext())


def storage_of(node: Node) -> int | None:
    """Equal for tensors that share memory; None of what is no tensor, or has none."""
    value = node.meta.get("val")
    is_plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return value.untyped_storage()._cdata if is_plain else None


def add_item(graph: Graph, like: Node, node: Node, place: int) -> Node:
    """A node that takes one tensor of a list, as `like` did or what it did it from."""
    return _like(graph.call_function(operator.getitem, (node, place)), like, node.meta["val"][place])


def _like(node: Node, like: Node, value: object) -> Node:
    node.meta = {key: each for key, each in like.meta.items() if key not in ("eager_input_vals", "tensor_meta")}
    node.meta["val"] = value
    return node


def taken(node: Node) -> dict[int, list[Node]]:
    """The nodes that take each tensor of a list."""
    found: dict[int, list[Node]] = {}
    for user in node.users:
        found.setdefault(args_of(user)[1], []).append(user)
    return found


def move(items: Sequence[Node], node: Node, place: int) -> None:
    """Lets nodes take their tensor from elsewhere."""
    for each in items:
        each.args = (node, place)
        each.meta["val"] = node.meta["val"][place]
