"""What an experts module of transformers computes: its gate, how its weights are stored, whether its forward is the one
that `use_experts_implementation` describes.

The decorator's flags say what a forward should compute, and transformers' own grouped and batched forwards go by them.
A model's own forward (the implementation "eager") is held against them once: it runs on a copy of the module with three
small experts, and so does the oracle. The gate is recognised by its values and gradients. What both may depend on is
looked at in every call: weights, an activation, numbers and text on the module; a module that holds more is not known.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backends.reference import experts as oracle, gates
from ..backends.reference.activations import ACTIVATIONS
from ..call_context import apart
from ..specs import AnyGate, ExpertWeights, Gate
from . import replaced
from .activation import FAR, GRID

_MOE = "transformers.integrations.moe"
EAGER, GROUPED_MM = "eager", "grouped_mm"
_FORWARDS = {GROUPED_MM: "grouped_mm_experts_forward", "batched_mm": "batched_mm_experts_forward"}
_LIMITS, _SLOPES = ("limit", "swiglu_limit"), ("alpha", "swiglu_alpha")  # what gates call these attributes
_EXPERTS, _SIZE = 3, 16  # of the copy
_MOST_SEEN = 1024
_OF_EVERY_MODULE = frozenset((*nn.Module().__dict__, "config", "act_fn", "forward")) - {"training"}
_VALUES = (int, float, bool, str, type(None))
_MODULES, _SECOND = {"act_fn"}, ("down_proj", "down_proj_bias")
_WEIGHTS = {True: {"gate_up_proj", "gate_up_proj_bias", *_SECOND}, False: {"up_proj", "up_proj_bias", *_SECOND}}
_COMPARED = (tuple, types.FunctionType, types.BuiltinFunctionType, type(None))  # keys of activations that tell a change
_AT_LIMITS = tuple(sign * part for sign in (1.0, -1.0) for part in (0.5, 0.99, 1.0, 1.01, 2.0))
_SCALES = (1.0, 1e-2, 1.0, 1e2, 1e4)  # of the rows of what is tried


class Form(NamedTuple):
    """What an experts module computes.

    first: name of the first product's weight. transposed: whether weights are stored [E, in, out]. biased: whether
    there are biases, named as the weights with "_bias". gate: None where it is to be asked itself. implementation:
    which of transformers' forwards runs. leaves_out: whether that leaves indices from E on out.
    """

    first: str
    transposed: bool
    biased: bool
    gate: Gate | None
    implementation: str
    leaves_out: bool


def form_of(base: nn.Module) -> Form | str:
    """What an experts module computes now, or why that is not known."""
    cls, state = type(base), base.__dict__
    reason = _decoration_reason(cls)
    if reason:
        return reason
    implementation = getattr(base.config, "_experts_implementation", None) or EAGER
    reason = _implementation_reason(implementation)
    if reason:
        return reason
    if base.has_post_expert_norm:
        return "a norm after each expert"
    activation = _activation_of(base)
    reason = _activation_reason(activation)
    if reason:
        return reason
    gate = cls._apply_gate if "_apply_gate" not in state else state["_apply_gate"]
    values = _values_of(base)
    if isinstance(values, str):
        return values
    key = cls, cls.forward, gate, implementation, _key_of(activation), values
    found = _seen.get(key)
    if found is None:
        if len(_seen) >= _MOST_SEEN:
            _seen.clear()
        found = _seen[key] = apart(_look_at, base, implementation)
    return found


_seen: dict[tuple, Form | str] = {}


def _values_of(base: nn.Module) -> frozenset | str:
    """The numbers and text on an experts module, or what else it holds that its forward may depend on."""
    state = base.__dict__
    parameters, weights = state["_parameters"].keys(), _WEIGHTS[bool(base.has_gate)]
    parts = [*(state["_modules"].keys() - _MODULES), *(parameters - weights), *state["_buffers"]]
    names = state.keys() - _OF_EVERY_MODULE  # in C: a look at all values of a module costs more than at their names
    values = frozenset([(name, state[name]) for name in names if type(state[name]) in _VALUES])
    if len(values) < len(names):
        parts += [name for name in names if not name.startswith("_") and type(state[name]) not in _VALUES]
    return f"{type(base).__name__} holds {', '.join(sorted(parts))} besides its weights" if parts else values


def gate_function(base: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module's own gate, a function of z."""
    return base._apply_gate if base.has_gate else base.act_fn


# What was found genuine: of a class, its forward with the interface and the forward that this holds; of an
# implementation, its function. Looked at again where one of them is another.
_decorated: dict[type, tuple] = {}
_implemented: dict[str, tuple] = {}


