"""What PEFT's ParamWrappers on an experts module compute now: operands of `lora_experts`, or the reason why PEFT's own
forward runs. Read anew at every call, so nothing here can go stale.

Wrappers nest, one a parameter; the outermost stands for the whole module. A is stored [E·R, p], B [q, R·E] with the
expert as its fastest index, so that the delta of a parameter [E, ...] is Bₑ Aₑ, or its transpose where PEFT took the
parameter's second size for the input's (`_did_swap_in_out_features` is False).
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import last_call
from ..backends import native, select
from ..call_context import autocast_dtype, new_tuple
from ..specs import AnyGate, ExpertWeights, Fallback, StoredFactors
from . import replaced as replacements
from .base_layer import DTYPES, STRIDED, tensor_of, unfit_reason, unread
from .experts_forward import EAGER, GROUPED_MM, Form, form_of, gate_function
from .scaling import read_scaling

_INDEX_DTYPES = (torch.int64, torch.int32)
_ARGUMENTS = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))  # as experts' forwards call them
_CALLED = "x", "the index", "the routing weights"
_ADAPTER_LAYERS = "lora_A", "lora_B", "lora_dropout"
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")


INSIDE = "PEFT's own forward of the wrapper around it runs"
NO_ROWS = "no token has an expert, and the model's own forward leaves parameters without a gradient then"


class WrongInPeft(str):
    """Why PEFT's own forward runs, and what is wrong with what it computes there."""


class AdaptedExperts(NamedTuple):
    """An experts module ready to compute; `form` is what transformers says of it. Factors are `stored`, None where a
    product has no adapter, and not in `up` and `down`."""

    up: ExpertWeights
    down: ExpertWeights
    gate: AnyGate
    form: Form
    stored: tuple[StoredFactors | None, StoredFactors | None]


class Adapter(NamedTuple):
    """One parameter's active adapter as PEFT stores it, A [E·R, p] and B [q, R·E]. swapped: whether delta[e] is
    B[e] A[e], and not the transpose."""

    a: Tensor
    b: Tensor
    scaling: float
    swapped: bool


@functools.cache
def wrapper_class() -> type[nn.Module]:
    """PEFT's LoRA on a parameter."""
    from peft.tuners.lora.layer import ParamWrapper

    return ParamWrapper


# The tests of experts have passed on an NVIDIA GPU, of those with native ops, and on none of another vendor.
UNTRIED = "experts on a GPU in a variant without native ops, where their tests have not passed yet"


def is_param_wrapper(module: nn.Module) -> bool:
    """Whether a module is PEFT's LoRA on a parameter itself and no subclass, which may compute otherwise."""
    return type(module) is wrapper_class()


