"""The LoRA and DoRA delta on a base product that somebody else made."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import quantization
from ..autograd.delta import DeltaFunction, DeltaSpec
from ..call_context import autocast_dtype
from ..specs import Projection, fold
from .dispatch import draw_seeds


def add_delta(base: Tensor, x: Tensor, projection: Projection, promotes: bool) -> Tensor:
    """base + the delta of `projection` for x, on operands that are known to be right: base [..., N] the base
    module's own result for x [..., K]. In base's dtype, or where the delta `promotes` in the widest of
    base's, its own and the magnitude's. DoRA (without dropout) needs a quantized weight, of which it takes the norm."""
    ((operands, scaling, spec),) = fold((projection,))  # the scaling is a number now
    dtype = autocast_dtype(x) or operands.lora_a.dtype
    out_dtype = base.dtype
    for part in (dtype, getattr(operands.magnitude, "dtype", dtype)) if promotes else ():
        out_dtype = torch.promote_types(out_dtype, part)
    norm = bias = None
    if operands.magnitude is not None:
        with torch.no_grad():
            norm, bias = quantization.row_norm(operands, spec.quantized, scaling), operands.bias  # type: ignore[arg-type]
    adapter = operands.lora_a, operands.lora_b, operands.lora_bias, operands.magnitude
    delta = DeltaSpec(scaling, spec.dropout, dtype, out_dtype)  # type: ignore[arg-type]
    return DeltaFunction.apply(delta, base, x, draw_seeds(x.device, (projection,)), bias, *adapter, norm)