def _decoration_reason(cls: type[Any]) -> str | None:
    """Why a class's forward is none that the decorator made and nobody replaced."""
    moe, forward = sys.modules.get(_MOE), cls.forward
    code = getattr(forward, "__code__", None)
    known = _decorated.get(cls)
    if known is not None and known[0] is forward and known[1] is code:
        interface, original = forward.__closure__[0].cell_contents, forward.__closure__[1].cell_contents
        if interface is known[2] and original is known[3] and original.__code__ is known[4]:
            return None
    decorated = moe is not None and code is not None and code.co_filename == moe.__spec__.origin
    if not decorated or code.co_freevars != ("experts_interface", "original_forward"):
        return f"{cls.__name__} has no forward of transformers' use_experts_implementation"
    interface, original = [cell.cell_contents for cell in forward.__closure__]
    if interface is not moe.ALL_EXPERTS_FUNCTIONS:
        return f"{cls.__name__} has implementations of its own"
    owner = next(each for each in cls.__mro__ if "forward" in each.__dict__)
    if not replaced.is_defined_at(original, owner.__module__, f"{owner.__qualname__}.forward"):
        return f"{cls.__name__}.forward is replaced by {replaced.name_of(original)}"
    _decorated[cls] = forward, code, interface, original, original.__code__
    return None


def _implementation_reason(implementation: str) -> str | None:
    if implementation == EAGER:
        return None
    moe, name = sys.modules[_MOE], _FORWARDS.get(implementation)
    if name is None:
        return f"experts implementation {implementation!r} is none of grouped_mm, batched_mm and eager"
    found = moe.ALL_EXPERTS_FUNCTIONS.get(implementation)
    known, code = _implemented.get(implementation), getattr(found, "__code__", None)
    if known is not None and known[0] is found is getattr(moe, name) and known[1] is code:
        return None
    if found is not getattr(moe, name) or not replaced.is_defined_at(found, _MOE, name):
        return f"experts implementation {implementation!r} is replaced by {replaced.name_of(found)}"
    _implemented[implementation] = found, code
    return None


def _activation_of(base: nn.Module) -> object:
    return getattr(base, "act_fn", None)


_FUNCTIONS = "silu", "gelu", "relu"
_genuine: list[Any] = [None, None, None]  # the last of these functions that were found so


def _activation_reason(activation: object) -> str | None:
    """Why an activation cannot be taken for the function of z that it was seen to be."""
    if not (F.silu is _genuine[0] and F.gelu is _genuine[1] and F.relu is _genuine[2]):
        reasons = [replaced.function_reason(F, name) for name in _FUNCTIONS]
        if any(reasons):
            return next(filter(None, reasons))
        _genuine[:] = F.silu, F.gelu, F.relu
    if not isinstance(activation, nn.Module):
        return None
    nested = activation._parameters or activation._modules
    if nested and any(parameter.requires_grad for parameter in activation.parameters()):
        return "the activation has trained parameters"
    return replaced.bypass_reason(("the activation",), (activation,)) or replaced.module_reason(type(activation))


def _key_of(activation: object) -> object:
    """What an activation's values depend on, or the activation itself where it may be more than numbers."""
    if not isinstance(activation, nn.Module) or activation._parameters or activation._buffers or activation._modules:
        return activation
    state = activation.__dict__
    public = [(name, state[name]) for name in state.keys() - _OF_EVERY_MODULE]
    known = all([type(value) in _VALUES for _, value in public])
    return (type(activation), frozenset(public)) if known else activation


def _look_at(base: nn.Module, implementation: str) -> Form | str:
    first = "gate_up_proj" if base.has_gate else "up_proj"
    leaves_out = implementation == EAGER or bool(base._is_expert_parallel)
    form = Form(first, bool(base.is_transposed), bool(base.has_bias), None, implementation, leaves_out)
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=()):
            tried = _small_copy(base, form)
            if isinstance(_key_of(_activation_of(base)), _COMPARED):
                form = form._replace(gate=_recognise(tried))
            same = _computes_as_described(tried, form)
    except Exception as error:
        return f"{type(base).__name__} cannot be tried on three small experts: {type(error).__name__}: {error}"
    return form if same else f"{type(base).__name__}.forward computes something else than its gate between two products"


class _Configuration:
    """In place of a module's own, whose values nobody compares from call to call."""

    def __init__(self, implementation: str):
        self._experts_implementation = implementation

    def __getattr__(self, name: str):
        raise RuntimeError(f"it asks its configuration for {name}")


