"""The one place that chooses who computes.

NATIVE is one op a direction for a whole group (`autograd.group_native`), or for an embedding; a group that the op does
not take is chained from the operations of `reference`. TRITON and REFERENCE are modules of operations, which
`autograd.eager_products` chains. Memory-bound passes are chosen apart from matrix products: one Triton kernel beats
several of torch's at any size. The sizes from which one is chosen are those of `device_config`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ..specs import AnyGate, EmbeddingOperands, ExpertWeights, FourBit, NativePath, Operands, Quantized
from . import device_config, grouped_mm, native, native_embedding, reference
from .reference import embedding as reference_embedding
from .reference.grouped import LoopedProducts, Products, Rows

REFERENCE = "reference"
TRITON = "triton"
GROUPED = "grouped_mm"  # of experts alone
NATIVE = "native"
HOPPER_GEMM = "native, Hopper GEMM"  # what a reader calls native ops whose products are our own,
_TORCH = "torch"  # and products of torch, chained in Python
_WITH_MEMORY = (Tensor, torch.nn.Parameter)
_TRITON_DTYPES = (torch.bfloat16, torch.float16)
_FLOAT64 = torch.float64  # bound once: torch looks its attributes up in a function of its own


@functools.cache
def triton_is_there() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def triton_takes(tensor: Tensor) -> bool:
    """Whether Triton's kernels run on a tensor. Not while torch.compile traces, when it has no memory: the graph has
    native ops, and torch's operations, which Inductor fuses."""
    on_gpu = (tensor.is_cuda or tensor.is_xpu) and type(tensor) in _WITH_MEMORY
    return on_gpu and triton_is_there() and not (native.may_be_old and is_old(tensor.device))


def choose(device: torch.device, dtype: torch.dtype, path: NativePath, work: Callable[[], int]) -> str:
    """Name of the backend for x on `device`, computed in `dtype`; `path` says how the native op takes the
    whole group, `work` gives M·N·K and is asked only where it matters.

    Large half-precision products on a GPU go to Triton, but on Hopper where the native op takes them, since
    it has a product of its own with the LoRA terms inside, and where it alone is exact. float32 stays with
    the vendor's matrix products, which follow torch's own TF32 setting.
    """
    if not is_gpu(device) or dtype not in _TRITON_DTYPES or path.bf16x3 or (path.native and is_hopper(device)):
        return NATIVE
    large = work() >= device_config.of(device).linear_expand_from
    return TRITON if large and triton_is_there() and not is_old(device) else NATIVE


@functools.cache
def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def device_reason(device: torch.device) -> str | None:
    """Why nothing is computed here for tensors that are neither on a CPU nor on a CUDA GPU, as torch calls ROCm's too:
    the end of a sentence. None where a variant without native ops computes it by torch."""
    if device.type == "meta":
        return "on the meta device"
    if device.type == "xpu" and not native.available:
        return None
    return f"on {device.type}, a device without layers of this kernel"


def is_hopper(device: torch.device) -> bool:
    """Whether the native ops run Hopper's kernels on `device`."""
    return native.architecture(device) == "sm90"


def is_old(device: torch.device) -> bool:
    """Whether `device` is a GPU before compute capability 8.0: own kernels there are passes over memory alone, products
    the library's, and Triton's compiler is not asked."""
    return native.may_be_old and device.type == "cuda" and native.architecture(device) == "sm75"


is_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


def old_gpu_reason(x: Tensor, *dtypes: torch.dtype) -> str | None:
    """Why nothing is computed here in one of these dtypes on x's GPU. Asked where `native.may_be_old`."""
    if not x.is_cuda:
        return None
    if not is_old(x.device):
        native.look_for_old_gpus()
        return None
    if torch.bfloat16 not in dtypes:
        return None
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"GPU of compute capability {major}.{minor}: bfloat16 is computed from 8.0 on"


def gemm_is_faster(x: Tensor, rows: int, outputs: int) -> bool:
    """Whether the native ops compute [rows, outputs] of x's dtype and device, the LoRA terms inside, by one launch."""
    return native.gemm_is_faster(x, rows, outputs)


def describe(name: str) -> str:
    """What a reader calls a backend that is not the native ops'."""
    return TRITON if name == TRITON else _TORCH


def describe_embedding(name: str) -> str:
    """The same of `choose_embedding`'s."""
    return NATIVE if name == NATIVE else describe(name)


def get(name: str) -> ModuleType:
    """The module of operations behind a backend's name."""
    if name in (REFERENCE, NATIVE):
        return reference
    if name == TRITON:
        from . import triton as triton_kernels

        return triton_kernels
    raise ValueError(f"backend: {name!r} is unknown, expected {NATIVE!r}, {REFERENCE!r} or {TRITON!r}")


