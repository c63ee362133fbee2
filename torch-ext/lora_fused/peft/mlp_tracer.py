"""Recognise a gated MLP, y = down(f(gate(x)) · up(x)), by what a module's forward computes.

The class's forward runs on a symbol in place of x and on shallow copies in place of the module
and its children; calls are recorded instead of computed. The record must hold the gated MLP and
nothing else, in training and in evaluation, with and without gradients. The activation is then evaluated and
differentiated on a grid in float64 and compared with the formulas of `reference.activations`: neither names nor
classes decide. The module, hooks, random state and torch's own classes stay untouched, so other threads may run
models meanwhile. (torch.fx patches nn.Module while it traces, and misses some autograd Functions.)
"""

from __future__ import annotations

import inspect
import operator
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..specs import Fallback
from .activation import activation_of

# What an activation may be written with besides child modules: called on one tensor and constants.
_POINTWISE = frozenset(("silu", "gelu", "relu", "square", "pow", "__pow__"))
_PRODUCT = frozenset(("mul", "__mul__", "__rmul__"))
_HALVES: tuple[tuple[tuple, dict], ...] = (((2, -1), {}), ((2,), {"dim": -1}), ((), {"chunks": 2, "dim": -1}))
# Questions to x that no symbol answers: its shape, dtype and device are properties read by __get__.
_QUESTIONS = frozenset(("__get__", "__bool__", "__len__", "__iter__", "size", "dim", "item"))
_CONTAINERS = (dict, list, set, OrderedDict)


@dataclass(frozen=True)
class GatedMLP:
    """y = down(f(gate(x)) · up(x)): names of direct children, f one of `activations.ACTIVATIONS`.

    `fused`: gate and up are one child, whose output is cut in two along its last dimension; the
    half of index `gate_half` is the gate. `activation_modules` names the children that make the
    activation, none where functions are called: their hooks, like the projections', are the
    caller's to look at.
    `input` is the parameter's name; the description holds for calls that leave the parameters in
    `optional` (*args and **kwargs included) at their defaults, while none of `dropouts`, children after the
    product or after down, drops anything, and where `dtype` is given, for an x, weights and products of that one.
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
    dropouts: tuple[str, ...] = ()
    dtype: torch.dtype | None = None


class _Refusal(Exception):
    """The reason why a module is not a gated MLP."""


@dataclass(frozen=True, eq=False)
class _Call:
    """One recorded call: of a child (its name) or of a function, on other calls and constants."""

    target: Any  # str or Callable
    args: tuple
    kwargs: dict

    @property
    def name(self) -> str:
        return self.target if isinstance(self.target, str) else getattr(self.target, "__name__", str(self.target))

    @property
    def is_child(self) -> bool:
        return isinstance(self.target, str)


class _Branch(NamedTuple):
    """One factor of the product: a projection of x, its half, and what is applied to it."""

    projection: str
    half: int | None
    chain: tuple[_Call, ...]


def recognise(module: nn.Module) -> GatedMLP | Fallback:
    """The gated MLP that `type(module).forward` computes, or the reason why it is none.

    The instance's own forward is not looked at. Branches on the module's attributes are taken as
    they stand now, `training` excepted. Takes about a millisecond.
    """
    try:
        found = _recognise(module, training=True)
        if found != _recognise(module, training=False):
            return Fallback("computes otherwise in training than in evaluation")
        return found
    except _Refusal as refusal:
        return Fallback(str(refusal))
    except Exception as error:  # whatever a forward may raise on a symbol
        return Fallback(f"cannot be traced: {type(error).__name__}: {' '.join(str(error).split())[:120]}")


def weights_dtype(module: nn.Module) -> torch.dtype | None:
    """The one floating-point dtype that the weights of a module's children have, None where there is none."""
    dtypes = {weight.dtype for weight in _weights(module)}
    return dtypes.pop() if len(dtypes) == 1 and all(dtype.is_floating_point for dtype in dtypes) else None


def _weights(module: nn.Module) -> list[Tensor]:
    """The weights of a module's children, none where they cannot all be read."""
    try:
        weights = [getattr(child, "weight", None) for child in module._modules.values()]
    except Exception:  # whatever a property may raise
        return []
    return [weight for weight in weights if isinstance(weight, Tensor)]


