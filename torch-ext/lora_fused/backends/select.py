"""The one place that chooses who computes: Triton for large work on a GPU, the library elsewhere.

`reference` and `triton_ops` are modules of operations, which `compose` puts together. LIBRARY is one
native op a direction, see `autograd.native`, and where that does not serve `reference`'s operations. Memory-bound passes are
chosen apart from matrix products: one Triton kernel beats several library ones at any size. The sizes
from which one is chosen are those of `tuned`, by device.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Callable, Optional, Union

import torch
from torch import Tensor

from ..specs import ExpertWeights, FourBit, Operands, Quantized, Table, Taken
from . import device_config, grouped_mm, native, native_embedding, reference
from .reference import embedding as reference_embedding
from .reference.grouped import LoopedProducts, Rows

REFERENCE = "reference"
LIBRARY = "library"
TRITON = "triton"
CUDA = "cuda"  # of embeddings alone
GROUPED = "grouped_mm"  # of experts alone
NATIVE = "native"  # what a reader calls the native ops,
HOPPER_GEMM = "native, Hopper GEMM"  # with products of their own,
_TORCH = "torch"  # and products of torch, chained in Python
_TRITON_DTYPES = (torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=None)
def triton_is_there() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def choose(device: torch.device, dtype: torch.dtype, taken: Taken, work: Callable[[], int]) -> str:
    """Name of the backend for x on `device`, computed in `dtype`; `taken` says how the native op takes the
    whole group, `work` gives M·N·K and is asked only where it matters.

    Large half-precision products on a GPU go to Triton, but on Hopper where the native op takes them, since
    it has a product of its own with the LoRA terms inside, and where it alone is exact. float32 stays with
    the vendor's matrix products, which follow torch's own TF32 setting.
    """
    if not is_gpu(device) or dtype not in _TRITON_DTYPES or taken.exact or (taken.native and is_hopper(device)):
        return LIBRARY
    return TRITON if work() >= device_config.of(device).up_add_from and triton_is_there() else LIBRARY


@functools.lru_cache(maxsize=None)
def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@functools.lru_cache(maxsize=None)
def is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def is_library(name: str) -> bool:
    """Whether the native op may take whole groups."""
    return name == LIBRARY


def gemm_pays(x: Tensor, rows: int, outputs: int) -> bool:
    """Whether the native ops compute [rows, outputs] of x's dtype and device, the LoRA terms inside, by one launch."""
    return native.gemm_pays(x, rows, outputs)


def describe(name: str) -> str:
    """What a reader calls a backend that is not the native ops'."""
    return TRITON if name == TRITON else _TORCH


def describe_embedding(name: str) -> str:
    """The same of `choose_embedding`'s."""
    return NATIVE if name == CUDA else describe(name)


def get(name: str) -> ModuleType:
    """The module of operations behind a backend's name."""
    if name in (REFERENCE, LIBRARY):
        return reference
    if name == TRITON:
        from . import triton as triton_kernels

        return triton_kernels
    raise ValueError(f"backend: {name!r} is unknown, expected {LIBRARY!r}, {REFERENCE!r} or {TRITON!r}")


def pointwise(x: Tensor) -> ModuleType:
    """The module for passes over x that multiply no matrices: `gated`, `gated_backward`, `scale`,
    `scale_sum`."""
    triton_can = x.is_cuda and x.dtype in _TRITON_DTYPES and triton_is_there()
    return get(TRITON if triton_can else REFERENCE)


