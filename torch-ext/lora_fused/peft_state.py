"""The only file that knows PEFT's attribute names: a module becomes a projection, or the reason
why PEFT's own forward runs. Read anew at every call, so nothing here can go stale.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from .projection import Operands

_PLAIN_TENSORS = (Tensor, nn.Parameter)
_ADAPTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Adapted(NamedTuple):
    """A projection ready to compute: its tensors, its scaling, whether x may change dtype."""

    operands: Operands
    scaling: float
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
    if name in module.lora_variant:
        variant = type(module.lora_variant[name]).__name__
        return "DoRA" if variant == "DoraLinearVariant" else f"LoRA variant {variant}"
    if module.fan_in_fan_out:
        return "fan_in_fan_out stores the weight transposed"
    # Straight from the registries: nn.Module.__getattr__ would cost more than the checks do.
    modules = module._modules
    base = modules["base_layer"]
    dropout = modules["lora_dropout"]._modules[name]
    lora_a, lora_b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    if type(base) is not nn.Linear:
        return f"unknown base layer {type(base).__name__}"
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return f"adapter layers are {type(lora_a).__name__} and {type(lora_b).__name__}, not Linear"
    a, b = lora_a._parameters, lora_b._parameters
    if a["bias"] is not None or b["bias"] is not None:
        return "lora_bias"
    reason = (
        _dropout_reason(dropout)
        or _bypass_reason("base_layer", base)
        or _bypass_reason("lora_A", lora_a)
        or _bypass_reason("lora_B", lora_b)
        or _bypass_reason("lora_dropout", dropout)
    )
    if reason:
        return reason
    operands = Operands(base._parameters["weight"], base._parameters["bias"], a["weight"], b["weight"])
    scaling = module.scaling[name]
    if not isinstance(scaling, (int, float)):
        return f"scaling is a {type(scaling).__name__}, not a number"
    reason = _tensor_reason(operands, base.in_features, base.out_features)
    return reason or Adapted(operands, float(scaling), module.cast_input_dtype_enabled)


def _dropout_reason(dropout: nn.Module) -> Optional[str]:
    if type(dropout) is nn.Identity:
        return None
    if type(dropout) is not nn.Dropout:
        return f"dropout layer {type(dropout).__name__}"
    return "dropout in training" if dropout.training and dropout.p > 0 else None


def _bypass_reason(name: str, part: nn.Module) -> Optional[str]:
    """Other tools watch or replace the calls of inner modules; a fused forward would skip them."""
    if "forward" in part.__dict__:
        return f"{name} has a forward of its own, set by another tool"
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return f"{name} has hooks"
    return None


def _tensor_reason(operands: Operands, in_features: int, out_features: int) -> Optional[str]:
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
    if operands.weight.shape != (out_features, in_features):
        return f"weight has shape {tuple(operands.weight.shape)} (sharded or replaced)"
    return None


def call_reason(adapted: Adapted, x: object, args: tuple, kwargs: dict) -> Optional[str]:
    """Why this call, with this x, is PEFT's own to compute; None where it is fused."""
    if args or kwargs:
        given = ", ".join(kwargs) or "positional arguments"
        return f"the call passes {given}"
    weight = adapted.operands.weight
    if type(x) not in _PLAIN_TENSORS:
        return f"x is a {type(x).__name__}"
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        return f"x has shape {tuple(x.shape)}"
    if x.device != weight.device:
        return f"x is on {x.device}, the base weight on {weight.device}"
    dtypes = {tensor.dtype for tensor in (x, *adapted.operands) if tensor is not None}
    if torch.is_autocast_enabled(x.device.type):
        castable = x.is_floating_point() and torch.float64 not in dtypes
        return None if castable else f"autocast with x of {x.dtype} and float64"
    bias = adapted.operands.bias
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        return f"x of {x.dtype} on a base of {weight.dtype} without autocast"
    adapter = {adapted.operands.lora_a.dtype, adapted.operands.lora_b.dtype}
    if len(adapter) > 1 or (not adapted.casts_input and x.dtype not in adapter):
        return "adapter dtypes differ and input casting does not reconcile them"
    return None