def chain_of(module: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """The wrappers from `module` inwards, and what they stand on."""
    wrappers = []
    while is_param_wrapper(module):
        wrappers.append(module)
        module = module._modules["base_layer"]
    return wrappers, module


def read_experts(module: nn.Module) -> AdaptedExperts | Fallback:
    """What the wrappers from `module` inwards compute now, or why that is PEFT's to compute. What all of PEFT's linears
    have in common `replaced.linear_reason` looks at."""
    for cls in (type(module), *_proxy_classes()):
        replaced = replacements.forward_reason(cls)
        if replaced:
            return Fallback(replaced)
    wrappers, base = chain_of(module)
    try:
        read = _parametrised_reason(wrappers, base) or _read(wrappers, base)
    except (KeyError, RuntimeError) as error:
        return unread(error)
    return Fallback(read) if isinstance(read, str) else read


def _read(wrappers: list[nn.Module], base: nn.Module) -> AdaptedExperts | str:
    # Of wrappers straight from their dictionaries: an attribute of a module is looked for in all of its classes first.
    adapted = {wrapper.__dict__["parameter_name"]: wrapper for wrapper in wrappers}
    for wrapper in wrappers:
        reason = _storage_reason(wrapper, base)
        if reason:
            return reason
    reason = _wrapper_reason(wrappers, base, adapted)
    if reason:
        return reason
    form = form_of(base)
    if isinstance(form, str):
        return form
    names = form.first, "down_proj"
    other = adapted.keys() - names
    if other:
        return (
            f"{', '.join(sorted(other))} is adapted, which is none of the products' weights {names[0]} and {names[1]}"
        )
    products = []
    for name in names:
        read = _read_product(adapted.get(name), base, name, form)
        if isinstance(read, str):
            return f"{name}: {read}"
        products.append(read)
    (up, first), (down, second) = products
    reason = _fit_reason(up, down, base)
    gate = form.gate or gate_function(base)
    return reason or new_tuple(AdaptedExperts, (up, down, gate, form, (first, second)))


def _wrapper_reason(wrappers: list[nn.Module], base: nn.Module, adapted: dict) -> str | None:
    if len(adapted) < len(wrappers):
        return "a parameter is wrapped twice"
    for wrapper in wrappers:
        state = wrapper.__dict__  # what PEFT's properties `disable_adapters` and `merged` give
        if state["_disable_adapters"]:
            return "adapters are disabled"
        if state["merged_adapters"]:
            return "the adapter is merged into the base weight"
    for inner in wrappers[1:]:
        bound = inner.__dict__.get("forward")
        if bound is not None and not replacements.is_own(bound, inner) and not last_call.is_of_kernel(inner):
            return f"the inner wrapper has a forward of its own, {replacements.name_of(bound)}"
        watched = replacements.hooks_reason("the inner wrapper", inner)
        if watched:
            return watched
    watched = replacements.bypass_reason(("the experts module",), (base,))
    return watched or ("hooks on all modules" if _has_any_global_hook() else None)


def _parametrised_reason(wrappers: list[nn.Module], base: nn.Module) -> str | None:
    """Of weights that something makes anew at every access: looking at them would make them, and PEFT keep what was
    made."""
    made = base._modules.get("parametrizations")
    if made is None:
        return None
    adapted = {wrapper.parameter_name: wrapper for wrapper in wrappers}
    for name, parametrizations in made._modules.items():
        kind = type(next(iter(parametrizations._modules.values())))
        if kind.__module__.startswith("peft."):
            return INSIDE
        wrapper = adapted.get(name)
        if wrapper is not None and _leaves_proxies() and wrapper.num_experts > 1 and len(_active(wrapper)) == 1:
            return WrongInPeft(
                f"{name} is parametrised ({kind.__name__}), where this PEFT adds one more delta at every call and "
                "never takes one away: from the second call on results are wrong. Merge the adapter, or do not "
                "quantize the experts"
            )
    return f"weights are parametrised ({', '.join(made._modules)})"


def _storage_reason(wrapper: nn.Module, base: nn.Module) -> str | None:
    """Of a parameter that is no weight of experts in floating point."""
    name = wrapper.__dict__["parameter_name"]
    weight = base._parameters.get(name, base.__dict__.get(name))
    if weight is None:
        return f"{type(base).__name__} has no parameter {name}: another tool has put it in between, or taken that out"
    if weight.dim() != 3:
        return f"{name} of {type(base).__name__} is no weight of experts: shape {tuple(weight.shape)}"
    if weight.dtype in DTYPES or str(weight.dtype).removeprefix("torch.") not in _FLOAT8:
        return None
    if not hasattr(base, f"{name}_scale_inv"):
        return f"{name} has dtype {weight.dtype}"
    return WrongInPeft(
        f"{name} has dtype {weight.dtype}, quantized with scales, and PEFT adds the delta to the codes, not to what "
        "they stand for: the adapter has next to no effect. Do not adapt quantized experts"
    )


@functools.cache
def _proxy_classes() -> tuple[type[nn.Module], ...]:
    """Whose forwards make the adapted parameter in PEFT's own forward."""
    layer = importlib.import_module(wrapper_class().__module__)
    names = "_LoraParameterProxy", "_LoraFactorsProxy"
    return tuple(getattr(layer, name) for name in names if hasattr(layer, name))


@functools.cache
def _leaves_proxies() -> bool:
    """Whether PEFT parametrises with factors and takes only deltas off again (0.21)."""
    layer = importlib.import_module(wrapper_class().__module__)
    remove = getattr(wrapper_class(), "_remove_parametrizations", None)
    proxy = "_LoraFactorsProxy"
    return hasattr(layer, proxy) and remove is not None and proxy not in remove.__code__.co_names


def _active(wrapper: nn.Module) -> list[str]:
    state = wrapper.__dict__
    active, adapters = state["_active_adapter"], state["_modules"]["lora_A"]._modules  # as `active_adapters` has it
    return [name for name in ((active,) if isinstance(active, str) else active) if name in adapters]


def _read_product(
    wrapper: nn.Module | None, base: nn.Module, name: str, form: Form
) -> tuple[ExpertWeights, StoredFactors | None] | str:
    weight = tensor_of(base, name)
    bias = tensor_of(base, f"{name}_bias") if form.biased else None
    device = weight.device
    reason = unfit_reason("the weight", weight, device)
    if reason is None and bias is not None:
        reason = unfit_reason("the bias", bias, device)
    if reason:
        return reason
    if weight.dim() != 3:
        return f"shape {tuple(weight.shape)}, expected three dimensions"
    if weight.requires_grad:
        return "the base weight is trained"
    adapter = None if wrapper is None else _read_adapter(wrapper, weight, device)
    if isinstance(adapter, str):
        return adapter
    if form.transposed:
        weight = weight.transpose(1, 2)
    if adapter is None:
        return ExpertWeights(weight, bias), None
    a, b, scaling, swapped = adapter
    stored = new_tuple(StoredFactors, (a, b, swapped == form.transposed))  # the delta of the weight [N, K] is (B A)ᵀ
    return new_tuple(ExpertWeights, (weight, bias, None, None, scaling)), stored


def _read_adapter(wrapper: nn.Module, weight: Tensor, device: torch.device) -> Adapter | str:
    """The active adapter of a parameter [E, ., .] on `device`."""
    state = wrapper.__dict__
    active, modules = _active(wrapper), state["_modules"]
    if len(active) != 1:
        return f"several active adapters ({', '.join(active)})" if active else "no active adapter on this parameter"
    (name,), variants = active, state["lora_variant"]
    if name in variants:
        return f"LoRA variant {type(variants[name]).__name__}"
    lora_a, lora_b, dropout = layers = [modules[part]._modules[name] for part in _ADAPTER_LAYERS]
    if not (type(lora_a) is nn.Linear and type(lora_b) is nn.Linear and type(dropout) is nn.Identity):
        return f"adapter layers are {', '.join(type(layer).__name__ for layer in layers)}"
    if tensor_of(lora_a, "bias") is not None or tensor_of(lora_b, "bias") is not None:
        return "a bias where PEFT has none"
    a, b, experts = tensor_of(lora_a, "weight"), tensor_of(lora_b, "weight"), state["num_experts"]
    reason = unfit_reason("lora_A", a, device) or unfit_reason("lora_B", b, device)
    if reason:
        return reason
    scaling = read_scaling(state["scaling"][name], b)
    if isinstance(scaling, Fallback):
        return scaling.reason
    if isinstance(scaling, Tensor):
        return "scaling is a tensor on a GPU"
    swapped = bool(state.get("_did_swap_in_out_features", False))
    of_weight, *sizes = weight.shape
    q, p = sizes if swapped else reversed(sizes)
    rank = a.shape[0] // experts
    fits = rank and experts > 1 and of_weight == experts
    if not fits or a.shape != (experts * rank, p) or b.shape != (q, experts * rank):
        return (
            f"lora_A of shape {tuple(a.shape)} and lora_B of {tuple(b.shape)} on a parameter of {tuple(weight.shape)}"
        )
    return new_tuple(Adapter, (a, b, scaling, swapped))


def _fit_reason(up: ExpertWeights, down: ExpertWeights, base: nn.Module) -> str | None:
    experts, width, _ = up.weight.shape
    inner = down.weight.shape[2]
    if down.weight.shape[0] != experts or base.num_experts != experts or width != inner * (2 if base.has_gate else 1):
        return (
            f"weights of shapes {tuple(up.weight.shape)} and {tuple(down.weight.shape)} for {base.num_experts} experts"
        )
    for weights in (up, down):
        if weights.bias is not None and weights.bias.shape != weights.weight.shape[:2]:
            return f"a bias of shape {tuple(weights.bias.shape)} on weights of {tuple(weights.weight.shape)}"
    if up.bias is None and down.bias is None and up.weight.dtype is down.weight.dtype:
        return None
    dtypes = {tensor.dtype for tensor in (up.weight, down.weight, up.bias, down.bias) if tensor is not None}
    return f"weights of several dtypes ({', '.join(sorted(map(str, dtypes)))})" if len(dtypes) > 1 else None


def read_call(adapted: AdaptedExperts, x: Any, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor] | Fallback:
    """(index, routing) of a call, or why it is PEFT's own to compute."""
    given: tuple[Any, ...] = args
    if kwargs:
        named = next((names for names in _ARGUMENTS if set(names[len(args) :]) == kwargs.keys()), None)
        if named is None:
            return Fallback(f"the call passes {', '.join(kwargs)}")
        given = *args, *(kwargs[name] for name in named[len(args) :])
    if len(given) != 2:
        return Fallback(f"the call passes {len(given)} arguments besides x")
    if not adapted.up.weight.is_cpu and not native.available:
        return Fallback(UNTRIED)
    reason = _tensors_reason(adapted, x, *given) or _values_reason(adapted, x, *given)
    if reason:
        return Fallback(reason)
    index = given[0]
    lowest = int(index.min()) if index.is_cpu and index.numel() else 0
    if lowest < 0:
        return Fallback(f"the index has {lowest}, expected numbers of experts, from 0 on", raises=True)
    if adapted.form.implementation == EAGER and (not index.numel() or lowest >= len(adapted.up.weight)):
        return Fallback(NO_ROWS)
    return given


def _tensors_reason(adapted: AdaptedExperts, x: object, index: object, routing: object) -> str | None:
    device = adapted.up.weight.device
    for number, tensor in enumerate((x, index, routing)):
        if type(tensor) is not Tensor or tensor.layout is not STRIDED or tensor.dim() != 2:
            shape = tuple(getattr(tensor, "shape", ()))
            return f"{_CALLED[number]} is a {type(tensor).__name__} of shape {shape}, expected a dense matrix"
        if tensor.device != device:
            return f"{_CALLED[number]} is on {tensor.device}, the base weight on {device}"
    return None


def _values_reason(adapted: AdaptedExperts, x: Tensor, index: Tensor, routing: Tensor) -> str | None:
    weight, shape, (tokens, width) = adapted.up.weight, index.shape, x.shape
    if width != weight.shape[2] or shape != routing.shape or shape[0] != tokens:
        return (
            f"x has shape {tuple(x.shape)}, the index {tuple(index.shape)}, the routing weights {tuple(routing.shape)}"
        )
    if index.dtype not in _INDEX_DTYPES or x.dtype not in DTYPES or routing.dtype not in DTYPES:
        return f"x is of {x.dtype}, the index of {index.dtype}, the routing weights of {routing.dtype}"
    auto = autocast_dtype(x)
    if native.may_be_old:
        tensors = (x, *adapted.up.tensors, *adapted.down.tensors)
        computed = [tensor.dtype for tensor in tensors if tensor is not None] + ([] if auto is None else [auto])
        reason = select.old_gpu_reason(x, *computed)
        if reason:
            return reason
    if adapted.form.implementation != GROUPED_MM and (auto or x.dtype) != weight.dtype:
        under = "" if auto is None else f" under autocast to {auto}"
        return f"x of {x.dtype} on experts of {weight.dtype}{under}"
    if auto is not None and adapted.form.gate is None:
        return "autocast around a gate that is not known"
    return None
