"""Calls of the native group ops in a torch.fx graph, as what they were given.

The ops' schemas stand in torch-ext/torch_binding.cpp. A call whose arguments are not as expected here is none.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from .._ops import ops
from ..backends.native import GroupOperands, PackedWeight
from ..specs import NEED_A
from .nodes import args_of

FORWARD, BACKWARD = ops.lora_forward.default, ops.lora_backward.default
GATED_FORWARD, GATED_BACKWARD = ops.gated_forward.default, ops.gated_backward.default
SEEDS_OF = {FORWARD: 3, BACKWARD: 6, GATED_FORWARD: 3, GATED_BACKWARD: 5}  # of their arguments
X_OF = {BACKWARD: 1, GATED_BACKWARD: 1}  # of their arguments
OPS = frozenset(SEEDS_OF)
T = 1  # the place of t among `Forward.parts`
OPERANDS = len(GroupOperands._fields)
_WEIGHT, _LORA_A, _LORA_B, _MAGNITUDE, _MAG_NORM_SCALE = map(
    GroupOperands._fields.index, ("weights", "lora_a", "lora_b", "magnitudes", "mag_norm_scales")
)


@dataclass(frozen=True)
class Group:
    """What both ops take of the projections of one call: OPERANDS tensors of each, the scales of quantized weights,
    and numbers, one a projection or `PackedWeight` of each."""

    tensors: tuple[Node | None, ...]
    scales: tuple[Node, ...]
    scalings: tuple[float, ...]
    dropouts: tuple[float, ...] | None
    quantized: tuple[int, ...] | None

    @classmethod
    def of(cls, operands: Sequence, scalings: Sequence, dropouts: Sequence | None, quantized: Sequence | None):
        size = OPERANDS * len(scalings)
        return cls(
            tuple(operands[:size]),
            tuple(operands[size:]),
            tuple(scalings),
            None if dropouts is None else tuple(dropouts),
            None if quantized is None else tuple(quantized),
        )

    @property
    def count(self) -> int:
        return len(self.scalings)

    def each(self, operand: int) -> tuple[Node | None, ...]:
        """One operand of every projection."""
        return self.tensors[operand::OPERANDS]

    @property
    def masked(self) -> list[bool]:
        return [p != 0.0 for p in self.dropouts or (0.0,) * self.count]

    @property
    def made(self) -> int:
        """How many norms a forward makes."""
        return len([m for m in self.each(_MAGNITUDE) if m is not None])

    @property
    def scaled(self) -> int:
        """How many projections a forward gives the unscaled output of."""
        both = zip(self.each(_MAGNITUDE), self.each(_MAG_NORM_SCALE))
        return len([None for pair in both if pair != (None, None)])

    @property
    def given_scales(self) -> int:
        """How many projections a backward takes the unscaled output of."""
        return len([s for s in self.each(_MAG_NORM_SCALE) if s is not None])

    @property
    def ranks(self) -> int | None:
        """Σ R, None where it is not known."""
        sizes = [a.meta["val"].shape[0] for a in self.each(_LORA_A) if a is not None]
        return sum(sizes) if all(type(size) is int for size in sizes) else None

    def without_gradient(self) -> Group:
        """As a backward takes projections whose y has no gradient: what tells their places in t alone."""
        kept = (_WEIGHT, _LORA_A, _LORA_B)
        return Group(
            tuple(t if i % OPERANDS in kept else None for i, t in enumerate(self.tensors)),
            self.scales,
            self.scalings,
            self.dropouts,
            self.quantized,
        )

    @staticmethod
    def joined(groups: Sequence[Group]) -> Group:
        """The projections of all, one after another; a weight's place among the scales moves along."""
        tensors: list[Node | None] = []
        scales: list[Node] = []
        scalings: list[float] = []
        dropouts: list[float] = []
        quantized: list[int] = []
        for group in groups:
            numbers = group.quantized or PackedWeight() * group.count
            for i in range(group.count):
                packed = PackedWeight.of(numbers, i)
                quantized += packed._replace(first_scale=packed.first_scale + len(scales))
            tensors += group.tensors
            scales += group.scales
            scalings += group.scalings
            dropouts += group.dropouts or (0.0,) * group.count
        is_masked = any(group.dropouts is not None for group in groups)
        is_quantized = any(group.quantized is not None for group in groups)
        return Group(
            tuple(tensors),
            tuple(scales),
            tuple(scalings),
            tuple(dropouts) if is_masked else None,
            tuple(quantized) if is_quantized else None,
        )

    def arguments(self, seeds: Node | None, bf16x3: bool) -> tuple:
        """As both ops take them."""
        numbers = [None if each is None else list(each) for each in (self.dropouts, self.quantized)]
        return [*self.tensors, *self.scales], list(self.scalings), seeds, *numbers, bf16x3


