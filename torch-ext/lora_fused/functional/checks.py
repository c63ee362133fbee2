"""What every model, tensor and number that a public function is given must be, and how a message shows another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_LONGEST = 60  # of a value in a message


def shown(value: object) -> str:
    """A value as a message has it, in one line: itself where it is short, else its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = type(value).__name__ if isinstance(value, (Tensor, nn.Module)) else repr(value)
    return text if len(text) <= _LONGEST and "\n" not in text else type(value).__name__


def check_module(name: str, value: object, what: str = "a torch.nn.Module, as get_peft_model returns it") -> None:
    """TypeError unless it is a module. Of what holds modules (a pipeline, a trainer, a list) it says so."""
    if isinstance(value, nn.Module):
        return
    seen = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    held = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
    held = held if isinstance(held, dict) else getattr(held, "__dict__", {})
    names = [str(key) for key, each in held.items() if isinstance(each, nn.Module)]
    advice = f"; it holds modules ({', '.join(names[:4])}): give them one by one" if names else ""
    raise TypeError(f"{name}: {seen}, expected {what}{advice}")


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
        raise TypeError(f"{name}: {shown(value)}, expected a finite number")
