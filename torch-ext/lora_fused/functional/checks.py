"""What every tensor that a public function is given must be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, tensor: object, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """TypeError unless it is a dense tensor of one of the dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.is_nested:
        raise TypeError(
            f"{name}: nested, expected a dense tensor: pad it with to_padded_tensor or give its parts one by one"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: layout {tensor.layout}, expected a dense tensor: give its to_dense()")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: dtype {tensor.dtype}, expected one of {', '.join(map(str, dtypes))}")


def check_number(name: str, value: object) -> None:
    """TypeError unless it is a finite number."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{name}: {value!r}, expected a finite number")
