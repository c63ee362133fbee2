"""The native ops of this build, with the shape functions that torch.compile needs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .._ops import add_op_namespace_prefix, ops
from ..specs import NEED_A, NEED_B, NEED_BIAS, NEED_MAGNITUDE, Mask
from .native_errors import native_error
from .values import with_values

available = True  # `without_ops` has the other answer


def _names(of: str) -> tuple[str, ...]:
    """What the library calls the numbers of one kind, in their order (kernel-src/common/names.h)."""
    return tuple(ops.names(of).split(","))


ACTIVATIONS = _names("activations")
FORMATS = _names("formats")
# Of a quantized weight before it was quantized, and what it becomes.
QUANTIZED_DTYPES = tuple(getattr(torch, name) for name in _names("dtypes"))


class PackedWeight(NamedTuple):
    """The numbers by which the native ops read one weight, `quantized` is those of all weights one after another.

    format: its place in FORMATS. rows, cols: [N, K]. blocksize and nested_blocksize as `FourBit` has them.
    first_scale: the place in `scales` of absmax, which nested_absmax, nested_code and offset follow where
    nested_blocksize is not 0. dtype: the place in QUANTIZED_DTYPES.
    """

    format: int = FORMATS.index("floating")
    rows: int = 0
    cols: int = 0
    blocksize: int = 0
    nested_blocksize: int = 0
    first_scale: int = 0
    dtype: int = 0

    @classmethod
    def of(cls, quantized: Sequence[int], i: int) -> PackedWeight:
        """Weight i's."""
        size = len(cls._fields)
        return cls(*quantized[size * i : size * i + size])


if PackedWeight._fields != _names("packed_weight"):
    raise ImportError(
        f"this library reads a packed weight as {_names('packed_weight')}, expected {PackedWeight._fields}"
    )


@torch.library.register_fake(add_op_namespace_prefix("row_norm"))
def _row_norm_fake(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=torch.float32)


def row_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + s·B·A‖ by row in float32, computed by the C++ (CPU) or CUDA op."""
    return _row_norm(weight, lora_a, lora_b, scaling)


is_architecture_forced = False  # by `set_architecture`


@functools.cache
def architecture(device: torch.device) -> str:
    """Whose kernels run on `device`: "cpu", "sm75" before compute capability 8.0, "sm80" for every later GPU but
    Hopper, "sm90" (kernel-src/dispatch/architecture.h)."""
    with _disable_current_modes():  # a trace's tensors are on no device
        return ops.architecture(torch.empty(0, device=device))


# Whether a GPU of this process may be of "sm75": what is asked at every call, until `look_for_old_gpus` has answered.
may_be_old = torch.version.cuda is not None


def look_for_old_gpus() -> None:
    """Without a context on any GPU. For a process that has one: torch starts CUDA here."""
    global may_be_old
    every = range(torch.cuda.device_count())
    may_be_old = is_architecture_forced or any(torch.cuda.get_device_capability(i) < (8, 0) for i in every)


def set_architecture(name: str) -> None:
    """From now on all GPUs of the process run the kernels of this architecture, "" for their own: for tests and
    benchmarks. An error says which are possible."""
    global is_architecture_forced, may_be_old
    ops.set_architecture(name)
    is_architecture_forced = may_be_old = name != ""
    architecture.cache_clear()


def gemm_is_faster(like: Tensor, rows: int, cols: int) -> bool:
    """Whether a sum of products [rows, cols] in like's dtype, on its device, is one launch
    (kernel-src/dispatch/table.h)."""
    return ops.gemm_is_faster(like, rows, cols)


@torch.library.register_fake(add_op_namespace_prefix("mag_norm_scale"))
def _mag_norm_scale_fake(magnitude: Tensor, norm: Tensor) -> Tensor:
    return torch.empty_like(norm)


def mag_norm_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """magnitude / norm [N] in norm's dtype, and exactly 1 where they differ by the norm's rounding alone."""
    return _mag_norm_scale(magnitude.to(norm.dtype).contiguous(), norm)


@torch.library.register_fake(add_op_namespace_prefix("dropout"))
def _dropout_fake(
    x: Tensor, seed: Tensor, p: float, out: Tensor, accumulate: bool = False, scaled: bool = True
) -> None:
    return None


def dropout(x: Tensor, mask: Mask, dtype: torch.dtype) -> Tensor:
    """mask ∘ x / (1 - p) for x [M, K], in `dtype`, computed by the C++ (CPU) or CUDA op."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _dropout(x.contiguous(), mask.seed, mask.p, out)
    return out


