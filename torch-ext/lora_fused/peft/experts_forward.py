"""What an experts module of transformers computes: its gate, how its weights are stored, whether its forward is the one
that `use_experts_implementation` describes.

The decorator's flags say what a forward should compute, and transformers' own grouped and batched forwards go by them.
A model's own forward (the implementation "eager") is held against them once: it runs on a copy of the module with three
small experts, and so does the oracle. The gate is recognised by its values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backends.reference import experts as oracle
from ..backends.reference.activations import ACTIVATIONS
from ..specs import AnyGate, ExpertWeights, Gate
from . import replaced

_MOE = "transformers.integrations.moe"
EAGER, GROUPED_MM = "eager", "grouped_mm"
_FORWARDS = {GROUPED_MM: "grouped_mm_experts_forward", "batched_mm": "batched_mm_experts_forward"}
_LIMITS, _SLOPES = ("limit", "swiglu_limit"), ("alpha", "swiglu_alpha")  # what gates call these attributes
_EXPERTS, _SIZE = 3, 16  # of the copy
_MOST_SEEN = 1024
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)  # no part of what a module computes


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
    numbers = [
        (name, value)
        for name, value in state.items()
        if name not in _OF_EVERY_MODULE and type(value) in (int, float, bool)
    ]
    key = cls, cls.forward, gate, implementation, _key_of(activation), tuple(numbers)
    if key not in _seen:
        if len(_seen) >= _MOST_SEEN:
            _seen.clear()
        _seen[key] = _look_at(base, implementation)
    return _seen[key]


_seen: dict[tuple, Form | str] = {}


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


def _activation_reason(activation: object) -> str | None:
    """Why an activation cannot be taken for the function of z that it was seen to be."""
    for name in ("silu", "gelu", "relu"):
        reason = replaced.function_reason(F, name)
        if reason:
            return reason
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
    public = [(name, value) for name, value in vars(activation).items() if name not in _OF_EVERY_MODULE]
    numbers = not public or all(type(value) in (int, float, bool, str) for _, value in public)
    return (type(activation), *public) if numbers else activation


def _look_at(base: nn.Module, implementation: str) -> Form | str:
    first = "gate_up_proj" if base.has_gate else "up_proj"
    leaves_out = implementation == EAGER or bool(base._is_expert_parallel)
    form = Form(first, bool(base.is_transposed), bool(base.has_bias), None, implementation, leaves_out)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            form = form._replace(gate=_recognise(base))
            same = _computes_as_described(base, form)
    except Exception as error:
        return f"{type(base).__name__} cannot be tried on three small experts: {type(error).__name__}: {error}"
    return form if same else f"{type(base).__name__}.forward computes something else than its gate between two products"


def _recognise(base: nn.Module) -> Gate | None:
    """The gate whose values are the module's, over and beyond its limit; None where there is none."""
    limit, slope = _number(base, _LIMITS), _number(base, _SLOPES)
    reach = 3.0 if limit is None else max(3.0, 2.0 * limit)
    z = _draw(torch.Generator().manual_seed(0), 512, 8) * reach
    seen, has_gate = gate_function(base)(z), bool(base.has_gate)
    plain = [Gate(activation, has_gate) for activation in ACTIVATIONS]
    layouts = [
        gate._replace(interleaved=split) for gate in plain for split in ((False, True) if has_gate else (False,))
    ]
    limits = {None, limit} if has_gate else {None}
    known = [gate._replace(limit=bound) for gate in layouts for bound in limits]
    if has_gate and slope is not None:
        known += [gate._replace(slope=slope, offset=1.0) for gate in known if gate.activation == "silu"]
    return next((gate for gate in known if _is_close(seen, oracle.gated(z, gate), 1e-12)), None)


def _number(base: nn.Module, names: tuple[str, ...]) -> float | None:
    found = [base.__dict__[name] for name in names if type(base.__dict__.get(name)) in (int, float)]
    return float(found[0]) if found else None


def _computes_as_described(base: nn.Module, form: Form) -> bool:
    """Whether the forward on three small experts gives what the oracle does."""
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float32 if form.implementation == GROUPED_MM else torch.float64  # torch's product knows no float64
    draw = lambda *sizes: _draw(generator, *sizes).to(dtype)  # noqa: E731
    width = _SIZE * (2 if base.has_gate else 1)
    up = ExpertWeights(draw(_EXPERTS, width, _SIZE), draw(_EXPERTS, width) if form.biased else None)
    down = ExpertWeights(draw(_EXPERTS, _SIZE, _SIZE), draw(_EXPERTS, _SIZE) if form.biased else None)
    parameters = {}
    for name, weights in ((form.first, up), ("down_proj", down)):
        stored = weights.weight.transpose(1, 2).contiguous() if form.transposed else weights.weight
        parameters[name] = nn.Parameter(stored, requires_grad=False)
        if form.biased:
            parameters[f"{name}_bias"] = nn.Parameter(weights.bias, requires_grad=False)
    copy = object.__new__(type(base))
    copy.__dict__.update(base.__dict__)
    copy.__dict__.update(_parameters=parameters, num_experts=_EXPERTS)
    x, routing = draw(5, _SIZE), draw(5, 2)
    index = torch.tensor([[0, 2], [2, 1], [1, 0], [0, 1], [2, 0]])
    seen = type(base).forward(copy, x, index, routing)
    gate: AnyGate = form.gate or gate_function(base)
    return _is_close(
        seen, oracle.lora_experts(x, index, routing, up, down, gate), 1e-10 if dtype == torch.float64 else 1e-4
    )


def _draw(generator: torch.Generator, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=generator, dtype=torch.float64, device="cpu")


def _is_close(seen: object, expected: Tensor, tolerance: float) -> bool:
    if not isinstance(seen, Tensor) or seen.shape != expected.shape or seen.dtype != expected.dtype:
        return False
    return bool((seen - expected).abs().max() <= tolerance * expected.abs().max())
