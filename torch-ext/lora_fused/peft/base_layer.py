"""What stands under a LoRA layer: the base's part of `peft.linear`. A base layer becomes the operands
of its product, or the reason why its own forward computes the product ("fused delta"), or why PEFT's
forward runs; and whether tensors are what the products take. Read anew at every call, so nothing here can go stale.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import select
from ..call_context import autocast_dtype, device_type, new_tuple
from ..specs import EightBit, Fallback, FourBit, Operands, Quantized
from . import replaced

_is_traced = torch.compiler.is_dynamo_compiling
PLAIN_TENSORS = (nn.Parameter, Tensor)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STRIDED = torch.strided
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# Every class of a floating-point base whose product we make, as (module, name): x Wᵀ + b, W stored as [N, K] or [K, N].
_FALCON = ("transformers.models.falcon.modeling_falcon", "FalconLinear")
LINEARS = (
    ("torch.nn.modules.linear", "Linear"),
    ("torch.nn.modules.linear", "NonDynamicallyQuantizableLinear"),
    ("transformers.models.esm.modeling_esmfold", "EsmFoldLinear"),
    _FALCON,
)
TRANSPOSED = (("transformers.pytorch_utils", "Conv1D"),)
# Bases that are called whatever LoRA layer stands on them: their weight is not what they multiply with.
_OWN_FORWARD = (
    ("transformers.integrations.finegrained_fp8", "FP8Linear"),
    ("peft.utils.other", "TrainableTokensWrapper"),
    ("peft.tuners.trainable_tokens.layer", "TrainableTokensLayer"),
)


_NO_SCALES = (None, None, None, None)


class Base(NamedTuple):
    """The product of a base layer: its weight and bias as `Operands` has them, the shape [N, K] of the weight.

    compute: dtype of the product where the layer has one of its own; its result is cast back to x's.
    own_forward: why the layer's own forward computes the product; the weight may then be None.
    scales: `Operands` from absmax on.
    """

    weight: Tensor | None
    bias: Tensor | None
    shape: tuple[int, int] | None
    quantized: Quantized | None = None
    compute: torch.dtype | None = None
    own_forward: str | None = None
    scales: tuple[Tensor | None, ...] = _NO_SCALES


def tensor_of(layer: nn.Module, name: str) -> Tensor | None:
    """A layer's parameter, or what FSDP1 has put in its place. KeyError where it is neither."""
    parameters = layer._parameters
    return parameters[name] if name in parameters else layer.__dict__[name]


def unread(error: Exception) -> Fallback:
    """Of a module that cannot be read: PEFT's own forward finds what another tool put elsewhere, or says what is
    wrong."""
    if isinstance(error, KeyError):
        return Fallback(f"{error} is not where it belongs: another tool has taken it out")
    return Fallback(f"a parameter cannot be read: {error}")


def read_base(base: nn.Module, transposed: bool, opaque: bool) -> Base | Fallback:
    """What a base layer computes now; `opaque` where the LoRA layer is one for bases of a kind of its own."""
    if type(base) is nn.Linear and not transposed:  # nearly all, past what others ask
        state = base.__dict__
        parameters = state["_parameters"]
        weight = parameters["weight"] if "weight" in parameters else state["weight"]  # as `tensor_of` has it
        if type(weight) in PLAIN_TENSORS:
            bias = parameters["bias"] if "bias" in parameters else state["bias"]
            shape = (state["out_features"], state["in_features"])
            return new_tuple(Base, (weight, bias, shape, None, None, None, _NO_SCALES))
    found = _read(base, transposed, opaque)
    if type(base) is nn.Linear or isinstance(found, Fallback) or found.own_forward:
        return found
    reason = replaced.module_reason(type(base))
    return Fallback(reason) if reason else found


def _read(base: nn.Module, transposed: bool, opaque: bool) -> Base | Fallback:
    cls: Any = type(base)
    linear = cls is nn.Linear or is_listed(cls, LINEARS)
    if linear or (transposed and is_listed(cls, TRANSPOSED)):
        weight = tensor_of(base, "weight")
        if _is_torchao(weight):
            return _with_own_forward(f"{type(weight).__name__}")
        if transposed and linear:
            return Fallback(f"fan_in_fan_out on a {cls.__name__}")
        bias = tensor_of(base, "bias")
        if cls is not nn.Linear and _adds_bias_in_its_dtype(cls, bias):
            return _with_own_forward(f"{cls.__name__} adds its bias of {bias.dtype} to what autocast gives")
        shape = (base.nf, base.nx) if transposed else (base.out_features, base.in_features)
        return Base(weight, bias, shape)
    for (module, name), read in READERS.items():
        known = getattr(sys.modules.get(module), name, None)  # None where its library is not loaded
        if known is not None and isinstance(base, known) and cls.forward is known.forward:  # as NF4's and FP4's are
            return read(base)
    if opaque or is_listed(cls, _OWN_FORWARD):
        return _with_own_forward(f"{cls.__name__}")
    return Fallback(f"unknown base layer {cls.__name__}" + ("" if _is_traced() else f" of {cls.__module__}"))


