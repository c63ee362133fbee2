"""Groups and gated MLPs as one native op a direction, with as little Python as there can be: what waits
for the host is most of the cost of small work.

Formulas are those of `autograd.linear` and `autograd.gated`, the ops are described in
kernel-src/common/lora_group.cpp and gated_mlp.cpp. Saved for backward is what those save; DoRA keeps
the value before the mag_norm_scale with the base bias in it where the input is not dropped. `native_path` says which
projections the ops compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import quantization
from ..backends import native, select
from ..specs import FourBit, NativePath, Operands, Projection, Quantized
from . import separate_backward
from .once_differentiable import once_differentiable

_NEED_A, _NEED_B, _NEED_BIAS, _NEED_MAGNITUDE = 1, 2, 4, 8


def native_path(
    projections: Sequence[Projection], dtype: torch.dtype, lora_dtype: torch.dtype | None, is_cuda: bool
) -> NativePath:
    """Of projections of an x in `dtype`: the ops compute those on a frozen base of that dtype, with the LoRA path
    in it too or exactly. Exactly on a GPU, of DoRA without dropout, and not in float16, which has not the range for
    what the gradients of float32 adapters hold. Nor has it the range for DoRA's value before the mag_norm_scale, nor for s·b_B
    alone where s is beyond 1."""
    bf16x3, half = False, dtype == torch.float16
    for operands, scaling, spec in projections:
        weight, bias, lora_a, lora_b, lora_bias, magnitude = operands[:6]
        if half and (magnitude is not None or (lora_bias is not None and abs(scaling) > 1.0)):
            return NativePath(False)
        quantized = spec.quantized
        if quantized is not None and type(quantized) is not FourBit:
            return NativePath(False)
        stored = weight.dtype if quantized is None else quantized.dtype
        if stored != dtype or (quantized is None and weight.requires_grad):
            return NativePath(False)
        if bias is not None and bias.dtype != dtype:
            return NativePath(False)
        if lora_a is None or lora_dtype == dtype or lora_a.dtype == lora_b.dtype == dtype:
            continue
        if lora_dtype is not None or dtype != torch.bfloat16 or not lora_a.dtype == lora_b.dtype == torch.float32:
            return NativePath(False)
        bf16x3 = True
    if bf16x3 and (
        not is_cuda or any([p.spec.dropout > 0.0 and p.operands.magnitude is not None for p in projections])
    ):
        return NativePath(False)
    return NativePath(True, bf16x3)


class Wanted(NamedTuple):
    """The gradients of one projection: the ops' bits, and the dtypes of the vectors among them."""

    needs: int
    bias: torch.dtype | None
    lora_bias: torch.dtype | None
    magnitude: torch.dtype | None


class Fixed(NamedTuple):
    """What is no tensor of a call; `quantized` as `ops.PackedWeight` has it."""

    scalings: tuple[float, ...]
    dropouts: Sequence[float]  # empty without any
    quantized: list[int]
    bf16x3: bool


