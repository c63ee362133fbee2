"""Groups and gated MLPs as one native op a direction, with as little Python as there can be: what waits
for the host is most of the cost of small work.

Formulas are those of `autograd.linear` and `autograd.gated`, the ops are described in
kernel-src/common/lora_group.cpp and gated_mlp.cpp. Saved for backward is what those save; DoRA keeps
the value before the gain with the base bias in it where the input is not dropped. `takes` says which
projections the ops compute.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from .. import quantization
from ..backends import native, select
from ..specs import FourBit, Operands, Projection, Quantized, Taken
from . import separate_backward
from .once_differentiable import once_differentiable

_NEED_A, _NEED_B, _NEED_BIAS, _NEED_MAGNITUDE = 1, 2, 4, 8


def takes(
    projections: Sequence[Projection], dtype: torch.dtype, lora_dtype: Optional[torch.dtype], is_cuda: bool
) -> Taken:
    """Of projections of an x in `dtype`: the ops compute those on a frozen base of that dtype, with the LoRA path
    in it too or exactly. Exactly on a GPU, of DoRA without dropout, and not in float16, which has not the range for
    what the gradients of float32 adapters hold. Nor has it the range for DoRA's value before the gain, nor for s·b_B
    alone where s is beyond 1."""
    exact, half = False, dtype == torch.float16
    for operands, scaling, spec in projections:
        weight, bias, lora_a, lora_b, lora_bias, magnitude = operands[:6]
        if half and (magnitude is not None or (lora_bias is not None and abs(scaling) > 1.0)):
            return Taken(False)
        quantized = spec.quantized
        if quantized is not None and type(quantized) is not FourBit:
            return Taken(False)
        stored = weight.dtype if quantized is None else quantized.dtype
        if stored != dtype or (quantized is None and weight.requires_grad):
            return Taken(False)
        if bias is not None and bias.dtype != dtype:
            return Taken(False)
        if lora_a is None or lora_dtype == dtype or lora_a.dtype == lora_b.dtype == dtype:
            continue
        if lora_dtype is not None or dtype != torch.bfloat16 or not lora_a.dtype == lora_b.dtype == torch.float32:
            return Taken(False)
        exact = True
    if exact and (not is_cuda or any([p.spec.dropout > 0.0 and p.operands.magnitude is not None for p in projections])):
        return Taken(False)
    return Taken(True, exact)


class Wanted(NamedTuple):
    """The gradients of one projection: the ops' bits, and the dtypes of the vectors among them."""

    needs: int
    bias: Optional[torch.dtype]
    lora_bias: Optional[torch.dtype]
    magnitude: Optional[torch.dtype]


class Fixed(NamedTuple):
    """What is no tensor of a call; `quantized` as `ops.PackedWeight` has it."""

    scalings: tuple[float, ...]
    dropouts: Sequence[float]  # empty without any
    quantized: list[int]
    exact: bool


class Fields(NamedTuple):
    """Tensors of a call by field, one element a projection, but for `scales`, which are those of all. Biases, norms and
    gains are empty where no projection has one: every element costs time on its way to the ops. Before a forward norms and
    gains are those that others make."""

    weights: Sequence[Tensor]
    biases: Sequence[Optional[Tensor]]
    lora_a: Sequence[Optional[Tensor]]
    lora_b: Sequence[Optional[Tensor]]
    norms: Sequence[Optional[Tensor]]
    gains: Sequence[Optional[Tensor]]
    scales: Sequence[Tensor]

    @classmethod
    def of(cls, saved: Sequence[Optional[Tensor]], lengths: Sequence[int]) -> Fields:
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
    projections: Sequence[Projection], exact: bool
) -> tuple[Fixed, Fields, Sequence[Optional[Tensor]], Sequence[Optional[Tensor]]]:
    """The numbers, the tensors, every b + s·b_B of a call, and the magnitudes of norms and gains that its forward makes."""
    all_operands, scalings, specs = zip(*projections)
    weights, biases, lora_a, lora_b, lora_biases, magnitudes, *_ = zip(*all_operands)
    formats = [spec.quantized for spec in specs]
    quantized, scales = quantization.packed(formats, all_operands) if any(formats) else ([], [])
    if any([spec.transposed for spec in specs]):
        weights = [w.t() if spec.transposed else w for spec, w in zip(specs, weights)]
    norms = gains = own = ()
    if any([magnitude is not None for magnitude in magnitudes]):
        own = [_own_magnitude(*each) for each in zip(weights, all_operands, formats)]
        if any([made is None and magnitude is not None for made, magnitude in zip(own, magnitudes)]):
            others = [p if made is None else p._replace(magnitude=None) for p, made in zip(all_operands, own)]
            norms, gains = quantization.dora_gains(weights, others, formats, scalings)
    if not any([bias is not None for bias in biases]):
        biases = ()
    whole = biases
    if any([bias is not None for bias in lora_biases]):
        whole = [_whole_bias(projection) for projection in projections]
    dropouts = [spec.dropout for spec in specs]
    fixed = Fixed(scalings, dropouts if any(dropouts) else (), quantized, exact)
    return fixed, Fields(weights, biases, lora_a, lora_b, norms, gains, scales), whole, own


