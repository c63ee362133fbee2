"""One draw of all masks' seeds in a torch.fx graph, in place of one a call: each draw is a kernel of its own."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise

import torch
from torch.fx import Graph, Node

from .calls import OPS, SEEDS_OF
from .nodes import add_call, args_of, tags

aten = torch.ops.aten


def draw_once(graph: Graph) -> int:
    """Lets draws that are seeds of our ops and nothing else be parts of one draw of each kind; gives how many are
    less."""
    kinds: dict[Hashable, list[Node]] = {}
    for node in graph.nodes:
        if node.target is aten.randint.low and _is_of_seeds(node):
            low, high, _ = args_of(node)
            options = tuple(sorted(node.kwargs.items(), key=lambda each: each[0]))
            kinds.setdefault((low, high, options, tags(node)), []).append(node)
    several = [draws for draws in kinds.values() if len(draws) > 1]
    for draws in several:
        _replace(graph, draws)
    return sum(len(draws) - 1 for draws in several)


def _is_of_seeds(draw: Node) -> bool:
    return (
        len(args_of(draw)) == 3 and type(_count(draw)) is int and all(_takes_seeds(user, draw) for user in draw.users)
    )


def _count(draw: Node):
    (size,) = args_of(draw)[2] if len(args_of(draw)[2]) == 1 else (None,)
    return size


def _takes_seeds(user: Node, draw: Node) -> bool:
    """Whether a node reads the draw as its seeds, or joins it with others that are such seeds."""
    if user.target in OPS:
        return [arg for arg in user.all_input_nodes if arg is draw] == [draw] and _seeds_of(user) is draw
    return _is_joined(user) and all(each.target in OPS and _seeds_of(each) is user for each in user.users)


def _seeds_of(node: Node) -> Node | None:
    return args_of(node)[SEEDS_OF[node.target]]


def _is_joined(node: Node) -> bool:
    return node.target is aten.cat.default and len(args_of(node)) == 1 and not node.kwargs


def _replace(graph: Graph, draws: Sequence[Node]) -> None:
    """Makes one draw, in which those that are joined are next to each other."""
    known = set(draws)
    joined = dict.fromkeys(user for draw in draws for user in draw.users if _is_joined(user))
    whole = [node for node in joined if known.issuperset(args_of(node)[0])]
    starts: dict[Node, int] = {}
    total = 0
    for part in (*(args_of(node)[0] for node in whole), *([draw] for draw in draws)):
        total += total % 2  # 16 bytes: of an op that is given less Inductor takes no output to be aligned
        for draw in part:
            if draw not in starts:
                starts[draw] = total
                total += _count(draw)
    first = draws[0]
    low, high, _ = args_of(first)
    with graph.inserting_before(first):
        one = add_call(graph, first, aten.randint.low, (low, high, [total]), first.kwargs)
    for node in whole:
        if _are_in_turn(args_of(node)[0], starts):
            _take(graph, node, one, starts[args_of(node)[0][0]], node.meta["val"].shape[0])
    for draw in draws:
        _take(graph, draw, one, starts[draw], _count(draw))


def _are_in_turn(draws: Sequence[Node], starts: dict[Node, int]) -> bool:
    return all(starts[b] == starts[a] + _count(a) for a, b in pairwise(draws))


def _take(graph: Graph, node: Node, one: Node, start: int, count: int) -> None:
    """A part of the draw in place of a node. As strides, since Inductor would compute a slice by itself, in a kernel
    of its own."""
    if node.users:
        with graph.inserting_before(node):
            part = add_call(graph, node, aten.as_strided.default, (one, [count], [1], start))
        node.replace_all_uses_with(part)
    graph.erase_node(node)
