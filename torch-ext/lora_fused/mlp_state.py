"""A gated MLP module becomes the projections of one Function, or the reason why its own forward runs.

What the module computes is recognised once (`mlp_structure`); what its projections are is read at
every call (`peft_state`).
"""

from __future__ import annotations

import functools
import weakref
from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from . import mlp_structure, peft_small, peft_state
from .autocast import autocast_dtype
from .mlp_structure import GatedMLP
from .projection import Projection


class AdaptedMLP(NamedTuple):
    """Gate and up, or the one projection that holds both; down; the activation between them; the dtype of
    the module's result where its projections are quantised."""

    inputs: tuple[Projection, ...]
    output: Projection
    activation: str
    gate_half: int
    result_dtype: Optional[torch.dtype]


class _Recognised(NamedTuple):
    structure: Union[GatedMLP, str]
    activations: tuple[Optional[weakref.ref], ...]


_recognised: weakref.WeakKeyDictionary[nn.Module, _Recognised] = weakref.WeakKeyDictionary()


def structure_of(module: nn.Module) -> Union[GatedMLP, str]:
    """What `mlp_structure.recognise` says of the module, asked once while its activation stays."""
    known = _recognised.get(module)
    if known is not None and not isinstance(known.structure, str):
        now = [module._modules.get(name) for name in known.structure.activation_modules]
        if any(ref() is not part for ref, part in zip(known.activations, now)):
            known = None
    if known is None:
        structure = mlp_structure.recognise(module)
        names = () if isinstance(structure, str) else structure.activation_modules
        known = _Recognised(structure, tuple(weakref.ref(module._modules[name]) for name in names))
        _recognised[module] = known
    return known.structure


def projections_of(module: nn.Module, structure: GatedMLP) -> tuple[nn.Module, ...]:
    """The modules of gate, up and down, or of the one that holds gate and up, and of down."""
    names = (structure.gate, structure.down) if structure.fused else (structure.gate, structure.up, structure.down)
    return tuple(module._modules[name] for name in names)


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a gated MLP with a PEFT LoRA linear in it."""
    if not any(peft_state.is_lora_linear(child) for child in module.children()):
        return False
    structure = structure_of(module)
    return not isinstance(structure, str) and any(map(peft_state.is_lora_linear, projections_of(module, structure)))


def is_small(module: nn.Module, x: object) -> bool:
    """Whether its projections had better run alone, as PEFT runs them; as the first that has an adapter says."""
    if not torch.is_grad_enabled():
        for part in module._modules.values():
            if peft_state.is_lora_linear(part):
                return peft_small.small_reason(part, x) is not None
    return False


def read_mlp(
    module: nn.Module, x: object, linear_layer: type, check_features: bool = True
) -> Union[AdaptedMLP, str]:
    """What a gated MLP computes for x, its LoRA linears being served by `linear_layer`; without
    `check_features` for any x of its dtype and device."""
    structure = structure_of(module)
    if isinstance(structure, str):
        return structure
    if not isinstance(x, Tensor):
        return f"x is a {type(x).__name__}"
    if x.is_nested:
        return "x is nested"
    for name in structure.activation_modules:
        reason = peft_state.hooks_reason(name, module._modules[name])
        if reason:
            return reason
    parts = projections_of(module, structure)
    states = []
    for part in parts:
        adapted = _read_part(part, linear_layer)
        if not isinstance(adapted, str):
            # The last takes the product of the first ones' outputs, in x's dtype and on its device.
            given = check_features and part is not parts[-1] and x.dim() > 0
            features = x.shape[-1] if given else _features(adapted.projection)
            adapted = peft_state.input_reason(adapted, x, features) or _called(adapted, x, check_features) or adapted
        if isinstance(adapted, str):
            return f"{_name(module, part)}: {adapted}"
        states.append(adapted)
    result_dtype = None
    quantised = [state.base.quantized is not None for state in states]
    if any(quantised):
        if all(quantised):
            dtypes = (peft_state.result_dtype(state, x) for state in states)
            result_dtype = functools.reduce(torch.promote_types, dtypes, x.dtype)
        elif autocast_dtype(x) is not None:
            return "quantised and other projections under autocast, whose results differ in dtype"
    *inputs, output = [state.projection for state in states]
    width, down_width = _outputs(inputs[0]), _features(output)
    if width != (2 * down_width if structure.fused else down_width) or any([_outputs(p) != width for p in inputs[1:]]):
        return "gate, up and down do not fit together"
    return AdaptedMLP(tuple(inputs), output, structure.activation, structure.gate_half, result_dtype)


def _read_part(part: nn.Module, linear_layer: type) -> Union[peft_state.Adapted, str]:
    if not peft_state.is_lora_linear(part):
        return peft_state.read_plain(part)
    if getattr(part.__dict__.get("forward"), "__func__", None) is not linear_layer.forward:
        return "not kernelized"
    return peft_state.hooks_reason("the layer", part) or peft_state.read_linear(part)


def _called(adapted: peft_state.Adapted, x: Tensor, check_features: bool) -> Optional[str]:
    return peft_state.called_reason(adapted, x, None if check_features else peft_state.FEW_ROWS + 1)


def _name(module: nn.Module, part: nn.Module) -> str:
    return next(name for name, child in module._modules.items() if child is part)


def _features(projection: Projection) -> int:
    return projection.shape[1]


def _outputs(projection: Projection) -> int:
    return projection.shape[0]