_is_listed: dict[tuple, bool] = {}


def is_listed(cls: type, listed: tuple[tuple[str, str], ...]) -> bool:
    """Whether a class is the one of that name in one of the modules listed, and not just called like it."""
    key = cls, listed
    found = None if _is_traced() else _is_listed.get(key)
    if found is None:
        found = any([cls is getattr(sys.modules.get(module), name, None) for module, name in listed])
        if not _is_traced():  # a trace leaves no trace
            _is_listed[key] = found
    return found


def _adds_bias_in_its_dtype(cls: type, bias: Tensor | None) -> bool:
    """FalconLinear adds its bias after the product, so that under autocast the result has the wider dtype."""
    return bias is not None and is_listed(cls, (_FALCON,)) and autocast_dtype(bias) not in (None, bias.dtype)


def _with_own_forward(kind: str) -> Base:
    return Base(None, None, None, own_forward=f"base layer's own forward: {kind}")


def _is_torchao(weight: Tensor) -> bool:
    return type(weight) not in PLAIN_TENSORS and type(weight).__module__.startswith("torchao.")


def _read_4bit(base: nn.Module) -> Base | Fallback:
    reason = replaced.function_reason(sys.modules["bitsandbytes"], "matmul_4bit")
    if reason:
        return Fallback(reason)
    with torch._C.DisableTorchFunctionSubclass():  # else every look at the weight costs a call
        weight = tensor_of(base, "weight")
        own = getattr(weight, "quant_state", None)
        state = base.quant_state if own is None else own  # FSDP's tensors have lost it; bitsandbytes looks there, too
        shape = (base.out_features, base.in_features)
        if state is None:
            return Fallback(f"base weight of {weight.dtype} is not quantized yet: move it to its device", raises=True)
        if weight.is_meta:
            return Fallback("weight is on the meta device")
        if getattr(state, "packing_format_for_cpu", False):
            return Fallback("the base weight is packed for inference on this CPU")
        if state.shape is None or tuple(state.shape) != shape:
            return Fallback(f"quantized from shape {state.shape}, the layer is {shape}")
        if state.quant_type not in ("nf4", "fp4") or state.dtype not in _FLOATS:
            return Fallback(f"quantization {state.quant_type} of {state.dtype}")
        broken = _broken_4bit(weight, state, shape)
        if broken:
            return Fallback(broken, raises=own is not None)
        device = device_type(weight)
    nested = state.state2
    quantized = FourBit(
        shape, state.blocksize, 0 if nested is None else nested.blocksize, state.quant_type == "fp4", state.dtype
    )
    bias, compute = tensor_of(base, "bias"), base.compute_dtype
    if device == "cpu" and shape[1] % state.blocksize != 0:
        own_forward = (
            "base layer's own forward: rows of broken blocks, which bitsandbytes reads in its own way on the CPU"
        )
        return Base(None, bias, shape, own_forward=own_forward)
    own_forward = None
    if not base.compute_type_is_set:
        own_forward = "base layer's own forward: its first input decides what it computes in"
    elif device not in ("cpu", "cuda"):
        own_forward = f"base layer's own forward: no kernel for {device}"
    elif bias is not None and compute is not None and bias.dtype != compute:
        own_forward = f"base layer's own forward: it casts its bias of {bias.dtype} to {compute} first"
    more = (None,) * 3 if nested is None else (nested.absmax, nested.code, state.offset)
    return Base(weight, bias, shape, quantized, compute, own_forward, (state.absmax, *more))


