"""With `peft_base`, `peft_small` and `peft_embedding` the only files that know PEFT's attribute names: a module
becomes a projection, or the reason why PEFT's own forward runs. Read anew at every call, so nothing
here can go stale.
"""

from __future__ import annotations

import functools
import importlib
import operator
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..call_context import new_tuple
from ..specs import Fallback, Operands, Projection, ProjectionSpec, Quantized
from . import replaced
from .adapters import only_active
from .base_layer import Base, fit_reason, read_base, tensor_of, tensor_reason, unread
from .dora import LINEAR, forwards as dora_forwards, read_dora
from .scaling import read_scaling

_is_traced = torch.compiler.is_dynamo_compiling
_PARTS = ("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector")
PLAIN_SPEC = ProjectionSpec()
_FORWARDS, _CODES = replaced.FORWARDS, replaced.CODES


class Kind(NamedTuple):
    """One of PEFT's LoRA linears: where its class is, whether its forward takes x alone, whether its base
    is of a kind of its own, and whether under autocast its result may be wider than its base's."""

    module: str
    name: str
    only_x: bool = False
    opaque: bool = False
    promotes: bool = False


_KINDS = (
    Kind("layer", "Linear"),
    Kind("bnb", "Linear4bit", promotes=True),
    Kind("bnb", "Linear8bitLt", promotes=True),
    Kind("gptq", "GPTQLoraLinear", only_x=True, opaque=True),
    Kind("awq", "AwqLoraLinear", only_x=True, opaque=True, promotes=True),
    Kind("aqlm", "AqlmLoraLinear", only_x=True, opaque=True),
    Kind("eetq", "EetqLoraLinear", only_x=True, opaque=True, promotes=True),
    Kind("hqq", "HqqLoraLinear", opaque=True, promotes=True),
    Kind("torchao", "TorchaoLoraLinear", opaque=True),
)


class AdaptedLinear(NamedTuple):
    """A projection ready to compute.

    casts_input: whether PEFT casts x to the adapter's dtype.
    base: what is known of the base layer.
    training: whether the module is in training mode.
    promotes: as `Kind` has it.
    """

    projection: Projection
    casts_input: bool
    base: Base
    training: bool
    promotes: bool = False


def is_lora_module(module: nn.Module) -> bool:
    """Whether a module is a PEFT LoRA layer of any kind (linear, embedding, quantized, ...)."""
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


_kinds: dict[type, Kind] = {}


@functools.cache
def linear_kinds() -> dict[type, Kind]:
    """PEFT's LoRA linears that can be imported here, and what they are."""
    for kind in _KINDS:
        try:
            cls = getattr(importlib.import_module(f"peft.tuners.lora.{kind.module}"), kind.name, None)
        except ImportError:  # its quantization library is not here
            continue
        if cls is not None:
            _kinds[cls] = kind
    return _kinds