@torch.library.register_fake(add_op_namespace_prefix("dora_scales"))
def _dora_scales_fake(weights, lora_a, lora_b, magnitudes, scalings, scales, quantized):
    norms = [weight.new_empty(n, dtype=torch.float32) for weight, n in zip(weights, _widths(weights, quantized))]
    return norms, [torch.empty_like(norm) for norm in norms]


def dora_scales(
    weights, lora_a, lora_b, magnitudes, scalings, scales=(), quantized=()
) -> tuple[list[Tensor], list[Tensor]]:
    """(`row_norm`, `mag_norm_scale`) of each member, in float32. Weights in four bits, described by `scales` and
    `quantized` as `PackedWeight` has them, become floating point some rows at a time."""
    ready = [as_magnitude(magnitude) for magnitude in magnitudes]
    return _dora_scales(weights, lora_a, lora_b, ready, scalings, scales, quantized)


def as_magnitude(magnitude: Tensor) -> Tensor:
    """As the native ops take it: contiguous, in float32, no part of a graph where that is a copy."""
    plain = magnitude.dtype == torch.float32 and magnitude.is_contiguous()
    return magnitude if plain else magnitude.detach().float().contiguous()


@torch.library.register_fake(add_op_namespace_prefix("dequantize_4bit"))
def _dequantize_4bit_fake(
    packed, absmax, nested_absmax, nested_code, offset, blocksize, nested_blocksize, fp4, first, out
) -> None:
    return None


class GroupOperands(NamedTuple):
    """The operands of a group (kernel-src/group/members.h), by what they are; `made`: magnitudes or norms."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    lora_a: Sequence[Tensor | None]
    lora_b: Sequence[Tensor | None]
    magnitudes: Sequence[Tensor | None]
    mag_norm_scales: Sequence[Tensor | None]

    @classmethod
    def of(cls, operands, scalings) -> GroupOperands:
        size = len(cls._fields)
        return cls(*[operands[i : size * len(scalings) : size] for i in range(size)])

    def scaled(self) -> list[bool]:
        """Which members have a mag_norm_scale, given or made."""
        return [m is not None or s is not None for m, s in zip(self.magnitudes, self.mag_norm_scales)]


@torch.library.register_fake(add_op_namespace_prefix("lora_forward"))
def _lora_forward_fake(x, operands, scalings, seeds, dropouts, quantized, bf16x3):
    group = GroupOperands.of(operands, scalings)
    rows = x[..., 0].numel()
    ranks = sum(a.shape[0] for a in group.lora_a if a is not None)
    widths = _widths(group.weights, quantized)
    ys = [x.new_empty(*x.shape[:-1], n) for n in widths]
    unscaled = [x.new_empty(rows, n) for n, scaled in zip(widths, group.scaled()) if scaled]
    return [*ys, x.new_empty(rows, 3 * ranks if bf16x3 else ranks), *unscaled, *_made(x, widths, group.magnitudes)]


def _made(x, widths, magnitudes):
    """Fakes of the norms and of the mag_norm_scales that a forward makes."""
    norms = [x.new_empty(n, dtype=torch.float32) for n, m in zip(widths, magnitudes) if m is not None]
    return *norms, *[torch.empty_like(norm) for norm in norms]


def _widths(weights, quantized) -> list[int]:
    """N of each weight."""
    if not quantized:
        return [w.shape[0] for w in weights]
    packed = [PackedWeight.of(quantized, i) for i in range(len(weights))]
    return [p.rows if FORMATS[p.format] != "floating" else w.shape[0] for p, w in zip(packed, weights)]


def _gradients(x, used, widths, downs, lora_b, need_dx, needs):
    """Fakes of dx and of the gradients as the native ops give them; `downs` are those of every A."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grads = []
    for use, n, down, b, need in zip(used, widths, downs, lora_b, needs):
        if not use:
            continue
        grads += [down] if need & NEED_A else []
        grads += [torch.empty_like(b)] if need & NEED_B else []
        grads += [x.new_empty(n, dtype=wide) for bit in (NEED_BIAS, NEED_MAGNITUDE) if need & bit]
    return [torch.empty_like(x), *grads] if need_dx else grads


