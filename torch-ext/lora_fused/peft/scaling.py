"""The scaling of an adapter: a number, or the tensor that PEFT's compiled hot swap makes of it and fills anew at every
swap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..call_context import autocast_dtype
from ..specs import Fallback

_is_traced = torch.compiler.is_dynamo_compiling


def read_scaling(scaling: Any, lora_b: Tensor, traced: bool = False) -> float | Tensor | Fallback:
    """The scaling of an adapter with this B, or why PEFT's own forward has to use it. A tensor's value is read where
    that costs nothing; on a GPU it would have to be waited for, and a graph would be cut there, so it stays a tensor,
    which `specs.fold` multiplies B with. `traced`: as a trace reads it, also where none is running."""
    if isinstance(scaling, (int, float)):
        return float(scaling)
    if type(scaling) not in (Tensor, nn.Parameter):
        return Fallback(f"scaling is a {type(scaling).__name__}, not a number")
    if scaling.dim() != 0 or scaling.dtype == torch.bool or scaling.is_complex():
        return Fallback(f"scaling is a tensor of shape {tuple(scaling.shape)} and {scaling.dtype}, not a number")
    if scaling.requires_grad:
        return Fallback("scaling is trained")
    if not traced and _is_at_hand(scaling):
        return float(scaling)
    if scaling.device != lora_b.device and not scaling.is_cpu:
        return Fallback(f"scaling is on {scaling.device}, lora_B on {lora_b.device}")
    if (autocast_dtype(lora_b) or lora_b.dtype) == torch.float16:
        return Fallback("scaling is a tensor that is not read, and its product with lora_B may leave float16's range")
    return scaling


def _is_at_hand(scaling: Tensor) -> bool:
    return scaling.is_cpu and not _is_traced()


def traced_reason(module: nn.Module, lora_b: Tensor) -> str | None:
    """Why a graph has PEFT's own forward of a LoRA module, one of whose adapters is active, where an eager call reads
    the scaling's value."""
    (name,) = [name for name in module.active_adapters if name in module.scaling]
    read = read_scaling(module.scaling[name], lora_b, traced=True)
    return read.reason if isinstance(read, Fallback) else None
