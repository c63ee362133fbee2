"""Which calls PEFT's own forward serves the fastest: small ones, which wait for the host, of an adapter of which PEFT
asks little. Its result is right in any case, so a glance at the module is enough, and `peft.linear` reads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..call_context import CallContext
from ..specs import Projection
from .base_layer import LINEARS, is_listed
from .linear import has_dropout, linear_kinds
from .linear_call import FEW_ROWS

# On a GPU so few rows without a gradient wait for the host, and of an adapter in x's dtype PEFT's own forward asks
# least of it (H200, 1B shape: ours takes 1.07 to 1.15 times as long; with float32 adapters 1.09 times for one row and
# 1.00 for 64, under autocast 0.82 to 0.91, with DoRA 0.47 to 0.78; with four-bit weights PEFT's takes 181 µs for one
# row, ours with all weights in floating point 173, and with PEFT's own after a reading of the state 244).
SMALL_ROWS = 512
SMALL = f"evaluation of up to {SMALL_ROWS} rows without a gradient, the adapter in x's dtype, or up to {FEW_ROWS} rows"
# So does training where no sibling's products come with a linear's own (64 rows: ours took 1.20 to 1.50 times as long).
SMALL_ALONE = f"up to {SMALL_ROWS} rows alone with their input, the adapter in x's dtype, without dropout"
# In a graph Inductor fuses PEFT's products with what is around them, where ours are launches of their own (H200, 8B's
# width, decoding: ours takes 1.08 times as long a token for one row and 1.13 for eight; 64 are not measured). DoRA's
# norm and a weight that is dequantized cost PEFT more.
FEW_TRACED_ROWS = 64
FEW_TRACED = f"up to {FEW_TRACED_ROWS} rows without a gradient in a graph"
_SMALL_ANYWHERE = False  # not on GPUs alone, as tests have it


def small_reason(module: nn.Module, x: Tensor, call: CallContext, rows: int | None = None) -> str | None:
    """Why PEFT's own forward of a linear is the fastest, as far as a glance tells: it is right in any case but one. A
    reentrant checkpoint has no gradient in its forward and one when it computes that again, with the same masks: so not
    in training. `rows` in place of x's own, where given."""
    if call.grad or module.training:
        return None
    features, modules = module.in_features, module._modules
    size = x.numel() if rows is None else rows * features
    few = SMALL if size <= FEW_ROWS * features else None
    if modules["lora_magnitude_vector"]._modules:
        return None
    base: type = type(modules["base_layer"])
    if base is not nn.Linear and not is_listed(base, LINEARS):
        return few if linear_kinds()[type(module)].name == "Linear4bit" else None
    if size > SMALL_ROWS * features or not _may_wait_for_host(x, call):
        return None
    return SMALL if _is_adapted_in(x.dtype, modules) else few


def small_alone_reason(module: nn.Module, x: Tensor, call: CallContext, rows: int | None = None) -> str | None:
    """The same of a linear that no sibling runs with, in training or not; it has no masks to be drawn twice."""
    if not _may_wait_for_host(x, call):  # the least of all questions
        return None
    features, modules = module.in_features, module._modules
    size = x.numel() if rows is None else rows * features
    if size > SMALL_ROWS * features or has_dropout(module):
        return None
    if modules["lora_magnitude_vector"]._modules:
        return None
    base: type = type(modules["base_layer"])
    return SMALL_ALONE if (base is nn.Linear or is_listed(base, LINEARS)) and _is_adapted_in(x.dtype, modules) else None


def few_traced_reason(
    x: Tensor, call: CallContext, projections: Iterable[Projection], rows: int | None = None
) -> str | None:
    """Why PEFT's own forward of linears that read x is the fastest in a graph; masks might be drawn again. `rows` in
    place of x's own, where given."""
    if call.grad or not (x.is_cuda or _SMALL_ANYWHERE):
        return None
    if (x.numel() if rows is None else rows * x.shape[-1]) > FEW_TRACED_ROWS * x.shape[-1]:
        return None
    for operands, _, spec in projections:
        if operands.magnitude is not None or spec.quantized is not None or spec.dropout > 0.0:
            return None
    return FEW_TRACED


def _may_wait_for_host(x: Tensor, call: CallContext) -> bool:
    """Whether PEFT casts nothing there but an adapter of another dtype, and the host is what a small call waits for."""
    return (x.is_cuda or _SMALL_ANYWHERE) and call.autocast is None


def _is_adapted_in(dtype: torch.dtype, modules: dict[str, nn.Module]) -> bool:
    for lora_a in modules["lora_A"]._modules.values():
        weight = lora_a._parameters.get("weight", lora_a.__dict__.get("weight"))  # as `tensor_of` has it
        if weight is None or weight.dtype != dtype:
            return False
    return True