def _down_gradients(lora_a, dropouts, bf16x3) -> list[Tensor | None]:
    """Fakes of dA of members that share an input: rows of one matrix where nothing keeps them apart."""
    there = [a for a in lora_a if a is not None]
    if any(dropouts) or bf16x3 or len({a.dtype for a in there}) != 1:
        return [None if a is None else torch.empty_like(a) for a in lora_a]
    ranks = [0 if a is None else a.shape[0] for a in lora_a]
    return list(there[0].new_empty(sum(ranks), there[0].shape[1]).split(ranks))


@torch.library.register_fake(add_op_namespace_prefix("lora_backward"))
def _lora_backward_fake(
    dys, x, t, unscaled, operands, scalings, seeds, dropouts, quantized, bf16x3, need_dx, needs
):  # fmt: skip
    group = GroupOperands.of(operands, scalings)
    used, downs = [dy is not None for dy in dys], _down_gradients(group.lora_a, dropouts or (), bf16x3)
    return _gradients(x, used, _widths(group.weights, quantized), downs, group.lora_b, need_dx, needs)


@torch.library.register_fake(add_op_namespace_prefix("gated_forward"))
def _gated_forward_fake(
    x, operands, scalings, seeds, dropouts, quantized, bf16x3, activation, gate_half, up_to_h
):  # fmt: skip
    group = GroupOperands.of(operands, scalings)
    rows = x[..., 0].numel()
    ranks = [0 if a is None else (3 if bf16x3 else 1) * a.shape[0] for a in group.lora_a]
    widths, count = _widths(group.weights, quantized), len(scalings)
    outputs = [x.new_empty(rows, n) for n in widths[:-1]]
    ts = [x.new_empty(rows, sum(ranks[:-1])), x.new_empty(rows, ranks[-1])]
    masked = [p > 0 for p in dropouts or [0.0] * count]
    kept = [scaled and (p or i == count - 1) for i, (scaled, p) in enumerate(zip(group.scaled(), masked))]
    unscaled = [x.new_empty(rows, n) for n, keep in zip(widths, kept) if keep]
    h = (rows, sum(widths[:-1]) // 2)
    y = x.new_empty(h if up_to_h else (*x.shape[:-1], widths[-1]))
    return [y, *outputs, *ts, *unscaled, *_made(x, widths, group.magnitudes)]


@torch.library.register_fake(add_op_namespace_prefix("gated_backward"))
def _gated_backward_fake(
    dy, x, kept, operands, scalings, seeds, dropouts, quantized, bf16x3, activation, gate_half, need_dx, needs
):  # fmt: skip
    group, masks = GroupOperands.of(operands, scalings), dropouts or [0.0] * len(scalings)
    groups = slice(None, -1), slice(-1, None)
    downs = [down for part in groups for down in _down_gradients(group.lora_a[part], masks[part], bf16x3)]
    return _gradients(x, [True] * len(scalings), _widths(group.weights, quantized), downs, group.lora_b, need_dx, needs)


@torch.library.register_fake(add_op_namespace_prefix("column_norm"))
def _column_norm_fake(weight, lora_a, lora_b, scaling, magnitude=None):
    return [weight.new_empty(weight.shape[1], dtype=torch.float32) for _ in range(1 if magnitude is None else 2)]


@torch.library.register_fake(add_op_namespace_prefix("embedding_forward"))
def _embedding_forward_fake(ids, weight, lora_a, lora_b, mag_norm_scale, scale, scaling, number, keep):
    rows = weight.new_empty(ids.numel() if keep else 0, lora_a.shape[0], dtype=torch.float32)
    return weight.new_empty(*ids.shape, weight.shape[1]), rows


@torch.library.register_fake(add_op_namespace_prefix("embedding_backward"))
def _embedding_backward_fake(
    dy, ids, rows, weight, lora_a, lora_b, magnitude, mag_norm_scale, norm, scale, scaling, number, padding,
    need_a, need_b, need_m,
):  # fmt: skip
    wanted = ((lora_a, need_a), (lora_b, need_b), (magnitude, need_m))
    return [torch.empty_like(tensor) for tensor, need in wanted if need]


# Called inside autograd Functions alone: what the dispatcher does for operands that need a gradient,
# at every call, has no use there.
_dispatch = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "IMPL")
for _name in (
    "dora_scales", "lora_forward", "lora_backward", "gated_forward", "gated_backward", "column_norm",
    "embedding_forward", "embedding_backward", "dequantize_4bit",
):  # fmt: skip
    for _key in ("Autograd", "ADInplaceOrView"):
        _dispatch.impl(_name, torch.library.fallthrough_kernel, _key)