def check_backend(name: str | None, device: torch.device) -> None:
    """Of what a public call asks for: an error where it does not run on `device`."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"backend: {type(name).__name__}, expected {NATIVE!r}, {REFERENCE!r}, {TRITON!r} or None")
    if name == TRITON and device.type == "cpu":
        from triton import knobs

        if not knobs.runtime.interpret:
            raise ValueError("backend: 'triton' takes tensors on a GPU, these are on cpu")


def pointwise(x: Tensor) -> ModuleType:
    """The module for passes over x that multiply no matrices: `gated`, `gated_backward`, `scale`,
    `scale_sum`."""
    return get(TRITON if x.dtype in _TRITON_DTYPES and triton_takes(x) else REFERENCE)


def row_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + s·B·A‖ by row: the C++ or CUDA op, Triton for large ranks, in float32; float64 operands have
    no kernel and stay exact, and neither an old GPU nor a variant without native ops has one."""
    exact = torch.float64 in (weight.dtype, lora_a.dtype, lora_b.dtype)
    if exact or not native.available or is_old(weight.device):
        return reference.row_norm(weight, lora_a, lora_b, scaling)
    if _row_norm_is_faster_in_triton(weight, lora_a.shape[0]):
        kernels = get(TRITON)
        if kernels.row_norm_fits(weight, lora_a, lora_b):
            return kernels.row_norm(weight, lora_a, lora_b, scaling)
    return native.row_norm(weight, lora_a, lora_b, scaling)


