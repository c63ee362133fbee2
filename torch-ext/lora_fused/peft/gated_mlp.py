"""A gated MLP module becomes the projections of one Function, or the reason why its own forward runs.

What the module computes is recognised once (`mlp_tracer`); what its projections are is read at
every call (`peft.linear`).
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..call_context import CallContext, new_tuple
from ..last_call import GROUPED
from ..specs import Fallback, Projection
from . import linear as peft_linear, linear_call, mlp_tracer, replaced, scaling, small_batch
from .mlp_tracer import GatedMLP


class AdaptedMLP(NamedTuple):
    """Gate and up, or the one projection that holds both; down; the activation between them; the dtype of
    the module's result where its projections are quantized."""

    inputs: tuple[Projection, ...]
    output: Projection
    activation: str
    gate_half: int
    result_dtype: torch.dtype | None


class _Recognised(NamedTuple):
    """A structure and what it was found in. Weak, where something could hold the module itself."""

    structure: GatedMLP | Fallback
    forward: Callable
    code: types.CodeType | None
    functions: tuple[Callable, ...]
    # Name, module, its class's forward and __call__, its attributes.
    activations: tuple[tuple[str, weakref.ref, Callable, Callable, dict[str, Any]], ...]
    attributes: tuple[tuple[str, weakref.ref], ...]  # functions on the module itself
    dtype: torch.dtype | None  # of the weights, where the structure may depend on it


_is_traced = torch.compiler.is_dynamo_compiling
_PLAIN = (types.FunctionType, types.BuiltinFunctionType)
_recognised: weakref.WeakKeyDictionary[nn.Module, _Recognised] = weakref.WeakKeyDictionary()
# What activations are made of, as far as others replace it: a new tuple whenever one of them is another.
_functions = (F.silu, F.gelu, F.relu, torch.sigmoid, torch.tanh, torch.relu)


def structure_of(module: nn.Module) -> GatedMLP | Fallback:
    """What `mlp_tracer.recognise` says of the module, asked once while all that it ran stays in its place,
    and the dtype of its weights where that may matter."""
    known = _recognised.get(module)
    functions = _current_functions()
    if known is None or known.functions is not functions or not _is_as_it_was(module, known):
        structure, forward = mlp_tracer.recognise(module), type(module).forward
        if isinstance(structure, Fallback):  # for what any of its children does
            names, by_dtype = [name for name, _ in module.named_children()], True
        else:
            names, by_dtype = list(structure.activation_modules), structure.dtype is not None
        parts = ((name, module._modules[name]) for name in names)
        activations = tuple(
            (
                name,
                weakref.ref(part),
                type(part).forward,
                type(part).__call__,
                {} if isinstance(structure, Fallback) else _values_of(part),
            )
            for name, part in parts
        )
        attributes = tuple((name, weakref.ref(each)) for name, each in vars(module).items() if isinstance(each, _PLAIN))
        dtype = mlp_tracer.weights_dtype(module) if by_dtype else None
        code = getattr(forward, "__code__", None)
        known = _Recognised(structure, forward, code, functions, activations, attributes, dtype)
        _recognised[module] = known
    return known.structure


class TracedMLP(NamedTuple):
    """What Dynamo reads of a gated MLP, on the module itself: it compares values with what it read before, so that all
    modules of one kind have one graph. activations: name, class and attributes of each module. attributes: functions
    on the module. A pickle has None in its place, which needs no module of this package."""

    structure: GatedMLP
    forward: Callable
    functions: tuple[Callable, ...]
    activations: tuple[tuple[str, type, tuple[tuple[str, Any], ...]], ...]
    attributes: tuple[tuple[str, Callable], ...]

    def __reduce__(self):
        return type(None), ()

    def __deepcopy__(self, memo):
        return self


class _Bound(NamedTuple):
    """A `functools.partial` in a `TracedMLP`, where the object itself would differ from module to module."""

    function: Callable
    keywords: tuple[tuple[str, Any], ...]


TRACED = "_lora_fused_mlp"  # the attribute
_COMPILED = "_compiled_call_impl"  # what `module.compile()` leaves, and no forward reads
_VALUES = (int, float, str, type(None))


def prepare_trace(module: nn.Module) -> None:
    """Puts a `TracedMLP` on a module that Dynamo may trace, or takes it away where it would not do."""
    module.__dict__.pop(TRACED, None)
    structure = structure_of(module)
    if isinstance(structure, Fallback) or untraced_reason(module, structure):
        return
    activations = []
    for name in structure.activation_modules:
        part = module._modules[name]
        state = ((key, _described(value)) for key, value in _state_of(part).items())
        activations.append((name, type(part), tuple(state)))
    held = ((name, each) for name, each in vars(module).items() if name != _COMPILED and isinstance(each, _PLAIN))
    forward, functions = type(module).forward, _current_functions()
    vars(module)[TRACED] = TracedMLP(structure, forward, functions, tuple(activations), tuple(held))