@dataclass(frozen=True)
class Forward:
    """y of each projection; t; the unscaled output of each that DoRA scales; norms; mag_norm_scales."""

    node: Node
    x: Node
    group: Group
    seeds: Node | None
    bf16x3: bool
    ranks: int  # columns of t

    @classmethod
    def of(cls, node: Node) -> Forward | None:
        if node.kwargs or len(node.args) != 7 or not outputs_are_taken_apart(node):
            return None
        x, operands, scalings, seeds, dropouts, quantized, bf16x3 = args_of(node)
        group = _group(operands, scalings, seeds, dropouts, quantized)
        if group is None or not isinstance(x, Node) or type(bf16x3) is not bool or group.ranks is None:
            return None
        ranks = (3 if bf16x3 else 1) * group.ranks
        call = cls(node, x, group, seeds, bf16x3, ranks)
        values = node.meta["val"]
        is_known = len(values) == sum(call.parts) and values[group.count].shape[1] == ranks
        return call if is_known else None

    @property
    def parts(self) -> tuple[int, ...]:
        """How many tensors the op gives of each kind."""
        return self.group.count, 1, self.group.scaled, self.group.made, self.group.made


@dataclass(frozen=True)
class Backward:
    """dx, where it is needed, and the gradients of each projection in turn."""

    node: Node
    dys: tuple[Node | None, ...]
    x: Node
    t: Node
    unscaled: tuple[Node, ...]
    group: Group
    seeds: Node | None
    bf16x3: bool
    need_dx: bool
    needs: tuple[int, ...]

    @property
    def reads_x(self) -> bool:
        return any(need & NEED_A for need in self.needs)

    @classmethod
    def of(cls, node: Node) -> Backward | None:
        if node.kwargs or len(node.args) != 12 or not outputs_are_taken_apart(node):
            return None
        dys, x, t, unscaled, operands, scalings, seeds, dropouts, quantized, bf16x3, need_dx, needs = args_of(node)
        group = _group(operands, scalings, seeds, dropouts, quantized)
        if group is None or not isinstance(x, Node) or not isinstance(t, Node):
            return None
        unscaled = tuple(unscaled or ())
        is_known = len(dys) == len(needs) == group.count and len(unscaled) == group.given_scales
        if not is_known or type(need_dx) is not bool or type(bf16x3) is not bool:
            return None
        return cls(node, tuple(dys), x, t, unscaled, group, seeds, bf16x3, need_dx, tuple(needs))


def _group(operands, scalings, seeds, dropouts, quantized) -> Group | None:
    group = Group.of(operands, scalings, dropouts, quantized)
    size = len(PackedWeight._fields)
    is_known = (
        group.count > 0
        and len(group.tensors) == OPERANDS * group.count
        and None not in group.scales
        and all(isinstance(each, Node) and "val" in each.meta for each in operands if each is not None)
        and (dropouts is None or len(dropouts) == group.count)
        and (quantized is None or len(quantized) == size * group.count)
        and (_is_vector(seeds, group.count) if any(group.masked) else True)
    )
    return group if is_known else None


def _is_vector(node: object, size: int) -> bool:
    return isinstance(node, Node) and tuple(node.meta["val"].shape) == (size,)


def outputs_are_taken_apart(node: Node) -> bool:
    """Whether an op that gives a list has no user but those that take one of its tensors."""
    return isinstance(node.meta.get("val"), (list, tuple)) and all(
        user.op == "call_function" and user.target is operator.getitem and type(user.args[1]) is int
        for user in node.users
    )
