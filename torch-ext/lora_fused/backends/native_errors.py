"""What a failed native op says to a user: the cause, without names and paths of C++."""

from __future__ import annotations

import ctypes
import re

import torch
from torch import Tensor

# As torch's stable ABI writes them: a check of ours, and a call of the library that failed.
_CHECK = re.compile(r"[^\s,]+, \S+:\d+, (?P<said>.*)", re.DOTALL)
_CALL = re.compile(r"(?P<call>\w+)\(.*\) API call failed at .*, line \d+", re.DOTALL)
_ALLOCATION = "aoti_torch_empty_strided"


def native_error(error: RuntimeError, args: tuple) -> Exception:
    """What to raise for an error of an op that was called with `args`."""
    text = str(error)
    check = _CHECK.fullmatch(text)
    if check:
        return type(error)(check["said"])
    call = _CALL.fullmatch(text)
    if call is None:
        return error
    cause = _cause()
    if not cause:
        on_gpu = any(tensor.is_cuda for tensor in args if isinstance(tensor, Tensor))
        cause = _out_of_memory(on_gpu) if call["call"] == _ALLOCATION else "operands do not fit, torch's log says more"
    if "CUDA out of memory" in cause:
        return torch.OutOfMemoryError(cause)
    return RuntimeError(f"lora_fused: {cause}")


def _cause() -> str:
    """What torch caught last on this thread; empty where torch does not tell, before 2.13."""
    try:
        what = ctypes.CDLL(torch._C.__file__).torch_exception_get_what_without_backtrace
    except (AttributeError, OSError):
        return ""
    what.restype = ctypes.c_char_p
    return (what() or b"").decode(errors="replace").strip()


def _out_of_memory(on_gpu: bool) -> str:
    """In the words by which tools tell that a batch was too large."""
    if not on_gpu:
        return "DefaultCPUAllocator: can't allocate memory"
    torch.cuda.synchronize()  # an earlier kernel's error is the cause, then, and raises here
    return "CUDA out of memory. lora_fused could not allocate a tensor, torch's log says how much"