def _broken_4bit(weight: Tensor, state, shape: tuple[int, int]) -> str | None:
    """What is wrong with a quantization state that bitsandbytes would compute garbage from."""
    values, blocksize = shape[0] * shape[1], state.blocksize
    if blocksize not in _BLOCKSIZES:
        return f"blocksize {blocksize}, expected one of {_BLOCKSIZES}"
    held = 2 * weight.numel() * weight.element_size()
    if held - values not in (0, 1) or not weight.is_contiguous():
        return f"packed weight holds {held} values, expected {values} for shape {shape}, contiguous"
    blocks = -(-values // blocksize)
    nested = state.state2
    parts = {"absmax": (state.absmax, torch.float32 if nested is None else torch.uint8, blocks)}
    if nested is not None:
        if nested.blocksize not in _BLOCKSIZES:
            return f"nested blocksize {nested.blocksize}, expected one of {_BLOCKSIZES}"
        parts["nested absmax"] = (nested.absmax, torch.float32, -(-blocks // nested.blocksize))
        parts["nested code"] = (nested.code, torch.float32, 256)
        parts["offset"] = (state.offset, torch.float32, 1)
    for name, (tensor, dtype, size) in parts.items():
        if tensor is None:
            return f"{name} is missing"
        if tensor.numel() != size:
            return f"{name} has {tensor.numel()} elements, expected {size} for shape {shape} and blocksize {blocksize}"
        if tensor.dtype != dtype:
            return f"{name} has dtype {tensor.dtype}, expected {dtype}"
        if tensor.device != weight.device:
            return f"{name} is on {tensor.device}, the packed weight on {weight.device}"
    return None


def _read_8bit(base: nn.Module) -> Base | Fallback:
    """Activations are quantized too, so the product is the layer's own; DoRA's norm needs the weight."""
    with torch._C.DisableTorchFunctionSubclass():
        weight = tensor_of(base, "weight")
        waiting = getattr(weight, "CB", None) is not None  # the layer's next call takes over the weight's scales
        absmax = getattr(weight, "SCB", None) if waiting else base.state.SCB
        shape = (base.out_features, base.in_features)
        if absmax is None and weight.dtype == torch.int8:
            return Fallback("the scales of the int8 weight are missing", raises=True)
        known = (
            weight.dtype == torch.int8
            and absmax is not None
            and tuple(weight.shape) == shape
            and absmax.numel() == shape[0]
            and absmax.device == weight.device
        )
    bias = tensor_of(base, "bias")
    own_forward = f"base layer's own forward: {type(base).__name__}"
    if not known:
        return Base(None, bias, shape, own_forward=own_forward)
    return Base(weight, bias, shape, EightBit(shape), own_forward=own_forward, scales=(absmax, None, None, None))


# Layers of quantized weights, as (module, name), and what reads one. Subclasses that leave the forward as it is are
# read too.
READERS = {
    ("bitsandbytes.nn.modules", "Linear4bit"): _read_4bit,
    ("bitsandbytes.nn.modules", "Linear8bitLt"): _read_8bit,
}


def device_of(operands: Operands) -> torch.device:
    """Of the base weight, or of the adapter where that is unknown. A quantized weight is a subclass whose every
    attribute costs a call of Python; its scales are where it is (`peft.base_layer`)."""
    known = operands.absmax
    if known is None:
        known = operands.lora_a if operands.weight is None else operands.weight
    return known.device


def tensor_reason(operands: Operands, base: Base, transposed: bool = False) -> str | None:
    """Of all tensors, or of the adapter's alone where the weight is not floating-point numbers."""
    weight, bias, lora_a, lora_b, lora_bias, magnitude = operands[:6]
    _, _, shape, quantized, _, own_forward, _ = base
    dense = quantized is None and weight is not None
    device = weight.device if dense else device_of(operands)
    own_bias = None if own_forward else bias
    for tensor in (weight if dense else None, own_bias, lora_a, lora_b, lora_bias, magnitude):
        if tensor is not None and (
            type(tensor) not in PLAIN_TENSORS
            or tensor.layout is not STRIDED
            or tensor.dtype not in DTYPES
            or tensor.device != device
        ):
            return unfit_reason(
                next(name for name, each in zip(Operands._fields, operands) if each is tensor), tensor, device
            )
    known = weight if dense else lora_a
    if not (known is None or known.is_cuda or known.is_cpu) and (elsewhere := select.device_reason(device)):
        return f"its tensors are {elsewhere}"
    if dense and weight.shape != (shape[::-1] if transposed else shape):
        return f"weight has shape {tuple(weight.shape)} (sharded or replaced)"
    if own_bias is not None and bias.shape != (shape[0],):
        return f"bias has shape {tuple(bias.shape)}, which does not fit"
    return None


def unfit_reason(name: str, tensor: Tensor, device: torch.device) -> str | None:
    """Why a tensor is none that the products take; `device` is the base weight's."""
    if type(tensor) not in PLAIN_TENSORS:
        return f"{name} is a {type(tensor).__name__} (sharded or wrapped)"
    if tensor.layout is not STRIDED:
        return f"{name} has the layout {tensor.layout}"
    if not (tensor.is_cuda or tensor.is_cpu) and (elsewhere := select.device_reason(tensor.device)):
        return f"{name} is {elsewhere}"
    if tensor.dtype not in DTYPES:
        return f"{name} has dtype {tensor.dtype}"
    if tensor.device != device:
        return f"{name} is on {tensor.device}, the base weight on {device}"
    return None


def fit_reason(operands: Operands, n: int, k: int) -> str | None:
    """An adapter that does not fit gets PEFT's own error."""
    _, _, lora_a, lora_b, lora_bias, magnitude = operands[:6]
    a, b = lora_a.shape, lora_b.shape
    if len(a) != 2 or a[1] != k or b != (n, a[0]):
        return f"lora_A has shape {tuple(a)} and lora_B {tuple(b)}, which do not fit"
    if lora_bias is not None and lora_bias.shape != (n,):
        return f"lora_bias has shape {tuple(lora_bias.shape)}, which does not fit"
    if magnitude is not None and magnitude.shape != (n,):
        return f"magnitude has shape {tuple(magnitude.shape)}, which does not fit"
    return None


def remember_bases() -> None:
    """`replaced.remember` for the classes of base layers whose libraries are loaded."""
    listed = (*LINEARS, *TRANSPOSED, *READERS)
    found = (getattr(sys.modules.get(module), name, None) for module, name in listed)
    functions = [(sys.modules["bitsandbytes"], "matmul_4bit")] if "bitsandbytes" in sys.modules else ()
    replaced.remember((cls for cls in found if cls is not None), functions)