def _recognise(module: nn.Module, training: bool) -> GatedMLP:
    forward = type(module).forward
    name, optional = _parameters(forward)
    x, recorder, result = _record(module, forward, training)
    calls = recorder.calls
    dropouts: list[str] = []
    down, product = _projection(_before_dropouts(result, module, dropouts), "the result")
    product = _before_dropouts(product, module, dropouts)
    if not _is_product(product):
        raise _Refusal(f"the input of {down} is not a product of two: {_show(product)}")
    first, second = (_branch(factor, x) for factor in product.args)
    gate, up = (first, second) if first.chain else (second, first)
    if not gate.chain:
        raise _Refusal("no activation on either factor of the product")
    if up.chain:
        raise _Refusal(f"both factors are more than a projection: {_show(gate.chain[-1])}, {_show(up.chain[-1])}")
    fused = gate.half is not None
    if fused != (up.half is not None) or (fused and (gate.projection != up.projection or gate.half == up.half)):
        raise _Refusal("gate and up are neither two projections nor the two halves of one")
    projections = [gate.projection, down] + [up.projection] * (not fused)
    if len(set(projections)) != len(projections):
        raise _Refusal(f"a projection is used twice: {', '.join(projections)}")
    # Down and the product; the projections, or one with its chunk and two halves; the activation; dropouts.
    if len(calls) != 2 + (4 if fused else 2) + len(gate.chain) + len(dropouts):
        raise _Refusal(f"computes more than a gated MLP: {', '.join(map(_show, calls))}")
    return GatedMLP(
        gate=gate.projection,
        up=up.projection,
        down=down,
        activation=_activation(gate.chain, module._modules, training),
        fused=fused,
        gate_half=gate.half or 0,
        activation_modules=tuple(call.name for call in gate.chain if call.is_child),
        input=name,
        optional=optional,
        dropouts=tuple(dict.fromkeys(dropouts)),
        dtype=recorder.dtype if recorder.asked_dtype else None,
    )


# ---- what the record must hold ----


def _show(value: object) -> str:
    return value.name if isinstance(value, _Call) else f"a {type(value).__name__}"


def _projection(value: object, what: str) -> tuple[str, object]:
    """(name, input) of a child called on one input and nothing else."""
    if not isinstance(value, _Call) or not value.is_child or len(value.args) != 1 or value.kwargs:
        raise _Refusal(f"{what} is not a child module's: {_show(value)}")
    return value.name, value.args[0]


def _before_dropouts(value: Any, module: nn.Module, passed: list[str]) -> Any:
    """What goes into the dropouts that give `value`; their names are added to `passed`."""
    while isinstance(value, _Call) and value.is_child and type(module._modules.get(value.target)) is nn.Dropout:
        name, value = _projection(value, "a dropout's result")
        passed.append(name)
    return value


def _is_product(value: Any) -> bool:
    named = isinstance(value, _Call) and not value.is_child and value.name in _PRODUCT
    return named and len(value.args) == 2 and not value.kwargs


def _branch(value: object, x: _Call) -> _Branch:
    chain: list[_Call] = []
    while isinstance(value, _Call):
        if value.is_child and len(value.args) == 1 and value.args[0] is x and not value.kwargs:
            return _Branch(value.name, None, tuple(reversed(chain)))
        if value.target is operator.getitem:
            projection, source = _projection(value.args[0].args[0], "what is cut in halves")
            if source is not x:
                raise _Refusal(f"the input of {projection} is not x: {_show(source)}")
            return _Branch(projection, value.args[1], tuple(reversed(chain)))
        inputs = [leaf for leaf in tree_leaves((value.args, value.kwargs)) if isinstance(leaf, (_Call, Tensor))]
        if not (value.is_child or value.name in _POINTWISE) or not inputs or inputs != list(value.args[:1]):
            raise _Refusal(f"{_show(value)} is no activation of one projection")
        chain.append(value)
        value = value.args[0]
    raise _Refusal(f"a factor of the product is not made from a projection of x: {_show(value)}")


# ---- recording ----


class _Symbol(Tensor):
    """An empty tensor that stands for the result of `call`. A true tensor, since an autograd Function
    that gives back its input shows on tensors only, and forwards may ask whether x is one."""

    call: _Call


