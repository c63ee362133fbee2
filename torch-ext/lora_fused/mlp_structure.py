"""Recognise a gated MLP, y = down(f(gate(x)) · up(x)), by what a module's forward computes.

The class's forward runs once on a symbol in place of x and on shallow copies in place of the
module and its children, whose calls are recorded instead of computed. The recorded graph must
hold the gated MLP and nothing else, in training and in evaluation. The activation is then
evaluated on a grid in float64 and compared with the formulas of `activation`: neither names nor
classes decide. The module, hooks, autograd state, random state and torch's own classes stay
untouched, so other threads may run models meanwhile.
"""

from __future__ import annotations

import inspect
import operator
import types
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple, Optional, Union

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import activation as formulas

# What an activation may be written with, besides a child module: called on one tensor and constants.
_POINTWISE_FUNCTIONS = frozenset(
    (
        nn.functional.silu,
        nn.functional.gelu,
        nn.functional.relu,
        torch.relu,
        torch.square,
        torch.pow,
        operator.pow,
    )
)
_POINTWISE_METHODS = frozenset(("relu", "square", "pow"))
_CHUNK_FORMS = (((2, -1), {}), ((2,), {"dim": -1}), ((), {"chunks": 2, "dim": -1}))
_CONTAINERS = (dict, list, set, OrderedDict)
# Relative to the argument and the result: rounding of another order of operations, no more.
TOLERANCE = 1e-13
# Uneven, so that no mean or extremum vanishes; far ends show a clamp, fine steps an approximation.
_GRID = tuple(sign * 1.0371 * 1.37**step for step in range(-18, 13) for sign in (1.0, -0.8137))
_FAR = (0.0, 3e2, -7e2, 6.6e4, -1e5, 1e12, -3e12, 1e30, -2e30)


@dataclass(frozen=True)
class GatedMLP:
    """y = down(f(gate(x)) · up(x)): names of direct children, f one of `activation.ACTIVATIONS`.

    `fused`: gate and up are one child, whose output is cut in two along its last dimension; the
    half of index `gate_half` is the gate. `activation_modules` names the children that make the
    activation, none where functions are called: their hooks, like the projections', are the
    caller's to look at.
    `input` is the parameter's name; the description holds for calls that leave the parameters in
    `optional` (*args and **kwargs included) at their defaults.
    """

    gate: str
    up: str
    down: str
    activation: str
    fused: bool
    gate_half: int = 0
    activation_modules: tuple[str, ...] = ()
    input: str = "x"
    optional: tuple[str, ...] = ()


class _Refusal(Exception):
    """The reason why a module is not a gated MLP."""


class _Branch(NamedTuple):
    """One factor of the product: a projection of x, its half, and what is applied to it."""

    projection: str
    half: Optional[int]
    chain: tuple[fx.Node, ...]


def recognise(module: nn.Module) -> Union[GatedMLP, str]:
    """The gated MLP that `type(module).forward` computes, or the reason why it is none.

    The instance's own forward is not looked at. Branches on the module's configuration are taken
    as it stands now, `training` excepted: both must compute the same. Takes under a millisecond
    for a module that is one.
    """
    try:
        found = _recognise(module, training=True)
        if found != _recognise(module, training=False):
            return "computes otherwise in training than in evaluation"
        return found
    except _Refusal as refusal:
        return str(refusal)
    except Exception as error:  # whatever a forward may raise on a symbol
        return f"cannot be traced: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _recognise(module: nn.Module, training: bool) -> GatedMLP:
    forward = type(module).forward
    name, optional = _parameters(forward)
    nodes = list(_trace(module, forward, training).nodes)
    children = module._modules
    x, result = nodes[0], nodes[-1].args[0]
    down, product = _projection(result, "the result")
    if not isinstance(product, fx.Node) or not _is_product(product):
        raise _Refusal(f"the input of {down} is not a product of two: {_show(product)}")
    first, second = (_branch(factor, x) for factor in product.args)
    gate, up = (first, second) if first.chain else (second, first)
    if not gate.chain:
        raise _Refusal("no activation on either factor of the product")
    if up.chain:
        raise _Refusal(f"both factors are more than a projection: {_show(up.chain[-1])} besides the gate's")
    fused = gate.half is not None
    if fused != (up.half is not None) or (fused and (gate.projection != up.projection or gate.half == up.half)):
        raise _Refusal("gate and up are neither two projections nor the two halves of one")
    projections = [gate.projection, down] + [up.projection] * (not fused)
    if len(set(projections)) != len(projections):
        raise _Refusal(f"a projection is used twice: {', '.join(projections)}")
    # x, down, product, result; the projections; for halves chunk and two items.
    expected = 4 + (4 if fused else 2) + len(gate.chain)
    if len(nodes) != expected:
        raise _Refusal(f"computes more than a gated MLP: {', '.join(map(_show, nodes[1:-1]))}")
    return GatedMLP(
        gate=gate.projection,
        up=up.projection,
        down=down,
        activation=_activation(gate.chain, children, training),
        fused=fused,
        gate_half=gate.half or 0,
        activation_modules=tuple(node.target for node in gate.chain if node.op == "call_module"),
        input=name,
        optional=optional,
    )