class Fields(NamedTuple):
    """Tensors of a call by field, one element a projection, but for `scales`, which are those of all. Biases, norms and
    mag_norm_scales are empty where no projection has one: every element costs time on its way to the ops. Before a forward norms and
    mag_norm_scales are those that others make."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    lora_a: Sequence[Tensor | None]
    lora_b: Sequence[Tensor | None]
    norms: Sequence[Tensor | None]
    mag_norm_scales: Sequence[Tensor | None]
    scales: Sequence[Tensor]

    @classmethod
    def of(cls, saved: Sequence[Tensor | None], lengths: Sequence[int]) -> Fields:
        """From the fields one after another."""
        fields, start = [], 0
        for length in lengths:
            fields.append(saved[start : start + length])
            start += length
        return cls(*fields)


def trained(projections: Sequence[Projection]) -> tuple[list[Wanted], list[Tensor]]:
    """What gradients there are, and the operands that get them, in the order in which backward gives them."""
    wanted, found = [], []
    for operands, _, _ in projections:
        _, bias, lora_a, lora_b, lora_bias, magnitude = operands[:6]
        needs, dtypes = 0, [None, None, None]
        if lora_a is not None and lora_a.requires_grad:
            needs |= _NEED_A
            found.append(lora_a)
        if lora_b is not None and lora_b.requires_grad:
            needs |= _NEED_B
            found.append(lora_b)
        for i, vector in enumerate((bias, lora_bias, magnitude)):
            if vector is not None and vector.requires_grad:
                needs |= _NEED_MAGNITUDE if vector is magnitude else _NEED_BIAS
                dtypes[i] = vector.dtype
                found.append(vector)
        wanted.append(Wanted(needs, *dtypes))
    return wanted, found


def read(
    projections: Sequence[Projection], bf16x3: bool
) -> tuple[Fixed, Fields, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """The numbers, the tensors, every b + s·b_B of a call, and the magnitudes of norms and mag_norm_scales that its forward makes."""
    all_operands, scalings, specs = zip(*projections)
    weights, biases, lora_a, lora_b, lora_biases, magnitudes, *_ = zip(*all_operands)
    formats = [spec.quantized for spec in specs]
    quantized, scales = quantization.packed(formats, all_operands) if any(formats) else ([], [])
    if any([spec.transposed for spec in specs]):
        weights = [w.t() if spec.transposed else w for spec, w in zip(specs, weights)]
    norms = mag_norm_scales = own = ()
    if any([magnitude is not None for magnitude in magnitudes]):
        own = [_own_magnitude(*each) for each in zip(weights, all_operands, formats)]
        if any([made is None and magnitude is not None for made, magnitude in zip(own, magnitudes)]):
            others = [p if made is None else p._replace(magnitude=None) for p, made in zip(all_operands, own)]
            norms, mag_norm_scales = quantization.dora_scales(weights, others, formats, scalings)
    if not any([bias is not None for bias in biases]):
        biases = ()
    whole = biases
    if any([bias is not None for bias in lora_biases]):
        whole = [_whole_bias(projection) for projection in projections]
    dropouts = [spec.dropout for spec in specs]
    fixed = Fixed(scalings, dropouts if any(dropouts) else (), quantized, bf16x3)
    return fixed, Fields(weights, biases, lora_a, lora_b, norms, mag_norm_scales, scales), whole, own


def _own_magnitude(weight: Tensor, operands: Operands, quantized: Quantized | None) -> Tensor | None:
    """The magnitude as the ops take it where a forward makes the norm."""
    if operands.magnitude is None or not select.norm_is_native(weight, operands.lora_a, operands.lora_b, quantized):
        return None
    return native.as_magnitude(operands.magnitude)


def with_made(
    fields: Fields, own: Sequence[Tensor | None], norms: list[Tensor], mag_norm_scales: list[Tensor]
) -> Fields:
    """`fields` with what a forward has made for the magnitudes `own`."""
    if len(norms) == len(own):
        return fields._replace(norms=norms, mag_norm_scales=mag_norm_scales) if own else fields
    made = zip(norms, mag_norm_scales)
    given = zip(fields.norms or (None,) * len(own), fields.mag_norm_scales or (None,) * len(own))
    pairs = [pair if magnitude is None else next(made) for pair, magnitude in zip(given, own)]
    return fields._replace(
        norms=[norm for norm, _ in pairs], mag_norm_scales=[mag_norm_scale for _, mag_norm_scale in pairs]
    )


def _whole_bias(projection: Projection) -> Tensor | None:
    operands, scaling, spec = projection
    if operands.lora_bias is None:
        return operands.bias
    scaled = operands.lora_bias * scaling
    whole = scaled if operands.bias is None else operands.bias + scaled
    return whole.to(operands.weight.dtype if spec.quantized is None else spec.quantized.dtype)


def by_trained(
    grads: Sequence[Tensor], wanted: Sequence[Wanted], scalings: Sequence[float], used: Sequence[bool]
) -> list[Tensor | None]:
    """A gradient or None for each of `trained`, from those that the ops give in turn."""
    found = iter(grads)
    result: list[Tensor | None] = []
    for (needs, bias, lora_bias, magnitude), scaling, use in zip(wanted, scalings, used):
        if needs & _NEED_A:
            result.append(next(found) if use else None)
        if needs & _NEED_B:
            result.append(next(found) if use else None)
        db = next(found) if use and needs & _NEED_BIAS else None
        if bias is not None:
            result.append(db.to(bias) if use else None)
        if lora_bias is not None:
            result.append((db * scaling).to(lora_bias) if use else None)
        if magnitude is not None:
            dm = next(found) if use else None
            result.append(dm if dm is None or dm.dtype == magnitude else dm.to(magnitude))
    return result


def group_forward(projections: Sequence[Projection], bf16x3: bool, x: Tensor, seeds: Tensor | None):
    fixed, fields, biases, own = read(projections, bf16x3)
    weights, _, lora_a, lora_b, _, mag_norm_scales, scales = fields
    scalings, dropouts, quantized, _ = fixed
    *outputs, made_norms, made_scales = native.lora_forward(
        x, weights, biases, lora_a, lora_b, mag_norm_scales, own, scalings, seeds, dropouts, scales, quantized, bf16x3
    )  # fmt: skip
    return fixed, with_made(fields, own, made_norms, made_scales), outputs


def lora_group(
    x: Tensor, projections: Sequence[Projection], seeds: Tensor | None, bf16x3: bool = False, token: object = None
) -> tuple[Tensor, ...]:
    """[..., N] of each projection; `exact` as `NativePath` has it, `token` is kept as `LoraLinearFunction` keeps it."""
    if torch.is_grad_enabled():
        wanted, tensors = trained(projections)
        return NativeGroupFunction.apply(projections, wanted, bf16x3, token, x, seeds, *tensors)
    return tuple(group_forward(projections, bf16x3, x, seeds)[2][0])


class NativeGroupFunction(torch.autograd.Function):
    """Apply as `(projections, wanted, exact, token, x, seeds, *tensors)`, wanted and tensors as `trained` gives them;
    gives a tuple of [..., N], one per projection, which separate backward calls may reach (`outputs`). Double backward
    raises."""

    @staticmethod
    def forward(ctx, projections, wanted, bf16x3, token, x: Tensor, seeds: Tensor | None, *_):
        ctx.fixed, fields, (ys, unscaled, t) = group_forward(projections, bf16x3, x, seeds)
        ctx.wanted, ctx.token, ctx.unscaled, ctx.lengths = (
            wanted,
            token,
            len(unscaled),
            [len(field) for field in fields],
        )
        ctx.kept = None
        ctx.set_materialize_grads(False)
        if len(ys) > 1:
            x = x.detach()  # a graph that holds no x: `siblings` keeps results as long as there is one
        ctx.save_for_backward(x, seeds, t, *unscaled, *[tensor for field in fields for tensor in field])
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor | None):
        used = [dy is not None for dy in dys]
        saved = separate_backward.saved_tensors(ctx, used, _operands)
        x, seeds, t, *rest = saved
        unscaled, fields, fixed = rest[: ctx.unscaled], Fields.of(rest[ctx.unscaled :], ctx.lengths), ctx.fixed
        dx, grads = native.lora_backward(
            dys, x, t, unscaled, fields.weights, fields.biases, fields.lora_a, fields.lora_b, fields.mag_norm_scales, fields.norms,
            fixed.scalings, seeds, fixed.dropouts, fields.scales, fixed.quantized,
            fixed.bf16x3, ctx.needs_input_grad[4] and any(used), [wanted.needs for wanted in ctx.wanted],
        )  # fmt: skip
        found = by_trained(grads, ctx.wanted, fixed.scalings, used)
        result = (None, None, None, None, dx[0] if dx else None, None, *found)
        separate_backward.ran(ctx, used, saved, result)
        return result


def _operands(ctx) -> list[separate_backward.Operand | None]:
    """Of the tensors that `NativeGroupFunction` saves. Weights and A are read for dx alone, biases for dm."""
    needs_x, dora = ctx.needs_input_grad[4], bool(ctx.lengths[5])
    names = (
        "weight" if needs_x else None,
        "bias" if dora else None,
        "lora_a" if needs_x else None,
        "lora_b",
        None,
        None,
    )
    found: list[separate_backward.Operand | None] = [("x", None), *[None] * (2 + ctx.unscaled)]
    for name, length in zip(names, ctx.lengths):
        found += [None if name is None else (name, i) for i in range(length)]
    return found + [("the scale of a quantized weight", None) if needs_x else None] * ctx.lengths[6]
