"""How one call of a LoRA linear that was read (`linear`) is computed: fused, fused beside the base layer's own forward,
or by PEFT's own forward, as x, autocast and the gradient mode decide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import native, select
from ..call_context import CallContext
from ..specs import Fallback
from .base_layer import PLAIN_TENSORS, STRIDED, device_of
from .linear import AdaptedLinear, delta_reason

# Up to so many rows bitsandbytes multiplies with four-bit weights as they are, on any GPU.
FEW_ROWS = 4
OWN_FORWARD_OF_FEW_ROWS = f"base layer's own forward: evaluation of up to {FEW_ROWS} rows without a gradient"


def call_fallback(
    adapted: AdaptedLinear, x: Tensor, call: CallContext, args: tuple = (), kwargs: dict | None = None
) -> Fallback | None:
    """Why this call, with this x, is PEFT's own to compute; None where it is fused, its base layer with it or not."""
    if args or kwargs:
        given = ", ".join(kwargs or ()) or "positional arguments"
        return Fallback(f"the call passes {given}")
    if x.dim() < 1:
        return Fallback("x has no dimension")
    try:
        features = x.shape[-1]
    except RuntimeError:
        return Fallback("x is nested")
    return input_fallback(adapted, x, call, features)


def input_fallback(adapted: AdaptedLinear, x: Tensor, call: CallContext, features: int) -> Fallback | None:
    """Why PEFT computes an input of x's dtype, device and dimensions but with this many features."""
    operands, base = adapted.projection.operands, adapted.base
    if type(x) not in PLAIN_TENSORS:
        return Fallback(f"x is a {type(x).__name__}")
    if x.layout is not STRIDED:
        return Fallback(f"x has the layout {x.layout}")
    width = base.shape[1] if base.shape is not None else operands.lora_a.shape[1]
    if features != width:
        return Fallback(f"x has shape {tuple(x.shape)}")
    if operands.magnitude is not None and x.dim() == 1:
        return Fallback("DoRA of a vector, of which PEFT makes a matrix")
    device = device_of(operands)
    if x.device != device:
        return Fallback(f"x is on {x.device}, the base weight on {device}", raises=base.quantized is not None)
    if native.may_be_old:
        own = x.dtype if operands.lora_a is None else operands.lora_a.dtype
        reason = select.old_gpu_reason(x, *((call.autocast,) if call.autocast else (x.dtype, own)))
        if reason:
            return Fallback(reason)
    if call.autocast is not None:
        for tensor in (x, *operands[:6]):
            if tensor is not None and tensor.dtype == torch.float64:
                return Fallback(f"autocast with x of {x.dtype} and float64")
        return None if x.is_floating_point() else Fallback(f"autocast with x of {x.dtype}")
    weight, bias, lora_a, lora_b, lora_bias = operands[:5]
    dtype = x.dtype
    if base.quantized is None and weight is not None:
        if dtype is not weight.dtype or (bias is not None and dtype is not bias.dtype):
            return Fallback(f"x of {dtype} on a base of {weight.dtype} without autocast")
    elif not x.is_floating_point():
        return Fallback(f"x of {dtype}")
    if lora_a is None:
        return None
    adapter = lora_a.dtype
    differ = lora_b.dtype is not adapter or (lora_bias is not None and lora_bias.dtype is not adapter)
    if differ or (dtype is not adapter and not adapted.casts_input):
        return Fallback("adapter dtypes differ and input casting does not reconcile them")
    return None


def own_forward_reason(adapted: AdaptedLinear, x: Tensor, call: CallContext, rows: int | None = None) -> str | None:
    """Why the base's own forward computes the product of a call that `call_fallback` lets pass; None where
    we do. `rows` in place of x's own, where given."""
    base = adapted.base
    if base.own_forward or base.quantized is None:
        return base.own_forward
    dtype = call.autocast or x.dtype
    if x.dtype not in (dtype, torch.float32):
        return f"base layer's own forward: x of {x.dtype} under autocast to {dtype}"
    if (base.compute or x.dtype) != dtype:
        return f"base layer's own forward: it computes in {base.compute or x.dtype}, the adapter in {dtype}"
    if rows is None:
        rows = x.numel() // max(x.shape[-1], 1)
    # A reentrant checkpoint's forward has no gradient; PEFT would draw other masks than its recomputation.
    few = rows <= FEW_ROWS and not (call.grad or adapted.training)
    return OWN_FORWARD_OF_FEW_ROWS if few and delta_reason(adapted.projection) is None else None


def result_dtype(adapted: AdaptedLinear, x: Tensor) -> torch.dtype:
    """The dtype of PEFT's result on a quantized base: bitsandbytes casts back to x's, and under autocast for
    GPUs PEFT's layers on it let DoRA's magnitude widen that."""
    magnitude = adapted.projection.operands.magnitude
    if magnitude is None or not (adapted.promotes and torch.is_autocast_enabled()):
        return x.dtype
    return torch.promote_types(x.dtype, magnitude.dtype)