def untraced_reason(module: nn.Module, structure: GatedMLP) -> str | None:
    """Why a gated MLP that is one Function in eager is not one op of a graph: what Dynamo would have to guard."""
    if structure.dtype is not None:
        return "its forward asks for dtypes"
    for name in structure.activation_modules:
        part = module._modules[name]
        if any([*part.parameters(), *part.buffers(), *part.children()]) or not _are_values(_state_of(part).values()):
            return f"{name} holds more than numbers and text"
    return None


def scaling_reason(module: nn.Module, structure: GatedMLP, adapted: AdaptedMLP) -> str | None:
    """The same of a gated MLP that was read: a scaling whose value an eager call alone reads."""
    for part, projection in zip(projections_of(module, structure), (*adapted.inputs, adapted.output)):
        lora_b = projection.operands.lora_b
        reason = None if lora_b is None else scaling.traced_reason(part, lora_b)
        if reason:
            return f"{_name(module, part)}: {reason}"
    return None


_BARE = nn.Module()


def _state_of(activation: nn.Module) -> dict[str, Any]:
    """Its attributes but those of every module, `training` among them, which no gated MLP depends on."""
    return {key: value for key, value in vars(activation).items() if key not in vars(_BARE) and key != "forward"}


def _values_of(activation: nn.Module) -> dict[str, Any]:
    """Those that are numbers, text, and functions with such keywords: none of them holds a module."""
    return {key: value for key, value in _state_of(activation).items() if _are_values((value,))}


def _are_values(values: Iterable[object]) -> bool:
    return all([isinstance(value, _VALUES) or _is_bound(value) for value in values])


def _is_bound(value: object) -> bool:
    """Whether a value is a builtin function with keywords that are values, as transformers' GELUTanh has one."""
    return (
        type(value) is functools.partial
        and isinstance(value.func, types.BuiltinFunctionType)
        and not value.args
        and all([isinstance(each, _VALUES) for each in value.keywords.values()])
    )


def _described(value: Any) -> Any:
    return _Bound(value.func, tuple(value.keywords.items())) if _is_bound(value) else value


def _is_described(now: Any, value: Any) -> bool:
    """Whether `_described` of an attribute as it is now would be `value`; Dynamo traces it."""
    if type(value) is not _Bound:
        return now == value
    if type(now) is not functools.partial or now.args:
        return False
    return now.func is value.function and tuple(now.keywords.items()) == value.keywords


def _traced_structure(module: nn.Module) -> GatedMLP | Fallback:
    """`structure_of` for Dynamo."""
    known = module.__dict__.get(TRACED)
    if known is None or type(module).forward is not known.forward:
        return Fallback("not a gated MLP")
    if not _are_current(known.functions):
        return Fallback("a function that its activation may call is replaced")
    for name, cls, state in known.activations:
        part = module._modules[name]
        if type(part) is not cls:
            return Fallback(f"{name} is another")
        for key, value in state:
            if not _is_described(getattr(part, key), value):
                return Fallback(f"{name}.{key} has changed")
    for name, function in known.attributes:
        if module.__dict__.get(name) is not function:
            return Fallback(f"{name} is another")
    return known.structure


def _current_functions() -> tuple[Callable, ...]:
    global _functions
    if not _are_current(_functions):
        _functions = (F.silu, F.gelu, F.relu, torch.sigmoid, torch.tanh, torch.relu)
    return _functions


def _are_current(functions: tuple[Callable, ...]) -> bool:
    """Whether `_functions` would be these now; Dynamo traces it."""
    silu, gelu, relu, sigmoid, tanh, plain_relu = functions
    return (
        F.silu is silu
        and F.gelu is gelu
        and F.relu is relu
        and torch.sigmoid is sigmoid
        and torch.tanh is tanh
        and torch.relu is plain_relu
    )


def _is_as_it_was(module: nn.Module, known: _Recognised) -> bool:
    forward = type(module).forward
    if forward is not known.forward or getattr(forward, "__code__", None) is not known.code:
        return False
    for name, ref, own_forward, call, state in known.activations:
        part = module._modules.get(name)
        if part is not ref() or type(part).forward is not own_forward or type(part).__call__ is not call:
            return False
        now = part.__dict__
        for key, value in state.items():
            if now.get(key) is not value:
                return False
    for name, ref in known.attributes:
        if (attribute := ref()) is None or vars(module).get(name) is not attribute:
            return False
    depends_on_dtype = isinstance(known.structure, Fallback) or known.structure.dtype is not None
    return not depends_on_dtype or known.dtype == mlp_tracer.weights_dtype(module)


def projections_of(module: nn.Module, structure: GatedMLP) -> tuple[nn.Module, ...]:
    """The modules of gate, up and down, or of the one that holds gate and up, and of down."""
    names = (structure.gate, structure.down) if structure.fused else (structure.gate, structure.up, structure.down)
    modules = module._modules
    return tuple([modules[name] for name in names])


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a gated MLP with a PEFT LoRA linear in it."""
    if not any(peft_linear.is_lora_linear(child) for child in module.children()):
        return False
    structure = structure_of(module)
    return not isinstance(structure, Fallback) and any(
        map(peft_linear.is_lora_linear, projections_of(module, structure))
    )


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The modules in a gated MLP whose calls others may change, itself apart."""
    parts = list(module._modules.values())
    return parts + [each for part in parts if peft_linear.is_lora_linear(part) for each in peft_linear.parts_of(part)]