def _own_magnitude(weight: Tensor, operands: Operands, quantized: Optional[Quantized]) -> Optional[Tensor]:
    """The magnitude as the ops take it where a forward makes the norm."""
    if operands.magnitude is None or not select.norm_is_native(weight, operands.lora_a, operands.lora_b, quantized):
        return None
    return native.as_magnitude(operands.magnitude)


def with_made(fields: Fields, own: Sequence[Optional[Tensor]], norms: list[Tensor], gains: list[Tensor]) -> Fields:
    """`fields` with what a forward has made for the magnitudes `own`."""
    if len(norms) == len(own):
        return fields._replace(norms=norms, gains=gains) if own else fields
    made = zip(norms, gains)
    given = zip(fields.norms or (None,) * len(own), fields.gains or (None,) * len(own))
    pairs = [pair if magnitude is None else next(made) for pair, magnitude in zip(given, own)]
    return fields._replace(norms=[norm for norm, _ in pairs], gains=[gain for _, gain in pairs])


def _whole_bias(projection: Projection) -> Optional[Tensor]:
    operands, scaling, spec = projection
    if operands.lora_bias is None:
        return operands.bias
    scaled = operands.lora_bias * scaling
    whole = scaled if operands.bias is None else operands.bias + scaled
    return whole.to(operands.weight.dtype if spec.quantized is None else spec.quantized.dtype)


def by_trained(
    grads: Sequence[Tensor], wanted: Sequence[Wanted], scalings: Sequence[float], used: Sequence[bool]
) -> list[Optional[Tensor]]:
    """A gradient or None for each of `trained`, from those that the ops give in turn."""
    found = iter(grads)
    result: list[Optional[Tensor]] = []
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


def group_forward(projections: Sequence[Projection], exact: bool, x: Tensor, seeds: Optional[Tensor]):
    fixed, fields, biases, own = read(projections, exact)
    weights, _, lora_a, lora_b, _, gains, scales = fields
    scalings, dropouts, quantized, _ = fixed
    *outputs, made_norms, made_gains = native.lora_forward(
        x, weights, biases, lora_a, lora_b, gains, own, scalings, seeds, dropouts, scales, quantized, exact
    )  # fmt: skip
    return fixed, with_made(fields, own, made_norms, made_gains), outputs


def lora_group(
    x: Tensor, projections: Sequence[Projection], seeds: Optional[Tensor], exact: bool = False, token: object = None
) -> tuple[Tensor, ...]:
    """[..., N] of each projection; `exact` as `Taken` has it, `token` is kept as `LoraLinearFunction` keeps it."""
    if torch.is_grad_enabled():
        wanted, tensors = trained(projections)
        return NativeGroupFunction.apply(projections, wanted, exact, token, x, seeds, *tensors)
    return tuple(group_forward(projections, exact, x, seeds)[2][0])


class NativeGroupFunction(torch.autograd.Function):
    """Apply as `(projections, wanted, exact, token, x, seeds, *tensors)`, wanted and tensors as `trained` gives them;
    gives a tuple of [..., N], one per projection, which separate backward calls may reach (`outputs`). Double backward
    raises."""

    @staticmethod
    def forward(ctx, projections, wanted, exact, token, x: Tensor, seeds: Optional[Tensor], *_):
        ctx.fixed, fields, (ys, us, t) = group_forward(projections, exact, x, seeds)
        ctx.wanted, ctx.token, ctx.us, ctx.lengths = wanted, token, len(us), [len(field) for field in fields]
        ctx.kept = None
        ctx.set_materialize_grads(False)
        if len(ys) > 1:
            x = x.detach()  # a graph that holds no x: `siblings` keeps results as long as there is one
        ctx.save_for_backward(x, seeds, t, *us, *[tensor for field in fields for tensor in field])
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Optional[Tensor]):
        used = [dy is not None for dy in dys]
        saved = separate_backward.saved_tensors(ctx, used, _operands)
        x, seeds, t, *rest = saved
        us, fields, fixed = rest[: ctx.us], Fields.of(rest[ctx.us :], ctx.lengths), ctx.fixed
        dx, grads = native.lora_backward(
            dys, x, t, us, fields.weights, fields.biases, fields.lora_a, fields.lora_b, fields.gains, fields.norms,
            fixed.scalings, seeds, fixed.dropouts, fields.scales, fixed.quantized,
            fixed.exact, ctx.needs_input_grad[4] and any(used), [wanted.needs for wanted in ctx.wanted],
        )  # fmt: skip
        found = by_trained(grads, ctx.wanted, fixed.scalings, used)
        result = (None, None, None, None, dx[0] if dx else None, None, *found)
        separate_backward.ran(ctx, used, saved, result)
        return result


def _operands(ctx) -> list[Optional[separate_backward.Operand]]:
    """Of the tensors that `NativeGroupFunction` saves. Weights and A are read for dx alone, biases for dm."""
    needs_x, dora = ctx.needs_input_grad[4], bool(ctx.lengths[5])
    names = ("weight" if needs_x else None, "bias" if dora else None, "lora_a" if needs_x else None, "lora_b", None, None)
    found: list[Optional[separate_backward.Operand]] = [("x", None), *[None] * (2 + ctx.us)]
    for name, length in zip(names, ctx.lengths):
        found += [None if name is None else (name, i) for i in range(length)]
    return found + [("the scale of a quantized weight", None) if needs_x else None] * ctx.lengths[6]