def _small_copy(base: nn.Module, form: Form) -> nn.Module:
    """An experts module with three small experts of random weights."""
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float32 if form.implementation == GROUPED_MM else torch.float64  # torch's product knows no float64
    parameters = {}
    for name, width in ((form.first, _SIZE * (2 if base.has_gate else 1)), ("down_proj", _SIZE)):
        sizes = (_SIZE, width) if form.transposed else (width, _SIZE)
        parameters[name] = nn.Parameter(_draw(generator, _EXPERTS, *sizes).to(dtype))
        if form.biased:
            parameters[f"{name}_bias"] = nn.Parameter(_draw(generator, _EXPERTS, width).to(dtype))
    tried = object.__new__(type(base))
    tried.__dict__.update(base.__dict__)
    modules = {name: copy.deepcopy(part).cpu() for name, part in base._modules.items()}
    own = dict(_parameters=parameters, _modules=modules, config=_Configuration(form.implementation))
    tried.__dict__.update(own, num_experts=_EXPERTS)
    return tried


def _recognise(tried: nn.Module) -> Gate | None:
    """The gate whose values and gradients are the module's, near and far, at its limit and beyond; None where there is
    none."""
    limit, slope, has_gate = _number(tried, _LIMITS), _number(tried, _SLOPES), bool(tried.has_gate)
    values = [value for value in (*GRID, *FAR) if abs(value) < 1e6]
    values += [] if limit is None else [limit * part for part in _AT_LIMITS]
    places = torch.randint(len(values), (2048, 8), generator=torch.Generator().manual_seed(0))
    z = torch.tensor(values, dtype=torch.float64)[places].requires_grad_()
    with torch.enable_grad():
        seen = gate_function(tried)(z)
        (dz,) = torch.autograd.grad(seen.sum(), z)
    plain = [Gate(activation, has_gate) for activation in ACTIVATIONS]
    layouts = [
        gate._replace(interleaved=split) for gate in plain for split in ((False, True) if has_gate else (False,))
    ]
    limits = {None, limit} if has_gate else {None}
    known = [gate._replace(limit=bound) for gate in layouts for bound in limits]
    if has_gate and slope is not None:
        known += [gate._replace(slope=slope, offset=1.0) for gate in known if gate.activation == "silu"]
    return next((gate for gate in known if _is_gate(gate, z.detach(), seen.detach(), dz)), None)


def _is_gate(gate: Gate, z: Tensor, seen: Tensor, dz: Tensor) -> bool:
    """Whether a gate has these values, and these gradients of their sum, up to rounding of what they are made of."""
    with torch.no_grad():
        expected, pull = gates.with_pullback(z, gate)
        if seen.shape != expected.shape or seen.dtype != expected.dtype:
            return False
        right = pull(torch.ones_like(expected))
    operands, found, rights = (gates.halves(each, gate) if gate.gated else (each,) for each in (z, dz, right))
    bound = 1e-12 * ((operands[0].abs() + 1.0) * (operands[-1].abs() + 1.0) + expected.abs())
    return all(bool(((a - b).abs() <= bound).all()) for a, b in ((seen, expected), *zip(found, rights)))


def _number(base: nn.Module, names: tuple[str, ...]) -> float | None:
    found = [base.__dict__[name] for name in names if type(base.__dict__.get(name)) in (int, float)]
    return float(found[0]) if found else None


def _computes_as_described(tried: nn.Module, form: Form) -> bool:
    """Whether the forward gives what the oracle does, rows of very different sizes each by itself, and its
    gradients."""
    up, down = (
        ExpertWeights(weight.transpose(1, 2) if form.transposed else weight, tried._parameters.get(f"{name}_bias"))
        for name, weight in ((name, tried._parameters[name]) for name in (form.first, "down_proj"))
    )
    dtype, generator = up.weight.dtype, torch.Generator().manual_seed(2)
    rows = torch.tensor(_SCALES, dtype=torch.float64).unsqueeze(1)
    x, routing, dy = (_draw(generator, len(rows), size) for size in (_SIZE, 2, _SIZE))
    x, routing, dy = (rows * x).to(dtype).requires_grad_(), routing.to(dtype).requires_grad_(), dy.to(dtype)
    index = torch.tensor([[0, 2], [2, 1], [1, 0], [0, 1], [2, 0]])
    leaves = [x, routing, *tried._parameters.values()]
    gate: AnyGate = form.gate or gate_function(tried)
    with torch.enable_grad():
        seen = type(tried).forward(tried, x, index, routing)
        expected = oracle.lora_experts(x, index, routing, up, down, gate)
        if not isinstance(seen, Tensor) or seen.shape != expected.shape or seen.dtype != expected.dtype:
            return False
        found, right = ([y, *torch.autograd.grad(y, leaves, dy)] for y in (seen, expected))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    return all(_is_close(a, b, tolerance) for a, b in zip(found, right))


def _draw(generator: torch.Generator, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=generator, dtype=torch.float64, device="cpu")


def _is_close(seen: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Of each row or matrix by itself."""
    size = expected.abs().flatten(1).amax(1)
    return bool(((seen - expected).abs().flatten(1).amax(1) <= tolerance * size).all())
