"""Merges the native group ops that read one x in a torch.fx graph of ATen ops: of a forward, or of a forward and its
backward.

Kernelized layers call `lora_forward` and `lora_backward` for each linear alone. Siblings, such as an attention's q, k
and v, are then one call a direction: x is read once for all t and once for all dA, and dx is one sum, made by the op,
where autograd adds up one dx a sibling. What is not understood stays as it is.

Calls form a group where
- x, the kind of adapter arithmetic and of dropout, and the tags of checkpoints are the same, and nothing in between
  writes to memory;
- no native op in between reads what one of the group gave: so merging makes no circle, and the projections of an x
  that many layers read (an encoder's output) are not computed and kept far ahead of their use.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.fx import Graph, Node

from . import seeds
from .calls import BACKWARD, FORWARD, OPS, SEEDS_OF, Backward, Forward, Group, T
from .nodes import RESHAPES, add_call, add_item, args_of, made_by, may_write, move, tags, taken, values_of

aten = torch.ops.aten


def merge_siblings(graph: Graph, one_draw: bool = True) -> int:
    """Merges the calls of a graph, and, with `one_draw`, draws the seeds of all masks at once. How many nodes are less
    calls: 0 where the graph is as it was."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    places: dict[Node, _Place] = {}
    merged = 0
    for calls in _groups(graph, _forward):
        if len(calls) > 1:
            places.update(_merge_forward(graph, calls))
            merged += len(calls) - 1
    if merged:
        stable_topological_sort(graph)
        for calls in _groups(graph, lambda node, _: _backward(node, places)):
            if len(calls) > 1:
                merged += _merge_backward(graph, calls)
        for columns in places:
            if not columns.users:
                graph.erase_node(columns)
    if one_draw:
        merged += seeds.draw_once(graph)
    if merged:
        stable_topological_sort(graph)
        graph.lint()
    return merged


class _Place(NamedTuple):
    """Where the t of one call is now: among the merged calls, each as it was before."""

    merged: Node
    calls: Sequence[Forward]
    member: int


def _groups(graph: Graph, read: Callable[[Node, dict], tuple[Hashable, object] | None]) -> list[list]:
    """The calls that can be merged, in the graph's order; `read` gives what the calls of a group have in common, and
    the call, of a node and of the values of all (`values_of`)."""
    found: list[list] = []
    open_groups: dict[Hashable, int] = {}  # by what they have in common, the place in `found`
    reached: dict[Node, int] = {}  # bits: the groups that a node depends on
    values: dict[Node, Hashable] = {}
    writes = 0
    for node in graph.nodes:
        values[node] = values_of(node, values, writes)
        depends = 0
        for needed in node.all_input_nodes:
            depends |= reached.get(needed, 0)
        writes += may_write(node)
        if node.target in OPS:
            open_groups = {key: i for key, i in open_groups.items() if not depends >> i & 1}
            common = read(node, values)
            if common is not None:
                key, call = common
                i = open_groups.setdefault((key, writes, tags(node)), len(found))
                if i == len(found):
                    found.append([])
                found[i].append(call)
                depends |= 1 << i
        if depends:
            reached[node] = depends
    return found


def _forward(node: Node, values: dict[Node, Hashable]) -> tuple[Hashable, Forward] | None:
    call = Forward.of(node) if node.target is FORWARD else None
    return None if call is None else ((values[call.x], call.bf16x3, any(call.group.masked)), call)


def _merge_forward(graph: Graph, calls: Sequence[Forward]) -> dict[Node, _Place]:
    """Makes one call of several; gives the place of each t that is used."""
    first = calls[0]
    group = Group.joined([call.group for call in calls])
    with graph.inserting_before(first.node):
        joined = None
        if any(group.masked):
            joined = add_call(graph, first.seeds, aten.cat.default, ([call.seeds for call in calls],))
        merged = add_call(graph, first.node, FORWARD, (first.x, *group.arguments(joined, first.bf16x3)))
        t = add_item(graph, first.node, merged, group.count)
    parts = [call.parts for call in calls]
    places, column = {}, 0
    for i, call in enumerate(calls):
        items = taken(call.node)
        for old, new in enumerate(_new_places(parts, i)):
            if old != call.group.count:
                move(items.get(old, ()), merged, new)
        for item in items.get(call.group.count, ()):
            with graph.inserting_before(item):
                columns = add_call(graph, item, aten.slice.Tensor, (t, 1, column, column + call.ranks))
            item.replace_all_uses_with(columns)
            graph.erase_node(item)
            places[columns] = _Place(merged, calls, i)
        column += call.ranks
        graph.erase_node(call.node)
    if not t.users:
        graph.erase_node(t)
    return places


def _new_places(parts: Sequence[Sequence[int]], i: int) -> Iterator[int]:
    """Where each tensor of call i is among those of all, t left out: `parts` are the numbers of each kind, by call."""
    start = 0
    for kind in range(len(parts[i])):
        before = sum(part[kind] for part in parts[:i])
        yield from range(start + before, start + before + parts[i][kind])
        start += 1 if kind == T else sum(part[kind] for part in parts)