def dora_scales(
    weights, lora_a, lora_b, magnitudes, scalings, formats=(), quantized=(), scales=()
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """(‖W + s·B·A‖ by row, magnitude over it) of each member, None for both where it has no magnitude. `formats` of
    the members, and `quantized` and `scales` as the native ops take them, where some are in four bits."""
    norms: list[Tensor | None] = [None] * len(weights)
    mag_norm_scales: list[Tensor | None] = [None] * len(weights)
    batch = []
    for i, magnitude in enumerate(magnitudes):
        if magnitude is None:
            continue
        if norm_is_native(weights[i], lora_a[i], lora_b[i], formats[i] if formats else None):
            batch.append(i)
        else:
            norms[i] = row_norm(weights[i], lora_a[i], lora_b[i], scalings[i])
            mag_norm_scales[i] = native.mag_norm_scale(magnitude, norms[i])
    if batch:
        each = ([field[i] for i in batch] for field in (weights, lora_a, lora_b, magnitudes, scalings))
        of_weights, of_a, of_b, of_magnitudes, of_scalings = each
        numbers = [number for i in batch for number in native.PackedWeight.of(quantized, i)] if quantized else ()
        made = native.dora_scales(of_weights, of_a, of_b, of_magnitudes, of_scalings, scales, numbers)
        for i, norm, mag_norm_scale in zip(batch, *made):
            norms[i], mag_norm_scales[i] = norm, mag_norm_scale
    return norms, mag_norm_scales


def norm_is_native(weight: Tensor, lora_a: Tensor, lora_b: Tensor, quantized: Quantized | None) -> bool:
    """Whether the native ops make this norm, in a forward or together with others: of a weight in floating point that
    Triton does not take, or in a format that they read."""
    dtype = weight.dtype if quantized is None else quantized.dtype
    if (
        not native.available
        or (native.may_be_old and is_old(weight.device))
        or dtype == _FLOAT64
        or lora_a.dtype == _FLOAT64
        or lora_b.dtype == _FLOAT64
    ):
        return False
    if quantized is not None:
        return getattr(quantized, "native_format", None) is not None
    return not _row_norm_is_faster_in_triton(weight, lora_a.shape[0])


def _row_norm_is_faster_in_triton(weight: Tensor, rank: int) -> bool:
    if not weight.is_cuda:
        return False
    limits = device_config.of(weight.device)
    large = rank >= limits.row_norm_from_rank and weight.numel() * rank >= limits.row_norm_from
    return large and triton_takes(weight)


def dequantize_4bit(operands: Operands, quantized: FourBit, first: int, out: Tensor) -> Tensor:
    """Elements [first, first + out.numel()) of a flat four-bit weight written to `out` (contiguous
    float32, bfloat16 or float16): the C++ or CUDA op, Triton or torch without one. first is even."""
    if not native.available:
        return get(TRITON if triton_takes(out) else REFERENCE).dequantize_4bit(operands, quantized, first, out)
    weight, absmax = operands.weight, operands.absmax
    nested = operands.nested_absmax, operands.nested_code, operands.offset
    sizes = quantized.blocksize, quantized.nested_blocksize, quantized.fp4
    native.dequantize_4bit(weight, absmax, *nested, *sizes, first, out)
    return out


def choose_embedding(table: EmbeddingOperands, tokens: int, compiled: bool = False) -> str:
    """Name of the backend for an embedding of this many tokens; `compiled` to ask before torch.compile traces it.

    On a GPU the native ops up to a size, since a step with few tokens waits for the host, and Triton's
    tensor cores beyond it or where the ops do not fit; float64 and the CPU stay with the library.
    """
    weight = table.weight
    if not weight.is_cuda or any(tensor is not None and tensor.dtype == torch.float64 for tensor in table):
        return REFERENCE
    if is_old(weight.device):
        return REFERENCE
    limits = device_config.of(weight.device)
    small = tokens <= limits.embedding_tokens and tokens * table.lora_b.numel() <= limits.embedding_up_to
    if small and native_embedding.fits(table):
        return NATIVE
    return TRITON if not compiled and triton_takes(weight) else REFERENCE


def get_embedding(name: str) -> ModuleType:
    """The module with `column_norm`, `gather_add` and, but for NATIVE, which has `gradients`, with
    `gather_backward` and `scatter_rows`, as `reference.embedding` defines them."""
    if name == NATIVE:
        return native_embedding
    ops = get(name)
    return reference_embedding if ops is reference else ops


def column_norm(name: str, table: EmbeddingOperands, scaling: float) -> Tensor:
    """‖W + s·(B·A)ᵀ‖ by column: on a GPU the native op wherever it takes the table."""
    kernels = get_embedding(name)
    if kernels is not reference_embedding:
        twin = get(TRITON) if triton_takes(table.weight) else reference_embedding
        kernels = native_embedding if native_embedding.norm_fits(table) else twin
    return kernels.column_norm(table.weight, table.lora_a, table.lora_b, scaling)


def column_norm_and_scale(name: str, table: EmbeddingOperands, scaling: float) -> tuple[Tensor, Tensor]:
    """(`column_norm`, magnitude over it), in one op where the native one takes the table."""
    if get_embedding(name) is not reference_embedding and native_embedding.norm_fits(table):
        return native_embedding.column_norm_and_scale(table, scaling)
    norm = column_norm(name, table, scaling)
    return norm, native.mag_norm_scale(table.magnitude, norm)


def choose_experts(up: ExpertWeights, down: ExpertWeights, choices: int) -> str:
    """Name of the backend for so many choices of experts of these weights: Triton on a GPU where that was measured to
    be the faster, else torch's grouped products where they do not wait for the GPU."""
    weight = up.weight
    if not _is_for_triton(weight):
        return GROUPED if grouped_mm.fits(weight) and grouped_mm.fits(down.weight) else REFERENCE
    experts, n, k = weight.shape
    if _experts_tile(weight.device, max(choices // experts - 1, 0).bit_length(), n, k):
        return TRITON
    return GROUPED if grouped_mm.fits(weight) and grouped_mm.fits(down.weight) else TRITON


def _is_for_triton(weight: Tensor) -> bool:
    return weight.is_cuda and weight.dtype != torch.float64 and not is_old(weight.device) and triton_is_there()


@functools.cache
def _experts_tile(device: torch.device, bits: int, n: int, k: int) -> tuple[int, ...] | None:
    """The tile measured for about 2^bits rows an expert."""
    return device_config.nearest(device_config.of(device).experts_tiles, (2**bits, n, k))


def sort_rows(index: Tensor, up: ExpertWeights, down: ExpertWeights, leaves_out: bool) -> Rows:
    """The rows of one call's `index` [T, k], for the products of the backend that is chosen here."""
    choices = index.numel()
    chosen = choose_experts(up, down, choices)
    kernels = _experts_kernels(chosen, index)
    if choices == 0 or kernels is None:
        return Rows.sort(index, up.weight.shape[0], leaves_out)._replace(backend=chosen)
    return kernels.sort_rows(index, up.weight, leaves_out, chosen)


def make_products(rows: Rows, trains: bool) -> Products:
    """The products of one call's rows; `trains` where a backward follows."""
    if rows.tile is not None:
        kernels = _triton_experts()
        return (kernels.TritonProducts if rows.backend == TRITON else kernels.GroupedProductsWithPasses)(rows)
    if rows.order.numel() == 0 or rows.backend == REFERENCE:
        return LoopedProducts(rows)
    return grouped_mm.GroupedProducts(rows, few=not trains and rows.order.numel() < rows.ends.numel())


def few_rows(x: Tensor, index: Tensor, up: ExpertWeights, down: ExpertWeights, gate: AnyGate) -> Callable | None:
    """What computes experts for the few tokens of one call, without a backward, as `triton.few_rows` defines it; None
    where `make_products` does. On a GPU where Triton's experts were measured it is ahead, whatever many tokens take."""
    measured = _is_for_triton(up.weight) and device_config.of(up.weight.device).experts_tiles
    if not measured and choose_experts(up, down, index.numel()) != TRITON:
        return None
    from .triton import few_rows

    return few_rows.few_rows if few_rows.fits(index.numel(), x.shape[0], up, down, gate) else None


def _experts_kernels(chosen: str, index: Tensor) -> ModuleType | None:
    """Triton's part of a backend for experts; None where there is none."""
    if chosen == REFERENCE or (chosen == GROUPED and not (index.is_cuda and triton_is_there())):
        return None
    return _triton_experts()


@functools.cache
def _triton_experts() -> ModuleType:
    from .triton import experts

    return experts
