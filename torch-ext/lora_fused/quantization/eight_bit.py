"""Weights in int8 with a scale a row, as bitsandbytes' LLM.int8() stores them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..specs import EightBit, Operands


def rows(operands: Operands, quantized: EightBit, dtype: torch.dtype, first: int, count: int) -> Tensor:
    """Rows [first, first + count) of the weight, [count, K] in `dtype`."""
    with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' parameter is a subclass
        codes, absmax = operands.weight[first : first + count], operands.absmax[first : first + count]
        return (codes * absmax.view(-1, 1) * (1 / 127)).to(dtype)
