"""The only file that knows PEFT's attribute names: a module becomes a projection, or the reason
why PEFT's own forward runs. Read anew at every call, so nothing here can go stale.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .projection import Operands, Projection, ProjectionSpec

_PLAIN_TENSORS = (Tensor, nn.Parameter)
_ADAPTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Adapted(NamedTuple):
    """A projection ready to compute, and whether PEFT casts x to the adapter's dtype."""

    projection: Projection
    casts_input: bool


def is_lora_module(module: nn.Module) -> bool:
    """Whether a module is a PEFT LoRA layer of any kind (linear, embedding, quantised, ...)."""
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is PEFT's LoRA linear itself and no subclass, which may compute otherwise."""
    from peft.tuners.lora import Linear

    return type(module) is Linear


def linear_class() -> type[nn.Module]:
    """PEFT's LoRA linear, the class that `LoraLinear` takes the forward of."""
    from peft.tuners.lora import Linear

    return Linear


def root_classes() -> tuple[type[nn.Module], ...]:
    """Classes of which one stands at the root of every model that PEFT adapts, above all its layers."""
    from peft.tuners.tuners_utils import BaseTuner
    from transformers import PreTrainedModel

    return BaseTuner, PreTrainedModel


def read_linear(module: nn.Module) -> Union[Adapted, str]:
    """The projection that a `peft.tuners.lora.Linear` computes now, or why it is PEFT's to compute."""
    if module.disable_adapters:
        return "adapters are disabled"
    if module.merged:
        return "the adapter is merged into the base weight"
    names = [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return "no active adapter on this layer"
    if len(names) > 1:
        return f"several active adapters ({', '.join(names)})"
    return _read_adapter(module, names[0])


def _read_adapter(module: nn.Module, name: str) -> Union[Adapted, str]:
    # Straight from the registries: nn.Module.__getattr__ would cost more than the checks do.
    modules = module._modules
    base = modules["base_layer"]
    dropout = modules["lora_dropout"]._modules[name]
    lora_a, lora_b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    parts = {"base_layer": base, "lora_A": lora_a, "lora_B": lora_b, "lora_dropout": dropout}
    dora = None
    if name in module.lora_variant:
        variant = module.lora_variant[name]
        if type(variant) is not _dora_variant():
            return f"LoRA variant {type(variant).__name__}"
        dora = parts["lora_magnitude_vector"] = modules["lora_magnitude_vector"]._modules[name]
    transposed = module.fan_in_fan_out
    if type(base) is not nn.Linear and not (transposed and _is_conv1d(base)):
        return f"unknown base layer {type(base).__name__}"
    if transposed and type(base) is nn.Linear:
        return "fan_in_fan_out on a Linear"
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return f"adapter layers are {type(lora_a).__name__} and {type(lora_b).__name__}, not Linear"
    for part, inner in parts.items():
        reason = bypass_reason(part, inner)
        if reason:
            return reason
    p = _dropout(module, dropout, dora is not None)
    if isinstance(p, str):
        return p
    scaling = module.scaling[name]
    if not isinstance(scaling, (int, float)):
        return f"scaling is a {type(scaling).__name__}, not a number"
    a, b = lora_a._parameters, lora_b._parameters
    if a["bias"] is not None or (dora is not None and b["bias"] is not None):
        return "a bias where PEFT has none"
    if _has_any_global_hook():
        return "hooks on all modules"
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    if dora is not None and transposed and weight.requires_grad:
        return "DoRA on a trained Conv1D weight, whose gradient PEFT detaches in part"
    magnitude = None if dora is None else dora._parameters["weight"]
    operands = Operands(weight, bias, a["weight"], b["weight"], b["bias"], magnitude)
    shape = _shape(base, transposed)
    reason = _tensor_reason(operands, shape) or _fit_reason(operands, *(reversed(shape) if transposed else shape))
    if reason:
        return reason
    return Adapted(Projection(operands, float(scaling), _spec(p, transposed)), module.cast_input_dtype_enabled)


def read_plain(module: nn.Module) -> Union[Adapted, str]:
    """The base product of an `nn.Linear` that has no adapter, or why it must be called itself."""
    if type(module) is not nn.Linear:
        return f"{type(module).__name__}, not Linear"
    reason = bypass_reason("the linear", module)
    if reason:
        return reason
    operands = Operands(module._parameters["weight"], module._parameters["bias"])
    reason = _tensor_reason(operands, _shape(module, False))
    return reason or Adapted(Projection(operands, 1.0, _spec(0.0, False)), True)


@functools.lru_cache(maxsize=None)
def _dora_variant() -> type:
    from peft.tuners.lora.variants import DoraLinearVariant

    return DoraLinearVariant


@functools.lru_cache(maxsize=None)
def _spec(dropout: float, transposed: bool) -> ProjectionSpec:
    return ProjectionSpec(dropout, transposed)


def _is_conv1d(base: nn.Module) -> bool:
    return type(base).__name__ == "Conv1D" and type(base).__module__ == "transformers.pytorch_utils"


def _shape(base: nn.Module, transposed: bool) -> tuple[int, int]:
    if transposed:
        return base.nx, base.nf
    return base.out_features, base.in_features


def _dropout(module: nn.Module, dropout: nn.Module, dora: bool) -> Union[float, str]:
    """The probability that this call drops with. PEFT's DoRA asks the layer's training flag as well."""
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout:
        return f"dropout layer {type(dropout).__name__}"
    return float(dropout.p) if dropout.training and (module.training or not dora) else 0.0


def bypass_reason(name: str, part: nn.Module) -> Optional[str]:
    """Other tools watch or replace the calls of inner modules; a fused forward would skip them."""
    if "forward" in part.__dict__:
        return f"{name} has a forward of its own, set by another tool"
    return hooks_reason(name, part)


def hooks_reason(name: str, part: nn.Module) -> Optional[str]:
    """Whether somebody watches the calls of a module."""
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return f"{name} has hooks"
    return None


def _tensor_reason(operands: Operands, shape: tuple[int, int]) -> Optional[str]:
    device = operands.weight.device
    for name, tensor in zip(Operands._fields, operands):
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TENSORS:
            return f"{name} is a {type(tensor).__name__} (sharded or wrapped)"
        if tensor.is_meta:
            return f"{name} is on the meta device"
        if tensor.dtype not in _ADAPTER_DTYPES:
            return f"{name} has dtype {tensor.dtype}"
        if tensor.device != device:
            return f"{name} is on {tensor.device}, the base weight on {device}"
    if operands.weight.shape != shape:
        return f"weight has shape {tuple(operands.weight.shape)} (sharded or replaced)"
    return None


def _fit_reason(operands: Operands, n: int, k: int) -> Optional[str]:
    """An adapter that does not fit gets PEFT's own error."""
    a, b, magnitude = operands.lora_a.shape, operands.lora_b.shape, operands.magnitude
    if len(a) != 2 or a[1] != k or b != (n, a[0]):
        return f"lora_A has shape {tuple(a)} and lora_B {tuple(b)}, which do not fit"
    if magnitude is not None and magnitude.shape != (n,):
        return f"the magnitude has shape {tuple(magnitude.shape)}, which does not fit"
    return None


def call_reason(adapted: Adapted, x: object, args: tuple, kwargs: dict) -> Optional[str]:
    """Why this call, with this x, is PEFT's own to compute; None where it is fused."""
    if args or kwargs:
        given = ", ".join(kwargs) or "positional arguments"
        return f"the call passes {given}"
    if type(x) not in _PLAIN_TENSORS:
        return f"x is a {type(x).__name__}"
    if x.dim() < 1:
        return "x has no dimension"
    return input_reason(adapted, x, x.shape[-1])


def input_reason(adapted: Adapted, x: Tensor, features: int) -> Optional[str]:
    """Why PEFT computes an input of x's dtype, device and dimensions but with this many features."""
    operands, spec = adapted.projection.operands, adapted.projection.spec
    weight, bias = operands.weight, operands.bias
    if type(x) not in _PLAIN_TENSORS:
        return f"x is a {type(x).__name__}"
    if features != weight.shape[0 if spec.transposed else 1]:
        return f"x has shape {tuple(x.shape)}"
    if x.dim() == 1 and operands.magnitude is not None:
        return "DoRA of a vector, of which PEFT makes a matrix"
    if x.device != weight.device:
        return f"x is on {x.device}, the base weight on {weight.device}"
    if torch.is_autocast_enabled(x.device.type):
        double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in (x, *operands))
        return f"autocast with x of {x.dtype} and float64" if double or not x.is_floating_point() else None
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        return f"x of {x.dtype} on a base of {weight.dtype} without autocast"
    adapter = {tensor.dtype for tensor in (operands.lora_a, operands.lora_b, operands.lora_bias) if tensor is not None}
    if len(adapter) > 1 or (adapter and not adapted.casts_input and x.dtype not in adapter):
        return "adapter dtypes differ and input casting does not reconcile them"
    return None