class _Recorder(TorchFunctionMode):
    """Records calls on symbols; refuses every other torch function, so nothing is computed or drawn. Symbols and
    weights of children have `dtype`; `asked_dtype` where that was asked."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.calls: list[_Call] = []
        self.state = _state()
        self.dtype, self.asked_dtype = weights_dtype(module), False
        self.weights = _weights(module)

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        if self.dtype is not None and getattr(func, "__self__", None) is Tensor.dtype:
            if isinstance(args[0], _Symbol) or any([args[0] is weight for weight in self.weights]):
                self.asked_dtype = True
                return self.dtype
        if not any(isinstance(leaf, _Symbol) for leaf in tree_leaves((args, kwargs))):
            raise _Refusal(f"calls {name} on something else than its input")
        if name in _QUESTIONS:
            raise _Refusal(f"reads {name} of a tensor: what it computes may depend on that")
        result = self.record(func, args, kwargs)
        if name == "chunk" and (args[1:], kwargs) in _HALVES:
            return self.record(operator.getitem, (result, 0)), self.record(operator.getitem, (result, 1))
        return result

    def child(self, path: str, args: tuple, kwargs: dict) -> _Symbol:
        if "." in path:
            raise _Refusal(f"calls {path}, which is not a direct child")
        with torch._C.DisableTorchFunction():
            return self.record(path, args, kwargs)

    def record(self, target: str | Callable, args: tuple, kwargs: dict | None = None) -> _Symbol:
        if _state() != self.state:
            raise _Refusal("switches autograd or autocast within its forward")
        call = _Call(target, tuple(map(_plain, args)), {key: _plain(value) for key, value in (kwargs or {}).items()})
        self.calls.append(call)
        return _symbol(call)


def _symbol(call: _Call) -> _Symbol:
    symbol = torch.empty(0, device="meta", dtype=torch.float32).as_subclass(_Symbol)
    symbol.call = call
    return symbol


def _plain(value: object) -> object:
    return value.call if isinstance(value, _Symbol) else value


def _state() -> tuple:
    """Autograd and autocast, which a forward may switch around a part of its work."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _parameters(forward: Callable) -> tuple[str, tuple[str, ...]]:
    """(the input's name, the names of all other parameters), of which none may be required."""
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        raise _Refusal("forward is not a plain function: a decorator may add what cannot be seen")
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if not parameters or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise _Refusal("forward takes no positional input")
    others = parameters[1:]
    variadic: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    required = [p.name for p in others if p.default is p.empty and p.kind not in variadic]
    if required:
        raise _Refusal(f"forward needs more than one input: {', '.join(required)}")
    return parameters[0].name, tuple(variadic.get(p.kind, "") + p.name for p in others)


def _record(module: nn.Module, forward: Callable, training: bool) -> tuple[_Call, _Recorder, object]:
    """(x, the record, the result) of one forward; gradients are on in training and off otherwise."""
    x = _Call("x", (), {})
    with torch.inference_mode(False), torch.set_grad_enabled(training):
        recorder, symbol = _Recorder(module), _symbol(x)
        copy = _stand_in(module, recorder.child)
        copy.__dict__["training"] = training
        before = _contents(copy)
        with recorder:
            result = forward(copy, symbol)
    after = _contents(copy)
    if len(after) != len(before) or any(old is not new for old, new in zip(before, after)):
        raise _Refusal("forward changes the module's attributes")
    return x, recorder, _plain(result)


def _stand_in(module: nn.Module, record: Callable, path: str = "", seen: dict | None = None) -> nn.Module:
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
        if "." not in path and type(module).__call__ is not nn.Module.__call__:
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


# ---- the activation ----


def _activation(chain: tuple[_Call, ...], children: dict, training: bool) -> str:
    """Which of `activations.ACTIVATIONS` a chain of calls on one tensor computes."""

    def chained(value: Tensor) -> Tensor:
        for call in chain:
            value = _apply(call, value, children, training)
        return value

    found = activation_of(chained)
    if isinstance(found, Fallback):
        raise _Refusal(f"{', '.join(map(_show, chain))} {found.reason}")
    return found


def _apply(call: _Call, value: Tensor, children: dict, training: bool) -> Tensor:
    argument = value.clone()
    if call.is_child:
        result = _call_module(call, children[call.name], argument, training)
    else:
        result = call.target(argument, *call.args[1:], **call.kwargs)
    if not torch.equal(argument, value):
        raise _Refusal(f"{call.name} writes to its input")
    return result


def _call_module(call: _Call, module: nn.Module, value: Tensor, training: bool) -> Tensor:
    if len(call.args) != 1 or call.kwargs:
        raise _Refusal(f"{call.name} is called with more than one argument")
    if module._modules or module._parameters or module._buffers:
        raise _Refusal(f"{call.name} ({type(module).__name__}) has parameters, buffers or parts of its own")
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
