"""Public functions on tensors. Every input error is raised here, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import select
from ..call_context import autocast_dtype
from ..specs import Operands, Projection, ProjectionSpec
from .checks import check_number, check_tensor, shown
from .dispatch import compute_group


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    lora_bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """LoRA, or DoRA with a magnitude; differentiable once in every tensor. With d = dropout(x):

        y = x Wᵀ + b + (g - 1)∘(d Wᵀ) + g∘(s · (d Aᵀ) Bᵀ) + s·b_B

    where g = 1 for LoRA and g = magnitude / ‖W + s·B·A‖ by row, its norm detached, for DoRA.

    x [..., K], weight [N, K], lora_a [R, K], lora_b [N, R], bias, lora_bias and magnitude [N]; float32,
    bfloat16 or float16 (float64 without autocast), the adapter in a dtype of its own if it has
    one. `dropout` is the probability of a training step, 0 otherwise; its mask is drawn from
    torch's generator for x's device. The result is [..., N] in x's dtype, or in autocast's where
    that is on. Gradients come in each tensor's own dtype. Without autocast the reference backend
    computes the LoRA path in the adapter's dtype; the Triton backend reads the adapter in its dtype,
    multiplies in x's and sums in float32. Saved for backward: x, s·d Aᵀ, for DoRA the value before
    the mag_norm_scale, and the operands.

    Raises ValueError or TypeError naming the tensor, what was seen and what was expected.
    Source: Hu et al. 2021, arXiv:2106.09685, equation 3; Liu et al. 2024, arXiv:2402.09353.
    """
    operands = Operands(weight, bias, lora_a, lora_b, lora_bias, magnitude)
    projection = Projection(operands, scaling, ProjectionSpec(dropout))
    return lora_linear_group(x, (projection,), backend=backend)[0]


def lora_linear_group(
    x: Tensor,
    projections: Sequence[Projection],
    *,
    share_mask: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` for several projections of one x, as one node of the graph.

    Members may differ in everything, and have no adapter at all. Each draws a dropout mask of its
    own, as PEFT's layers do; with `share_mask` they have one in common.
    """
    check_tensor("x", x)
    if x.dim() < 1:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected at least one dimension")
    if not isinstance(projections, Sequence) or isinstance(projections, Projection):
        raise TypeError(f"projections: {type(projections).__name__}, expected a list of Projections")
    if not projections:
        raise ValueError("projections: empty, expected at least one")
    for projection in projections:
        if not isinstance(projection, Projection):
            raise TypeError(f"projections: {type(projection).__name__}, expected each to be a Projection")
        _check_projection(x, projection)
    _check_dtypes(x, projections)
    select.check_backend(backend, x.device)
    return compute_group(x, projections, share_mask=share_mask, backend=backend)


def row_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + s·B·A‖ by row, the norm of DoRA, without forming B·A.

    weight [N, K], lora_a [R, K], lora_b [N, R] in float32, bfloat16 or float16; float32 sums;
    the result is [N] in float32, detached. C++ on the CPU, CUDA and, for large ranks, Triton on a
    GPU. float64 operands are computed in float64, B·A formed.

    Raises ValueError or TypeError naming the tensor, what was seen and what was expected.
    Source: Liu et al. 2024, arXiv:2402.09353, equation 5.
    """
    check_number("scaling", scaling)
    _check_operands(Operands(weight, None, lora_a, lora_b))
    with torch.no_grad():
        return select.row_norm(weight, lora_a, lora_b, scaling)


def _check_projection(x: Tensor, projection: Projection) -> None:
    operands, spec = projection.operands, projection.spec
    if not isinstance(operands, Operands):
        raise TypeError(f"operands: {type(operands).__name__}, expected Operands")
    if not isinstance(spec, ProjectionSpec):
        raise TypeError(f"spec: {type(spec).__name__}, expected a ProjectionSpec")
    check_number("scaling", projection.scaling)
    if not isinstance(spec.dropout, (int, float)) or not 0.0 <= spec.dropout <= 1.0:
        raise ValueError(f"dropout: {shown(spec.dropout)}, expected a probability from 0 to 1")
    _check_operands(operands, spec.transposed)
    _check_not_quantized(operands, spec)
    if x.device != operands.weight.device:
        raise ValueError(f"x: on {x.device}, expected {operands.weight.device} as weight is")
    features = operands.weight.shape[0 if spec.transposed else 1]
    if x.shape[-1] != features:
        raise ValueError(
            f"x: last dimension {x.shape[-1]} (shape {tuple(x.shape)}), expected {features} "
            f"as weight of shape {tuple(operands.weight.shape)} has"
        )


def _check_not_quantized(operands: Operands, spec: ProjectionSpec) -> None:
    scales = {name: getattr(operands, name) for name in ("absmax", "nested_absmax", "nested_code", "offset")}
    for name, given in (("quantized", spec.quantized), *scales.items()):
        if given is not None:
            raise ValueError(f"{name}: {shown(given)}, expected None: a weight is of floating-point numbers here")


def _check_dtypes(x: Tensor, projections: Sequence[Projection]) -> None:
    autocast = autocast_dtype(x) is not None
    for operands, _, _ in projections:
        if not autocast and operands.weight.dtype != x.dtype:
            raise TypeError(f"weight: dtype {operands.weight.dtype}, expected {x.dtype} as x has (no autocast)")
        if autocast and any(t is not None and t.dtype == torch.float64 for t in (x, *operands)):
            raise TypeError("float64 tensors are not cast by autocast: switch it off for them")


def _check_operands(operands: Operands, transposed: bool = False) -> None:
    for name, tensor in zip(Operands._fields, operands):
        if tensor is not None or name == "weight":
            check_tensor(name, tensor)
    weight, lora_a, lora_b = operands.weight, operands.lora_a, operands.lora_b
    if weight.dim() != 2:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected {'[K, N]' if transposed else '[N, K]'}")
    n, k = reversed(weight.shape) if transposed else weight.shape
    fitting = f"for weight of shape {tuple(weight.shape)}"
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b: one is None, expected both or neither")
    if lora_a is None:
        extra = (
            "lora_bias" if operands.lora_bias is not None else "magnitude" if operands.magnitude is not None else None
        )
        if extra:
            raise ValueError(f"{extra}: given without lora_a and lora_b")
    else:
        if lora_a.dim() != 2 or lora_a.shape[1] != k:
            raise ValueError(f"lora_a: shape {tuple(lora_a.shape)}, expected [R, {k}] {fitting}")
        if lora_b.dim() != 2 or lora_b.shape != (n, lora_a.shape[0]):
            raise ValueError(f"lora_b: shape {tuple(lora_b.shape)}, expected [{n}, {lora_a.shape[0]}] {fitting}")
        if lora_a.shape[0] == 0:
            raise ValueError(f"lora_a: shape {tuple(lora_a.shape)}, expected a rank of at least 1")
    if operands.lora_bias is not None and operands.magnitude is not None:
        raise ValueError("lora_bias: given with a magnitude, PEFT has no DoRA with lora_bias")
    for name in ("bias", "lora_bias", "magnitude"):
        vector = getattr(operands, name)
        if vector is not None and vector.shape != (n,):
            raise ValueError(f"{name}: shape {tuple(vector.shape)}, expected [{n}] {fitting}")
    for name, tensor in zip(Operands._fields, operands):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {weight.device} as weight is")
