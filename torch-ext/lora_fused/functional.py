"""Public functions on tensors. Every input error is raised here, before anything runs."""

from __future__ import annotations

from typing import Optional, Sequence

import torch
from torch import Tensor

from . import backend as backends
from . import ops, reference
from .autograd.linear import LoraLinearFunction
from .projection import GroupSpec, Operands, flatten

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Optional[Tensor] = None,
    *,
    backend: Optional[str] = None,
) -> Tensor:
    """y = x Wᵀ + b + s · (x Aᵀ) Bᵀ, differentiable once in every tensor.

    x [..., K], weight [N, K], lora_a [R, K], lora_b [N, R], bias [N]; float32, bfloat16 or
    float16 (float64 without autocast), the adapter in a dtype of its own if it has one. The
    result is [..., N] in x's dtype, or in autocast's where that is on. Gradients come in each
    tensor's own dtype. Without autocast the reference backend computes the LoRA path in the
    adapter's dtype; the Triton backend reads the adapter in its dtype, multiplies in x's and
    sums in float32. Saved for backward: x, s·x Aᵀ and the operands.

    Raises ValueError or TypeError naming the tensor, what was seen and what was expected.
    Source: Hu et al. 2021, arXiv:2106.09685, equation 3.
    """
    return lora_linear_group(x, (Operands(weight, bias, lora_a, lora_b),), (scaling,), backend=backend)[0]


def lora_linear_group(
    x: Tensor,
    projections: Sequence[Operands],
    scalings: Sequence[float],
    *,
    backend: Optional[str] = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` for several projections of one x, as one node of the graph."""
    for operands in projections:
        _check(x, operands)
    device_type = x.device.type
    lora_dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    compute = lora_dtype or x.dtype
    for operands in projections:
        if lora_dtype is None and operands.weight.dtype != x.dtype:
            raise TypeError(f"weight: dtype {operands.weight.dtype}, expected {x.dtype} as x has (no autocast)")
        if lora_dtype is not None and any(t is not None and t.dtype == torch.float64 for t in (x, *operands)):
            raise TypeError("float64 tensors are not cast by autocast: switch it off for them")
    work = x.numel() * max(operands.weight.shape[0] for operands in projections)
    name = backend or backends.choose(x.device, compute, work)
    group = GroupSpec(members=len(projections), backend=name)
    return LoraLinearFunction.apply(group, tuple(scalings), lora_dtype, x.to(compute), *flatten(projections))


def row_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + s·B·A‖ by row, the norm of DoRA, without forming B·A.

    weight [N, K], lora_a [R, K], lora_b [N, R] in float32, bfloat16 or float16; float32 sums;
    the result is [N] in float32, detached. Native C++ on the CPU and CUDA on a GPU.

    Raises ValueError or TypeError naming the tensor, what was seen and what was expected.
    Source: Liu et al. 2024, arXiv:2402.09353, equation 5.
    """
    _check_operands(Operands(weight, None, lora_a, lora_b))
    with torch.no_grad():
        if torch.float64 in (weight.dtype, lora_a.dtype, lora_b.dtype):
            return reference.row_norm(weight, lora_a, lora_b, scaling)
        return ops.row_norm(weight, lora_a, lora_b, scaling)


def _check(x: Tensor, operands: Operands) -> None:
    _check_tensor("x", x)
    if x.dim() < 1:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected at least one dimension")
    _check_operands(operands)
    if x.shape[-1] != operands.weight.shape[1]:
        raise ValueError(
            f"x: last dimension {x.shape[-1]} (shape {tuple(x.shape)}), expected {operands.weight.shape[1]} "
            f"as weight of shape {tuple(operands.weight.shape)} has"
        )
    if x.device != operands.weight.device:
        raise ValueError(f"x: on {x.device}, expected {operands.weight.device} as weight is")


def _check_operands(operands: Operands) -> None:
    for name, tensor in zip(Operands._fields, operands):
        if tensor is not None:
            _check_tensor(name, tensor)
    weight = operands.weight
    if weight.dim() != 2:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected [N, K]")
    n, k = weight.shape
    lora_a, lora_b = operands.lora_a, operands.lora_b
    if lora_a.dim() != 2 or lora_a.shape[1] != k:
        raise ValueError(f"lora_a: shape {tuple(lora_a.shape)}, expected [R, {k}]")
    if lora_b.dim() != 2 or lora_b.shape != (n, lora_a.shape[0]):
        raise ValueError(f"lora_b: shape {tuple(lora_b.shape)}, expected [{n}, {lora_a.shape[0]}]")
    if lora_a.shape[0] == 0:
        raise ValueError(f"lora_a: shape {tuple(lora_a.shape)}, expected a rank of at least 1")
    if operands.bias is not None and operands.bias.shape != (n,):
        raise ValueError(f"bias: shape {tuple(operands.bias.shape)}, expected [{n}]")
    for name, tensor in zip(Operands._fields, operands):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {weight.device} as weight is")


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: dtype {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}")