# ---- the recorded graph ----


def _show(node: object) -> str:
    if not isinstance(node, fx.Node):
        return repr(node)
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _projection(node: object, what: str) -> tuple[str, object]:
    """(name, input) of a child called on one input and nothing else."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        raise _Refusal(f"{what} is not a child module's result: {_show(node)}")
    return node.target, node.args[0]


def _is_product(node: fx.Node) -> bool:
    multiplies = node.op == "call_function" and node.target in (operator.mul, torch.mul)
    multiplies = multiplies or (node.op == "call_method" and node.target == "mul")
    return multiplies and len(node.args) == 2 and not node.kwargs


def _branch(node: object, x: fx.Node) -> _Branch:
    chain = []
    while isinstance(node, fx.Node):
        if node.op == "call_module" and node.args == (x,) and not node.kwargs:
            return _Branch(node.target, None, tuple(reversed(chain)))
        if node.op == "call_function" and node.target is operator.getitem:
            projection, half = _half(node, x)
            return _Branch(projection, half, tuple(reversed(chain)))
        _check_pointwise(node)
        chain.append(node)
        node = node.args[0]
    raise _Refusal(f"a factor of the product is not made from a projection of x: {_show(node)}")


def _half(node: fx.Node, x: fx.Node) -> tuple[str, int]:
    """(projection, index) of one of the two halves of a projection's last dimension."""
    chunk, index = node.args
    called = (chunk.op == "call_function" and chunk.target is torch.chunk) or (
        chunk.op == "call_method" and chunk.target == "chunk"
    )
    if not called or (chunk.args[1:], chunk.kwargs) not in _CHUNK_FORMS or index not in (0, 1):
        raise _Refusal(f"{_show(chunk)} does not cut the last dimension in two halves")
    projection, source = _projection(chunk.args[0], "what is cut in two")
    if source is not x:
        raise _Refusal(f"the input of {projection} is not x: {_show(source)}")
    return projection, index


def _check_pointwise(node: fx.Node) -> None:
    known = (
        node.op == "call_module"
        or (node.op == "call_function" and node.target in _POINTWISE_FUNCTIONS)
        or (node.op == "call_method" and node.target in _POINTWISE_METHODS)
    )
    if not known or node.all_input_nodes != list(node.args[:1]):
        raise _Refusal(f"{_show(node)} is no activation of one projection")


# ---- recording ----


def _parameters(forward: Callable) -> tuple[str, tuple[str, ...]]:
    """(the input's name, the names of all other parameters), of which none may be required."""
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        raise _Refusal("forward is not a plain function: a decorator may add what cannot be seen")
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if not parameters or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise _Refusal("forward takes no positional input")
    others = parameters[1:]
    variadic = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    required = [p.name for p in others if p.default is p.empty and p.kind not in variadic]
    if required:
        raise _Refusal(f"forward needs more than one input: {', '.join(required)}")
    return parameters[0].name, tuple(variadic.get(p.kind, "") + p.name for p in others)


def _trace(module: nn.Module, forward: Callable, training: bool) -> fx.Graph:
    graph = fx.Graph()
    tracer = _Tracer(graph)

    def record(path: str, args: tuple, kwargs: dict) -> fx.Proxy:
        if "." in path:
            raise _Refusal(f"calls {path}, which is not a direct child")
        return tracer.create_proxy("call_module", path, args, kwargs)

    copy = _stand_in(module, record)
    copy.__dict__["training"] = training
    before = _contents(copy)
    x = fx.Proxy(graph.placeholder("x"), tracer)
    with _SymbolsOnly():
        result = forward(copy, x)
    after = _contents(copy)
    if len(after) != len(before) or any(old is not new for old, new in zip(before, after)):
        raise _Refusal("forward changes the module's attributes")
    graph.output(tracer.create_arg(result))
    return graph


