"""What the launchers share: block sizes of a rank, dot precision, shared memory, the current device, and a launch that
costs the host a fifth of Triton's own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from ..values import with_values

MIN_DOT = 16  # tl.dot needs at least 16 in every dimension
MAX_RANK_BLOCK = 64
SMALL_SHARED_MEMORY = 99 * 1024  # compute capability 8.6 and 8.9
SIZES_KEPT = 1024  # what a launcher makes of sizes alone: its grid and its blocks
_FLOAT32 = torch.float32


def ceil_div(size: int, block: int) -> int:
    """Blocks that hold a size. `triton.cdiv` takes 5 µs on the host."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The next one, at least 1."""
    return 1 << max(size - 1, 0).bit_length()


def rank_block(rank: int) -> int:
    """Rows of a rank that one dot takes: a rank beyond MAX_RANK_BLOCK is looped over."""
    return min(MAX_RANK_BLOCK, max(MIN_DOT, power_of_2(rank)))


def dot_precision(x: Tensor) -> str:
    """float32 products use TF32 only where torch's own matrix products may."""
    # `allow_tf32` raises where somebody has set this, as transformers' Trainer does.
    if x.dtype is _FLOAT32 and x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use; the interpreter is given a small GPU's."""
    if device.type != "cuda":
        return SMALL_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)  # AMD's GPUs give no more than unasked
    return getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block


def on_device(x: Tensor):
    """Context in which a launch goes to x's GPU."""
    if x.is_cpu:
        return contextlib.nullcontext()
    gpus = torch.cuda if x.is_cuda else torch.xpu
    return contextlib.nullcontext() if x.device.index == gpus.current_device() else gpus.device(x.device)


def on_values(launcher: Callable) -> Callable:
    """A launcher that is given what its tensors stand for, since a kernel reads memory alone."""

    @functools.wraps(launcher)
    def launch(*args, **kwargs):
        return launcher(*map(with_values, args), **{name: with_values(arg) for name, arg in kwargs.items()})

    return launch


# Compiled kernels by all that Triton specializes them on, with what their launch takes. Triton's own makes that out
# anew, in 10 to 30 µs.
_compiled: dict[tuple, tuple[Any, Callable, Any, Any]] = {}
_MOST_COMPILED = 4096
_runtime = knobs.runtime
_parts: dict[int, tuple[int, int]] = {}  # of a kernel's arguments, by its id: a kernel's hash takes a lock
# Bound once: torch's own functions look first whether CUDA has begun, which a tensor on a GPU says. None without CUDA.
_current_device = getattr(torch._C, "_cuda_getDevice", None)
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class _Kinds(dict):
    """Of numbers in a tuple: of integers whether one is 1, is a multiple of 16, has 32 bits; the type of others."""

    def __missing__(self, numbers: tuple) -> tuple:
        if len(self) >= _MOST_COMPILED:
            self.clear()
        kinds = self[numbers] = tuple(
            (each == 1, each % 16 == 0, -(2**31) <= each < 2**31) if type(each) is int else type(each)
            for each in numbers
        )
        return kinds


_kinds = _Kinds()


def launch(
    kernel, grid: tuple[int, int, int], arguments: tuple, *, num_warps: int, num_stages: int = 3, **more
) -> None:
    """`kernel[grid](*arguments)` on the GPU of the first argument, a tensor: all arguments by place, tensors first,
    constants, too, at the end; where a parameter is a float, a float. What is compiled is given addresses, of which its
    launcher does not ask the driver whose they are, and no hooks where there are none."""
    x = arguments[0]
    if not x.is_cuda:
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **more)
        return
    device = x.get_device()
    if device != _current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, arguments, num_warps=num_warps, num_stages=num_stages, **more)
        return
    tensors, first = _parts.get(id(kernel)) or _parts_of(kernel, arguments)
    # What a compiled kernel depends on: a constant's value, kinds of numbers, a tensor's dtype and where its address
    # stands between multiples of 16.
    depends: list[Any] = [
        id(kernel),
        device,
        num_warps,
        num_stages,
        _kinds[arguments[tensors:first]],
        arguments[first:],
    ]
    addresses: list[int | None] = []
    for each in arguments[:tensors]:  # one loop, where three lists would take a third more
        if each is None:
            addresses.append(None)
            depends.append(None)
        else:
            address = each.data_ptr()
            addresses.append(address)
            depends.append(each.dtype)
            depends.append(address & 15)
    key = tuple(depends)
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **more)
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        if hasattr(compiled, "packed_metadata"):  # not what is still being compiled
            _compiled[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata
        return
    compiled, run, handle, metadata = found
    stream = _current_stream(device)
    if _is_watched():
        compiled[grid](*addresses, *arguments[tensors:], stream=stream)
    else:
        run(*grid, stream, handle, metadata, None, None, None, *addresses, *arguments[tensors:])


def _is_watched() -> bool:
    """Whether somebody, as a profiler, is to be called at every launch."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _parts_of(kernel, arguments: tuple) -> tuple[int, int]:
    """Where numbers and where constants begin."""
    pointers = [parameter.name.endswith("_ptr") for parameter in kernel.params]
    constants = [parameter.is_constexpr for parameter in kernel.params]
    tensors, first = pointers.index(False), constants.index(True)
    in_order = not any(pointers[tensors:]) and all(constants[first:]) and tensors <= first
    assert in_order and len(constants) == len(arguments), "tensors stand before all others, constants behind"
    found = _parts[id(kernel)] = tensors, first
    return found