def _on_values(op):
    """The kernel of an op for operands whose memory does not hold their values. The dispatcher asks for it where any
    tensor is such a one, those in lists included, which torch's own fallback passes over where a list may hold None."""

    def call(*args, **kwargs):
        with torch._C.DisableTorchFunctionSubclass():
            return op(*map(with_values, args), **{name: with_values(arg) for name, arg in kwargs.items()})

    return call


# What an op writes is never such a tensor.
for _name in (
    "row_norm", "mag_norm_scale", "dropout", "dora_scales", "lora_forward", "lora_backward", "gated_forward",
    "gated_backward", "column_norm", "embedding_forward", "embedding_backward", "dequantize_4bit",
):  # fmt: skip
    for _key in ("Negative", "ZeroTensor"):
        _dispatch.impl(_name, _on_values(getattr(ops, _name).default), _key)


_without_torch_function = torch._C.DisableTorchFunctionSubclass  # bound once, as `torch` looks its attributes up slowly


def _op(name: str, past_subclasses: bool = False):
    """An op as it is called here, with the cause of a failure in place of C++'s words. `past_subclasses`: its operands
    may be bitsandbytes' parameters, a subclass of a tensor that would be asked first."""
    op = getattr(ops, name).default._op  # past `OpOverload.__call__`, which is Python and calls this

    def call(*args):
        try:
            return op(*args)
        except RuntimeError as error:
            raise native_error(error, args) from None

    def call_past(*args):
        try:
            with _without_torch_function():
                return op(*args)
        except RuntimeError as error:
            raise native_error(error, args) from None

    return call_past if past_subclasses else call


dequantize_4bit = _op("dequantize_4bit", past_subclasses=True)
lora_forward = _op("lora_forward", past_subclasses=True)
lora_backward = _op("lora_backward", past_subclasses=True)
gated_forward = _op("gated_forward", past_subclasses=True)
gated_backward = _op("gated_backward", past_subclasses=True)
column_norm = _op("column_norm")
embedding_forward = _op("embedding_forward")
embedding_backward = _op("embedding_backward")
_row_norm, _mag_norm_scale, _dropout, _dora_scales = (
    _op("row_norm"),
    _op("mag_norm_scale"),
    _op("dropout"),
    _op("dora_scales"),
)