def _stand_in(module: nn.Module, record: Callable, path: str = "", seen: Optional[dict] = None) -> nn.Module:
    """A shallow copy of `module` whose descendants are copies that call `record(path, args, kwargs)`.

    A copy has its original's class and attributes, so that a forward that asks for them branches
    as it would; what it writes stays in the copy. Methods bound to the original are bound to the
    copy.
    """
    seen = {} if seen is None else seen
    if id(module) in seen:
        return seen[id(module)]
    copy = seen[id(module)] = object.__new__(type(module))
    state = copy.__dict__
    for key, value in module.__dict__.items():
        if isinstance(value, types.MethodType) and value.__self__ is module:
            value = types.MethodType(value.__func__, copy)
        state[key] = value.copy() if type(value) in _CONTAINERS else value
    if path:
        if type(module).__call__ is not nn.Module.__call__:
            raise _Refusal(f"{path} is a {type(module).__name__}, which defines how it is called")
        # What nn.Module.__call__ looks at first, before any hook.
        state["_compiled_call_impl"] = lambda *args, **kwargs: record(path, args, kwargs)
    prefix = f"{path}." if path else ""
    state["_modules"] = {
        name: part if part is None else _stand_in(part, record, prefix + name, seen)
        for name, part in module._modules.items()
    }
    return copy


def _contents(module: nn.Module) -> list:
    """Every attribute of a module and every item of a plain container among them."""
    found = []
    for key, value in module.__dict__.items():
        found += [key, value]
        if type(value) in _CONTAINERS:
            found += [*value, *(value.values() if isinstance(value, dict) else ())]
    return found


def _state() -> tuple:
    """Autograd and autocast as a forward may switch them around a part of its work."""
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


class _Tracer(GraphAppendingTracer):
    """Writes operations on symbols into a graph and refuses a change of autograd or autocast."""

    def __init__(self, graph: fx.Graph):
        super().__init__(graph)
        with torch._C.DisableTorchFunction():
            self.state = _state()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        with torch._C.DisableTorchFunction():
            if _state() != self.state:
                raise _Refusal("switches autograd or autocast within its forward")
        return super().create_node(*args, **kwargs)


class _SymbolsOnly(TorchFunctionMode):
    """Refuses every torch function that has no symbol to record: nothing is computed or drawn."""

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        if not any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs or {}))):
            raise _Refusal(f"calls {getattr(func, '__name__', func)} on something else than its input")
        return func(*args, **(kwargs or {}))


# ---- the activation ----


def _activation(chain: tuple[fx.Node, ...], children: dict, training: bool) -> str:
    """Which of `activation.ACTIVATIONS` a chain of calls on one tensor computes."""
    shown = ", ".join(map(_show, chain))
    with torch.no_grad():
        grid = torch.tensor(_GRID + _FAR, dtype=torch.float64, device="cpu").unsqueeze(0)
        value = grid.clone()
        for node in chain:
            value = _apply(node, value, children, training)
        if not isinstance(value, Tensor) or value.shape != grid.shape or value.dtype != grid.dtype:
            raise _Refusal(f"{shown} is no function by element")
        for name in formulas.ACTIVATIONS:
            expected = formulas.activate(grid, name)
            if bool(((value - expected).abs() <= TOLERANCE * (grid.abs() + expected.abs())).all()):
                return name
    raise _Refusal(f"unknown activation {shown}")


def _apply(node: fx.Node, value: Tensor, children: dict, training: bool) -> Tensor:
    arguments = value.clone()
    if node.op == "call_function":
        result = node.target(arguments, *node.args[1:], **node.kwargs)
    elif node.op == "call_method":
        result = getattr(arguments, node.target)(*node.args[1:], **node.kwargs)
    else:
        result = _call_module(node, children[node.target], arguments, training)
    if not torch.equal(arguments, value):
        raise _Refusal(f"{_show(node)} writes to its input")
    return result


def _call_module(node: fx.Node, module: nn.Module, value: Tensor, training: bool) -> Tensor:
    if len(node.args) != 1 or node.kwargs:
        raise _Refusal(f"{node.target} is called with more than one argument")
    if module._modules or module._parameters or module._buffers:
        raise _Refusal(f"{node.target} ({type(module).__name__}) has parameters, buffers or parts of its own")

    copy = _stand_in(module, record=lambda *_: None)
    copy.__dict__["training"] = training
    with _Deterministic():
        return type(module).forward(copy, value)


class _Deterministic(TorchDispatchMode):
    """Refuses operations that draw random numbers, before they draw."""

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _Refusal(f"draws random numbers: {func}")
        return func(*args, **(kwargs or {}))