def row_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + s·B·A‖ by row: the C++ or CUDA op, Triton for large ranks, in float32; float64 operands have
    no kernel and stay exact."""
    if torch.float64 in (weight.dtype, lora_a.dtype, lora_b.dtype):
        return reference.row_norm(weight, lora_a, lora_b, scaling)
    if _row_norm_pays_in_triton(weight, lora_a.shape[0]):
        kernels = get(TRITON)
        if kernels.row_norm_fits(weight, lora_a, lora_b):
            return kernels.row_norm(weight, lora_a, lora_b, scaling)
    return native.row_norm(weight, lora_a, lora_b, scaling)


def dora_gains(
    weights, lora_a, lora_b, magnitudes, scalings, formats=(), quantized=(), scales=()
) -> tuple[list[Optional[Tensor]], list[Optional[Tensor]]]:
    """(‖W + s·B·A‖ by row, magnitude over it) of each member, None for both where it has no magnitude. `formats` of
    the members, and `quantized` and `scales` as the native ops take them, where some are in four bits."""
    norms: list[Optional[Tensor]] = [None] * len(weights)
    gains: list[Optional[Tensor]] = [None] * len(weights)
    batch = []
    for i, magnitude in enumerate(magnitudes):
        if magnitude is None:
            continue
        if norm_is_native(weights[i], lora_a[i], lora_b[i], formats[i] if formats else None):
            batch.append(i)
        else:
            norms[i] = row_norm(weights[i], lora_a[i], lora_b[i], scalings[i])
            gains[i] = native.gain(magnitude, norms[i])
    if batch:
        fields = ([field[i] for i in batch] for field in (weights, lora_a, lora_b, magnitudes, scalings))
        numbers = [number for i in batch for number in native.PackedWeight.of(quantized, i)] if quantized else ()
        for i, norm, gain in zip(batch, *native.dora_gains(*fields, scales, numbers)):
            norms[i], gains[i] = norm, gain
    return norms, gains


def norm_is_native(weight: Tensor, lora_a: Tensor, lora_b: Tensor, quantized: Optional[Quantized]) -> bool:
    """Whether the native ops make this norm, in a forward or together with others: of a weight in floating point that
    Triton does not take, or in four bits."""
    dtype = weight.dtype if quantized is None else quantized.dtype
    if dtype == torch.float64 or lora_a.dtype == torch.float64 or lora_b.dtype == torch.float64:
        return False
    if quantized is not None:
        return type(quantized) is FourBit
    return not _row_norm_pays_in_triton(weight, lora_a.shape[0])


def _row_norm_pays_in_triton(weight: Tensor, rank: int) -> bool:
    if not weight.is_cuda:
        return False
    limits = device_config.of(weight.device)
    large = rank >= limits.row_norm_from_rank and weight.numel() * rank >= limits.row_norm_from
    return large and triton_is_there()


def dequantize_4bit(operands: Operands, quantized: FourBit, first: int, out: Tensor) -> Tensor:
    """Elements [first, first + out.numel()) of a flat four-bit weight written to `out` (contiguous
    float32, bfloat16 or float16): the C++ or CUDA op. first is even."""
    weight, absmax = operands.weight, operands.absmax
    nested = operands.nested_absmax, operands.nested_code, operands.offset
    sizes = quantized.blocksize, quantized.nested_blocksize, quantized.fp4
    native.dequantize_4bit(weight, absmax, *nested, *sizes, first, out)
    return out


def choose_embedding(table: Table, tokens: int) -> str:
    """Name of the backend for an embedding of this many tokens.

    On a GPU the native ops up to a size, since a step with few tokens waits for the host, and Triton's
    tensor cores beyond it or where the ops do not fit; float64 and the CPU stay with the library.
    """
    weight = table.weight
    if not weight.is_cuda or any(tensor is not None and tensor.dtype == torch.float64 for tensor in table):
        return REFERENCE
    limits = device_config.of(weight.device)
    small = tokens <= limits.embedding_tokens and tokens * table.lora_b.numel() <= limits.embedding_up_to
    if small and native_embedding.fits(table):
        return CUDA
    return TRITON if triton_is_there() else REFERENCE


def get_embedding(name: str) -> ModuleType:
    """The module with `column_norm`, `gather_add` and, but for CUDA, which has `gradients`, with
    `gather_backward` and `scatter_rows`, as `reference_embedding` defines them."""
    if name == CUDA:
        return native_embedding
    ops = get(name)
    return reference_embedding if ops is reference else ops


def column_norm(name: str, table: Table, scaling: float) -> Tensor:
    """‖W + s·(B·A)ᵀ‖ by column: on a GPU the native op wherever it takes the table."""
    kernels = get_embedding(name)
    if kernels is not reference_embedding:
        twin = get(TRITON) if triton_is_there() else reference_embedding
        kernels = native_embedding if native_embedding.norm_fits(table) else twin
    return kernels.column_norm(table.weight, table.lora_a, table.lora_b, scaling)


def column_gain(name: str, table: Table, scaling: float) -> tuple[Tensor, Tensor]:
    """(`column_norm`, magnitude over it), in one op where the native one takes the table."""
    if get_embedding(name) is not reference_embedding and native_embedding.norm_fits(table):
        return native_embedding.column_gain(table, scaling)
    norm = column_norm(name, table, scaling)
    return norm, native.gain(table.magnitude, norm)


Products = Union[LoopedProducts, grouped_mm.GroupedProducts]


def choose_experts(up: ExpertWeights, down: ExpertWeights) -> str:
    """Name of the backend for experts of these weights."""
    return GROUPED if grouped_mm.fits(up.weight) and grouped_mm.fits(down.weight) else REFERENCE


def make_products(rows: Rows, up: ExpertWeights, down: ExpertWeights, trains: bool) -> Products:
    """The products of one call's rows; `trains` where a backward follows."""
    if rows.order.numel() == 0 or choose_experts(up, down) == REFERENCE:
        return LoopedProducts(rows)
    return grouped_mm.GroupedProducts(rows, few=not trains and rows.order.numel() < rows.ends.numel())