def is_lora_linear(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's LoRA linears itself and no subclass, which may compute otherwise."""
    return type(module) in (_kinds or linear_kinds())


_names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def note_names(root: nn.Module) -> None:
    """Remembers what LoRA modules are called in a model, for errors that they raise."""
    _names.update((module, name) for name, module in root.named_modules() if is_lora_module(module))


def name_of(module: nn.Module) -> str:
    """A LoRA module's name in the model that was kernelized, else its class and size."""
    return _names.get(module) or f"{type(module).__name__}({module.in_features}, {module.out_features})"


def call_base(module: nn.Module, x: Tensor) -> Tensor:
    """The base module's own result for x."""
    own = module._modules.get("quant_linear_module")  # what PEFT calls where it is there
    return (module._modules["base_layer"] if own is None else own)(x)


def root_classes() -> tuple[type[nn.Module], ...]:
    """Classes of which one stands at the root of every model that PEFT adapts, above all its layers."""
    from peft.tuners.tuners_utils import BaseTuner
    from transformers import PreTrainedModel

    return BaseTuner, PreTrainedModel


def read_linear(module: nn.Module, known: AdaptedLinear | None = None) -> AdaptedLinear | Fallback:
    """The projection that one of PEFT's LoRA linears computes now, or why it is PEFT's to compute. What all linears
    have in common `replaced.linear_reason` looks at. `known` was read of it before: where the module holds the very
    same tensors and numbers it is given again, and its tensors are not looked at."""
    cls = type(module)
    forward = cls.forward
    if _is_traced() or _FORWARDS.get(cls) is not forward or _CODES[cls] is not forward.__code__:
        reason = replaced.forward_reason(cls)
        if reason:
            return Fallback(reason)
    state = module.__dict__
    # What PEFT's properties `disable_adapters` and `active_adapter` give.
    if state["_disable_adapters"]:
        return Fallback("adapters are disabled")
    if state["merged_adapters"]:
        return Fallback("the adapter is merged into the base weight")
    active, adapters = state["_active_adapter"], state["_modules"]["lora_A"]._modules
    if len(active) == 1 and active[0] in adapters:  # a list of one, nearly always
        name = active[0]
    else:
        only = only_active(active, adapters)
        if isinstance(only, Fallback):
            return only
        name = only
    try:
        return _read_adapter(module, state, name, known)
    except (KeyError, RuntimeError) as error:
        return unread(error)


def _read_adapter(
    module: nn.Module, state: dict[str, Any], name: str, known: AdaptedLinear | None
) -> AdaptedLinear | Fallback:
    # Straight from the dictionaries. An attribute of a module is looked for in all of its classes first, by Python 3.11
    # twice more for a __getattr__ of its own: 0.1 µs each, 0.5 where the interpreter's cache of such looks has two in
    # one place.
    modules = state["_modules"]
    layer, kind = modules["base_layer"], (_kinds or linear_kinds())[type(module)]
    lora_a, lora_b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout, dora = modules["lora_dropout"]._modules[name], None
    if name in state["lora_variant"]:
        dora = read_dora(module, name, LINEAR)
        if isinstance(dora, Fallback):
            return dora
    # Before a weight is looked at, which may be a tool's to fetch from elsewhere.
    watched = replaced.bypass_reason(_PARTS, (lora_a, lora_b, dropout, dora))
    if watched:
        return Fallback(watched)
    transposed = state.get("fan_in_fan_out", False)
    base = read_base(layer, transposed, kind.opaque)
    if isinstance(base, Fallback):
        return base
    weight, bias, shape, quantized, _, own_forward, scales = base
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return Fallback(f"adapter layers are {type(lora_a).__name__} and {type(lora_b).__name__}, not Linear")
    if own_forward is None:  # what others do to the calls of a base that is called stays
        watched = replaced.bypass_reason(("base_layer",), (layer,))
        if watched:
            return Fallback(watched)
    p = 0.0 if type(dropout) is nn.Identity else _dropout(module, dropout, dora is not None)
    if isinstance(p, Fallback):
        return p
    scaling = state["scaling"][name]
    of_a, of_b = lora_a._parameters, lora_b._parameters
    try:
        a, b, bias_of_a, lora_bias = of_a["weight"], of_b["weight"], of_a["bias"], of_b["bias"]
    except KeyError:  # FSDP1 has taken some out
        a, b = tensor_of(lora_a, "weight"), tensor_of(lora_b, "weight")
        bias_of_a, lora_bias = tensor_of(lora_a, "bias"), tensor_of(lora_b, "bias")
    if bias_of_a is not None or (dora is not None and lora_bias is not None):
        return Fallback("a bias where PEFT has none")
    if _has_any_global_hook():
        return Fallback("hooks on all modules")
    magnitude = None if dora is None else tensor_of(dora, "weight")
    operands = new_tuple(Operands, (weight, bias, a, b, lora_bias, magnitude) + scales)
    if type(scaling) is not float:
        scaling = read_scaling(scaling, b)
        if isinstance(scaling, Fallback):
            return scaling
    plain = p == 0.0 and not transposed and quantized is None
    spec = PLAIN_SPEC if plain else _spec(p, transposed, quantized)
    casts_input, training = state.get("cast_input_dtype_enabled", True), state["training"]
    if known is not None and _is_as_read(known, operands, scaling, spec, base, (casts_input, training)):
        return known
    if dora is not None and transposed and weight.requires_grad:
        return Fallback("DoRA on a trained Conv1D weight, whose gradient PEFT detaches in part")
    reason = tensor_reason(operands, base, transposed)
    if reason is None and shape is not None:
        reason = fit_reason(operands, shape[0], shape[1])
    if reason:
        return Fallback(reason)
    projection = new_tuple(Projection, (operands, scaling, spec))
    reason = delta_reason(projection) if own_forward else None
    if reason:
        return Fallback(f"{reason} ({own_forward})")
    return new_tuple(AdaptedLinear, (projection, casts_input, base, training, kind.promotes))


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The modules that PEFT's forward of a layer calls: its base, and the parts of its active adapters."""
    modules, active = module._modules, module.active_adapter
    names = (active,) if isinstance(active, str) else active
    of_adapters = [modules[kind]._modules for kind in _PARTS if kind in modules]
    return [modules["base_layer"], *(parts[name] for parts in of_adapters for name in names if name in parts)]


def _is_as_read(
    known: AdaptedLinear, operands: Operands, scaling: float | Tensor, spec: ProjectionSpec, base: Base, flags: tuple
) -> bool:
    """Whether a module holds what was `known` of it. Tensors are compared as objects, a scaling that is one not by
    value, which would have to be waited for."""
    own_operands, own_scaling, own_spec = known.projection
    return (
        all(map(operator.is_, own_operands, operands))
        and (own_scaling is scaling or (type(own_scaling) is type(scaling) is float and own_scaling == scaling))
        and own_spec is spec
        and known.base[2:6] == base[2:6]
        and (known.casts_input, known.training) == flags
    )


def read_plain(module: nn.Module) -> AdaptedLinear | Fallback:
    """The base product of a linear that has no adapter, or why it must be called itself."""
    watched = replaced.bypass_reason(("the linear",), (module,))
    if watched:
        return Fallback(watched)
    try:
        base = read_base(module, False, False)
        if isinstance(base, Fallback):
            return base
        operands = Operands(base.weight, base.bias, None, None, None, None, *base.scales)
        reason = base.own_forward or tensor_reason(operands, base)
    except (KeyError, RuntimeError) as error:
        return unread(error)
    if reason:
        return Fallback(reason)
    return AdaptedLinear(Projection(operands, 1.0, _spec(0.0, False, base.quantized)), True, base, module.training)


def forwards() -> tuple[type, ...]:
    """The classes whose forwards run in one of PEFT's LoRA linears."""
    return (*linear_kinds(), *dora_forwards(LINEAR))


_specs: dict[tuple, ProjectionSpec] = {}


def _spec(dropout: float, transposed: bool, quantized: Quantized | None) -> ProjectionSpec:
    """One object for each, so that they can be compared as objects."""
    if _is_traced():
        return ProjectionSpec(dropout, transposed, quantized)
    key = dropout, transposed, quantized
    found = _specs.get(key)
    if found is None:
        found = _specs[key] = ProjectionSpec(dropout, transposed, quantized)
    return found


def has_dropout(module: nn.Module) -> bool:
    """Whether a linear may draw masks in training, whichever of its adapters is active."""
    return any([type(each) is not nn.Identity for each in module._modules["lora_dropout"]._modules.values()])


def _dropout(module: nn.Module, dropout: nn.Module, dora: bool) -> float | Fallback:
    """The probability that this call drops with. PEFT's DoRA asks the layer's training flag as well."""
    if type(dropout) is not nn.Dropout:
        return Fallback(f"dropout layer {type(dropout).__name__}")
    p = dropout.p
    if not 0.0 <= p <= 1.0:
        return Fallback(f"dropout probability {p}")
    return float(p) if dropout.training and (module.training or not dora) else 0.0


def delta_reason(projection: Projection) -> str | None:
    """Why PEFT computes a projection whose base is called."""
    operands, _, spec = projection
    if operands.magnitude is None:
        return None
    if spec.quantized is None:
        return "DoRA on a base that is called, its weight unknown"
    if spec.dropout > 0.0:
        return "DoRA with dropout on a base that is called"
    if operands.bias is not None and operands.bias.requires_grad:
        return "DoRA with a trained bias on a base that is called"
    return None