def small_reason(module: nn.Module, x: Tensor, call: CallContext, rows: int | None = None) -> str | None:
    """Why its projections had better run alone, as PEFT runs them; as the first that has an adapter says. `rows` in
    place of x's own, where given."""
    if not call.grad:
        for part in module._modules.values():
            if peft_linear.is_lora_linear(part):
                return small_batch.small_reason(part, x, call, rows)
    return None


def read_mlp(module: nn.Module, x: Tensor, call: CallContext, check_features: bool = True) -> AdaptedMLP | Fallback:
    """What a gated MLP computes for x; without
    `check_features` for any x of its dtype and device."""
    structure = _traced_structure(module) if _is_traced() else structure_of(module)
    if isinstance(structure, Fallback):
        return structure
    if x.is_nested:
        return Fallback("x is nested")
    reason = _between_reason(module, structure)
    if reason:
        return Fallback(reason)
    if structure.dtype is not None and (x.dtype != structure.dtype or call.autocast is not None):
        return Fallback(
            f"its forward asks for dtypes, and x has {x.dtype}, the weights {structure.dtype}, or autocast is on"
        )
    parts = projections_of(module, structure)
    features = x.shape[-1] if check_features and x.dim() > 0 else None
    states: list[peft_linear.AdaptedLinear] = []
    projections: list[Projection] = []
    quantized = 0
    for part in parts:
        state = _read_part(part)
        if not isinstance(state, Fallback):
            # The last takes the product of the first ones' outputs, in x's dtype and on its device.
            given = None if part is parts[-1] else features
            state = _fallback_for(state, x, call, given, check_features) or state
        if isinstance(state, Fallback):
            return Fallback(f"{_name(module, part)}: {state.reason}")
        states.append(state)
        projections.append(state.projection)
        quantized += state.base.quantized is not None
    result_dtype = None
    if quantized == len(parts):
        dtypes = (linear_call.result_dtype(state, x) for state in states)
        result_dtype = functools.reduce(torch.promote_types, dtypes, x.dtype)
    elif quantized and call.autocast is not None:
        return Fallback("quantized and other projections under autocast, whose results differ in dtype")
    width, down_width = states[0].base.shape[0], states[-1].base.shape[1]
    if width != (2 * down_width if structure.fused else down_width) or states[-2].base.shape[0] != width:
        return Fallback("gate, up and down do not fit together")
    inputs, output = tuple(projections[:-1]), projections[-1]
    return new_tuple(AdaptedMLP, (inputs, output, structure.activation, structure.gate_half, result_dtype))


def _between_reason(module: nn.Module, structure: GatedMLP) -> str | None:
    """Why what the module calls between its projections is not what it was recognised as."""
    names = structure.activation_modules
    if names:
        watched = replaced.bypass_reason(names, [module._modules[name] for name in names])
        if watched:
            return watched
    for name in structure.dropouts:
        reason = _dropping_reason(name, module._modules[name])
        if reason:
            return reason
    return None


def _dropping_reason(name: str, dropout: nn.Module) -> str | None:
    """Why a child that was a dropout changes what it is given, or may do so."""
    if type(dropout) is not nn.Dropout:
        return f"{name} is a {type(dropout).__name__}"
    if dropout.training and dropout.p > 0.0:
        return f"{name} drops between the projections"
    return replaced.bypass_reason((name,), (dropout,))


def _read_part(part: nn.Module) -> peft_linear.AdaptedLinear | Fallback:
    if not peft_linear.is_lora_linear(part):
        return peft_linear.read_plain(part)
    bound = part.__dict__.get("forward")
    if not isinstance(bound, types.MethodType) or bound.__func__ not in GROUPED:
        return Fallback("not kernelized" if bound is None else "another tool set its forward")
    watched = replaced.hooks_reason("the layer", part)
    return Fallback(watched) if watched else peft_linear.read_linear(part)


def _fallback_for(
    adapted: peft_linear.AdaptedLinear, x: Tensor, call: CallContext, features: int | None, own_rows: bool
) -> Fallback | None:
    """Why a projection of an input like x with so many features, its own where there are none, is not
    fused; `own_rows`: of as many rows as x has."""
    if adapted.base.own_forward:
        return Fallback(adapted.base.own_forward)
    fallback = linear_call.input_fallback(adapted, x, call, adapted.base.shape[1] if features is None else features)
    if fallback is not None:
        return fallback
    called = linear_call.own_forward_reason(adapted, x, call, None if own_rows else linear_call.FEW_ROWS + 1)
    return Fallback(called) if called else None


def _name(module: nn.Module, part: nn.Module) -> str:
    return next(name for name, child in module._modules.items() if child is part)
