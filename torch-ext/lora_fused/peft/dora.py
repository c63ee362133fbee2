"""What PEFT's DoRA is on a kind of layer, and the module that holds an adapter's magnitude."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..specs import Fallback
from . import replaced

LINEAR, EMBEDDING = "Linear", "Embedding"
_is_traced = torch.compiler.is_dynamo_compiling
_FORWARDS = replaced.FORWARDS
_variants: dict[str, type] = {}


def _variant(layer: str) -> type:
    """PEFT's class that says of an adapter that it is DoRA, on a LINEAR or an EMBEDDING."""
    if not _variants:
        from peft.tuners.lora import variants

        _variants.update({kind: getattr(variants, f"Dora{kind}Variant") for kind in (LINEAR, EMBEDDING)})
    return _variants[layer]


def forwards(layer: str) -> tuple[type, type]:
    """The classes whose forwards run in PEFT's DoRA on a kind of layer."""
    from peft.tuners.lora import dora

    return _variant(layer), getattr(dora, f"Dora{layer}Layer")


def read_dora(module: nn.Module, name: str, layer: str) -> nn.Module | Fallback:
    """The module with the magnitude of an adapter that is of a variant of LoRA, which DoRA is and others are not."""
    variant = module.lora_variant[name]
    if type(variant) is not _variant(layer):
        return Fallback(f"LoRA variant {type(variant).__name__}")
    dora = module._modules["lora_magnitude_vector"]._modules[name]
    kind_of_variant: type[Any] = type(variant)
    kind_of_dora = type(dora)
    if (
        _is_traced()
        or _FORWARDS.get(kind_of_variant) is not kind_of_variant.forward
        or _FORWARDS.get(kind_of_dora) is not kind_of_dora.forward
    ):
        reason = replaced.forward_reason(kind_of_variant) or replaced.forward_reason(kind_of_dora)
        if reason:
            return Fallback(reason)
    return dora