def _backward(node: Node, places: dict[Node, _Place]) -> tuple[Hashable, tuple[Backward, _Place]] | None:
    call = Backward.of(node) if node.target is BACKWARD else None
    place = None if call is None else places.get(call.t)
    if place is None:
        return None
    own = place.calls[place.member]
    if call.reads_x and call.x is not own.x:
        return None
    if (call.bf16x3, call.group.count, call.group.ranks, call.group.masked) != (
        own.bf16x3, own.group.count, own.group.ranks, own.group.masked
    ):  # fmt: skip
        return None
    if any(own.group.masked) and call.seeds is not own.seeds:
        return None
    return (place.merged, call.need_dx), (call, place)


def _merge_backward(graph: Graph, found: Sequence[tuple[Backward, _Place]]) -> int:
    """Makes one call of several, and one sum of their dx; gives how many calls are less, 0 where what becomes of dx is
    not understood."""
    # Read again: the dx of calls that are merged by now may be a dy here.
    calls = {place.member: Backward.of(call.node) for call, place in sorted(found, key=lambda each: each[1].member)}
    first, place = found[0]
    if len(calls) != len(found) or None in calls.values():
        return 0
    items = {i: taken(call.node) for i, call in calls.items()}
    total = None
    if first.need_dx:
        dxs = [item for each in items.values() for item in each.get(0, ())]
        total = _sum_of(dxs) if len(dxs) == len(calls) else None
        if total is None:
            return 0
    last = max(call.node for call in calls.values())
    with graph.inserting_before(last):
        merged = add_call(graph, last, BACKWARD, _arguments(calls, place))
    start = int(first.need_dx)
    for i, call in calls.items():
        count = len(call.node.meta["val"]) - first.need_dx
        for j in range(count):
            move(items[i].get(first.need_dx + j, ()), merged, start + j)
        start += count
    if total is not None:
        _replace_sum(graph, total, merged)
    for call in calls.values():
        graph.erase_node(call.node)
    return len(calls) - 1


def _arguments(calls: dict[int, Backward], place: _Place) -> tuple:
    """Of one backward of all calls, by their place among the forwards; those of which no y has a gradient keep their
    columns of t."""
    dys: list[Node | None] = []
    unscaled: list[Node] = []
    needs: list[int] = []
    groups: list[Group] = []
    for i, forward in enumerate(place.calls):
        call = calls.get(i)
        dys += [None] * forward.group.count if call is None else call.dys
        unscaled += () if call is None else call.unscaled
        needs += [0] * forward.group.count if call is None else call.needs
        groups.append(forward.group.without_gradient() if call is None else call.group)
    any_call = next(iter(calls.values()))
    x = place.calls[0].x if any(call.reads_x for call in calls.values()) else any_call.x
    t, joined = args_of(any_call.t)[0], args_of(place.merged)[SEEDS_OF[FORWARD]]
    numbers = Group.joined(groups).arguments(joined, any_call.bf16x3)
    return dys, x, t, unscaled or None, *numbers, any_call.need_dx, needs


class _Sum(NamedTuple):
    """A sum of some dx and of others that is made pair by pair: what each dx goes through before it is added, dx first;
    the additions, the last one at the end; what else is added."""

    ways: list[list[Node]]
    additions: list[Node]
    others: list[Node]


def _sum_of(dxs: Sequence[Node]) -> _Sum | None:
    """The smallest sum that has every dx, each once and through the same casts, of which nothing else uses a part."""
    ways = [list(_reshaped(dx)) for dx in dxs]
    if len({tuple(map(made_by, way[1:])) for way in ways}) != 1:
        return None
    sums = [list(_additions_from(way[-1])) for way in ways]
    last = next((each for each in sums[0] if all(each in others for others in sums[1:])), None)
    if last is None:
        return None
    additions = sorted({each for some in sums for each in some[: some.index(last) + 1]})
    inside = {*additions, *(way[-1] for way in ways)}
    return _Sum(ways, additions, [arg for each in additions for arg in args_of(each) if arg not in inside])


def _reshaped(node: Node) -> Iterator[Node]:
    """A tensor, and its other dtypes and shapes in turn, as long as each has no other use."""
    yield node
    while len(node.users) == 1:
        (node,) = node.users
        if node.target not in RESHAPES:
            return
        yield node


def _additions_from(node: Node) -> Iterator[Node]:
    """The additions that a tensor goes through, as long as each result has no other use."""
    like = _layout(node)
    while len(node.users) == 1:
        (user,) = node.users
        is_sum = user.target is aten.add.Tensor and not user.kwargs and len(set(args_of(user))) == 2
        if not is_sum or any(not isinstance(each, Node) or _layout(each) != like for each in (*args_of(user), user)):
            return
        yield user
        node = user


def _layout(node: Node) -> tuple:
    """Shape and dtype, symbolic sizes by their names."""
    value = node.meta.get("val")
    return (tuple(map(str, value.shape)), value.dtype) if isinstance(value, torch.Tensor) else (node,)


def _replace_sum(graph: Graph, total: _Sum, merged: Node) -> None:
    """Puts the merged call's dx in place of the dx that were added."""
    last, (dx, *casts) = total.additions[-1], total.ways[0]
    with graph.inserting_before(last):
        result = add_item(graph, dx, merged, 0)
        for cast in casts:
            result = add_call(graph, cast, cast.target, (result, *args_of(cast)[1:]), cast.kwargs)
        for other in total.others:
            result = add_call(graph, last, aten.add.Tensor, (result, other))
    last.replace_all_uses_with(result)
    for node in (*reversed(total.additions), *(each for way in total.ways for each in reversed(way))):
        graph.erase_node(node)
