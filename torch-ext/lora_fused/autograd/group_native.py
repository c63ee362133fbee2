"""Groups and gated MLPs as one native op a direction, with as little Python as there can be: what waits
for the host is most of the cost of small work.

Formulas are those of `group_eager` and `gated_mlp_eager`, the ops are described in
kernel-src/ops/lora_group.cpp and gated_mlp.cpp. Saved for backward is what those save; DoRA keeps
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
from ..specs import NativePath, Projection
from . import separate_backward
from .direct_apply import apply_of
from .once_differentiable import once_differentiable

_NEED_A, _NEED_B, _NEED_BIAS, _NEED_MAGNITUDE = 1, 2, 4, 8


def native_path(
    projections: Sequence[Projection], dtype: torch.dtype, lora_dtype: torch.dtype | None, is_cuda: bool
) -> NativePath:
    """Of projections of an x in `dtype`: the ops compute those on a frozen base of that dtype, with the LoRA path
    in it too or exactly. Exactly on a GPU, of DoRA without dropout, and not in float16, which has not the range for
    what the gradients of float32 adapters hold. Nor has it the range for DoRA's value before the mag_norm_scale, nor
    for s·b_B alone where s is beyond 1."""
    if not native.available:
        return NativePath(False)
    bf16x3, half = False, dtype == torch.float16
    for operands, scaling, spec in projections:
        weight, bias, lora_a, lora_b, lora_bias, magnitude = operands[:6]
        if half and (magnitude is not None or (lora_bias is not None and not -1.0 <= scaling <= 1.0)):
            return NativePath(False)
        quantized = spec.quantized
        if quantized is not None and getattr(quantized, "native_format", None) is None:
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


class OpArguments(NamedTuple):
    """What the native ops take besides x and seeds. Of each projection OPERANDS tensors: weight [N, K], b + s·b_B, A,
    B, the magnitude where a forward makes the norm, and the mag_norm_scale where somebody else does; then the scales of
    all weights in four bits. `quantized` as `native.PackedWeight` has it; None, as dropouts, where there are none: a
    list costs the dispatcher more than its elements."""

    operands: list[Tensor | None]
    scalings: list[float]
    dropouts: list[float] | None
    quantized: list[int] | None
    bf16x3: bool


OPERANDS = 6
_BIAS, _MAGNITUDE_OR_NORM, _MAG_NORM_SCALE = 1, 4, 5


def trained(projections: Sequence[Projection]) -> tuple[list[Wanted], list[Tensor]]:
    """What gradients there are, and the operands that get them, in the order in which backward gives them."""
    wanted, found = [], []
    for operands, _, _ in projections:
        _, bias, lora_a, lora_b, lora_bias, magnitude = operands[:6]
        needs = 0
        of_bias = of_lora_bias = of_magnitude = None
        if lora_a is not None and lora_a.requires_grad:
            needs |= _NEED_A
            found.append(lora_a)
        if lora_b is not None and lora_b.requires_grad:
            needs |= _NEED_B
            found.append(lora_b)
        if bias is not None and bias.requires_grad:
            needs, of_bias = needs | _NEED_BIAS, bias.dtype
            found.append(bias)
        if lora_bias is not None and lora_bias.requires_grad:
            needs, of_lora_bias = needs | _NEED_BIAS, lora_bias.dtype
            found.append(lora_bias)
        if magnitude is not None and magnitude.requires_grad:
            needs, of_magnitude = needs | _NEED_MAGNITUDE, magnitude.dtype
            found.append(magnitude)
        wanted.append(Wanted(needs, of_bias, of_lora_bias, of_magnitude))
    return wanted, found


def read(projections: Sequence[Projection], bf16x3: bool) -> tuple[OpArguments, dict[int, Tensor]]:
    """What a forward takes, and norms that it does not make, by projection."""
    operands: list[Tensor | None] = []
    scalings: list = []  # numbers: `specs.fold` has multiplied those that are tensors into B
    dropouts, others = [], []
    drops = is_quantized = False
    for i, projection in enumerate(projections):
        (weight, bias, lora_a, lora_b, lora_bias, magnitude, *_), scaling, spec = projection
        if spec.transposed:
            weight = weight.t()
        if lora_bias is not None:
            bias = _whole_bias(projection)
        if magnitude is not None:
            if select.norm_is_native(weight, lora_a, lora_b, spec.quantized):
                magnitude = native.as_magnitude(magnitude)
            else:
                magnitude = None
                others.append(i)
        operands += (weight, bias, lora_a, lora_b, magnitude, None)
        scalings.append(scaling)
        dropouts.append(spec.dropout)
        drops = drops or spec.dropout > 0.0
        is_quantized = is_quantized or spec.quantized is not None
    numbers = None
    if is_quantized:
        numbers, scales = quantization.packed(
            [p.spec.quantized for p in projections], [p.operands for p in projections]
        )
        operands += scales
    norms = _other_norms(projections, operands, others) if others else {}
    return OpArguments(operands, scalings, dropouts if drops else None, numbers, bf16x3), norms


def _other_norms(
    projections: Sequence[Projection], operands: list[Tensor | None], others: Sequence[int]
) -> dict[int, Tensor]:
    """Norms of projections whose norm a forward does not make, by projection; puts the mag_norm_scales in
    `operands`."""
    chosen = [projections[i] for i in others]
    norms, mag_norm_scales = quantization.dora_scales(
        [operands[OPERANDS * i] for i in others],
        [projection.operands for projection in chosen],
        [projection.spec.quantized for projection in chosen],
        [projection.scaling for projection in chosen],
    )
    for i, mag_norm_scale in zip(others, mag_norm_scales):
        operands[OPERANDS * i + _MAG_NORM_SCALE] = mag_norm_scale
    return dict(zip(others, norms))


def for_backward(
    projections: Sequence[Projection], operands: list[Tensor | None], norms: dict[int, Tensor], made: Sequence[Tensor]
) -> list[Tensor | None]:
    """A forward's operands as the backward takes them: norms in place of magnitudes, and no bias that it does not read.
    `made`: the norms and then the mag_norm_scales that the forward has made."""
    found, next_made, half = operands.copy(), 0, len(made) // 2
    for i, projection in enumerate(projections):
        at = OPERANDS * i
        if projection.operands.magnitude is None:
            found[at + _BIAS] = None
        elif i in norms:
            found[at + _MAGNITUDE_OR_NORM] = norms[i]
        else:
            found[at + _MAGNITUDE_OR_NORM], found[at + _MAG_NORM_SCALE] = made[next_made], made[half + next_made]
            next_made += 1
    return found


def magnitudes_in(projections: Sequence[Projection], norms: dict[int, Tensor]) -> int:
    """How many norms a forward makes, and how many mag_norm_scales."""
    return len([None for projection in projections if projection.operands.magnitude is not None]) - len(norms)


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
    """(arguments of the backward, y of each projection, t, unscaled outputs)."""
    arguments, norms = read(projections, bf16x3)
    operands, scalings, dropouts, quantized, _ = arguments
    outputs = native.lora_forward(x, operands, scalings, seeds, dropouts, quantized, bf16x3)
    count = len(projections)
    made = len(outputs) - 2 * magnitudes_in(projections, norms)
    operands = for_backward(projections, operands, norms, outputs[made:])
    return arguments._replace(operands=operands), outputs[:count], outputs[count], outputs[count + 1 : made]


def lora_group(
    x: Tensor, projections: Sequence[Projection], seeds: Tensor | None, bf16x3: bool = False, token: object = None
) -> tuple[Tensor, ...]:
    """[..., N] of each projection; `bf16x3` as `NativePath` has it, `token` is kept as `LoraLinearFunction` keeps
    it."""
    if torch.is_grad_enabled():
        wanted, tensors = trained(projections)
        return _apply(x, projections, wanted, bf16x3, token, x, seeds, *tensors)
    return tuple(group_forward(projections, bf16x3, x, seeds)[1])


class NativeGroupFunction(torch.autograd.Function):
    """Apply as `(projections, wanted, bf16x3, token, x, seeds, *tensors)`, wanted and tensors as `trained` gives them;
    gives a tuple of [..., N], one per projection, which separate backward calls may reach (`separate_backward`). Double
    backward raises."""

    @staticmethod
    def forward(ctx, projections, wanted, bf16x3, token, x: Tensor, seeds: Tensor | None, *_):
        (operands, *ctx.numbers), ys, t, unscaled = group_forward(projections, bf16x3, x, seeds)
        ctx.wanted, ctx.token, ctx.kept = wanted, token, None
        ctx.unscaled, ctx.operands = len(unscaled), len(operands)
        ctx.set_materialize_grads(False)
        if len(ys) > 1:
            x = x.detach()  # a graph that holds no x: `shared_input` keeps results as long as there is one
        ctx.save_for_backward(x, seeds, t, *unscaled, *operands)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor | None):
        used = [dy is not None for dy in dys]
        saved = separate_backward.saved_tensors(ctx, used, _operands)
        x, seeds, t = saved[:3]
        start = 3 + ctx.unscaled
        scalings, dropouts, quantized, bf16x3 = ctx.numbers
        need_dx = ctx.needs_input_grad[4] and any(used)
        grads = native.lora_backward(
            dys, x, t, saved[3:start] if ctx.unscaled else None, saved[start:], scalings, seeds, dropouts, quantized,
            bf16x3, need_dx, [wanted.needs for wanted in ctx.wanted],
        )  # fmt: skip
        dx = grads.pop(0) if need_dx else None
        result = (None, None, None, None, dx, None, *by_trained(grads, ctx.wanted, scalings, used))
        separate_backward.ran(ctx, used, saved, result)
        return result


_apply = apply_of(NativeGroupFunction)


def _operands(ctx) -> list[separate_backward.Operand | None]:
    """Of the tensors that `NativeGroupFunction` saves. Weights and A are read for dx alone, biases for dm."""
    needs_x, count = ctx.needs_input_grad[4], len(ctx.wanted)
    names = ("weight" if needs_x else None, "bias", "lora_a" if needs_x else None, "lora_b", None, None)
    found: list[separate_backward.Operand | None] = [("x", None), *[None] * (2 + ctx.unscaled)]
    for i in range(count):
        found += [None if name is None else (name, i) for name in names]
    scales = ctx.operands - OPERANDS * count
    return found + [("the scale of a quantized weight", None) if needs_x else None] * scales
