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
from ..call_context import new_tuple
from ..specs import NEED_A, NEED_B, NEED_BIAS, NEED_MAGNITUDE, NativePath, Projection
from . import separate_backward
from .direct_apply import apply_of
from .once_differentiable import once_differentiable
from .saved_input import left_out, stand_in

# Bound once: torch looks its attributes up in a function of its own.
_is_grad_enabled = torch.is_grad_enabled
_FLOAT16 = torch.float16

_NOT_NATIVE, _NATIVE = NativePath(False), NativePath(True)


def native_path(
    projections: Sequence[Projection], dtype: torch.dtype, lora_dtype: torch.dtype | None, is_cuda: bool
) -> NativePath:
    """Of projections of an x in `dtype`: the ops compute those on a frozen base of that dtype, with the LoRA path
    in it too or exactly. Exactly on a GPU, of DoRA without dropout, and not in float16, which has not the range for
    what the gradients of float32 adapters hold. Nor has it the range for DoRA's value before the mag_norm_scale, nor
    for s·b_B alone where s is beyond 1."""
    if not native.available:
        return NativePath(False)
    bf16x3, half = False, dtype == _FLOAT16
    for operands, scaling, spec in projections:
        weight, bias, lora_a, lora_b, lora_bias, magnitude = operands[:6]
        if half and (magnitude is not None or (lora_bias is not None and not -1.0 <= scaling <= 1.0)):
            return _NOT_NATIVE
        quantized = spec.quantized
        if quantized is not None and getattr(quantized, "native_format", None) is None:
            return _NOT_NATIVE
        stored = weight.dtype if quantized is None else quantized.dtype
        if stored != dtype or (quantized is None and weight.requires_grad):
            return _NOT_NATIVE
        if bias is not None and bias.dtype != dtype:
            return _NOT_NATIVE
        if lora_a is None or lora_dtype == dtype or lora_a.dtype == lora_b.dtype == dtype:
            continue
        if lora_dtype is not None or dtype != torch.bfloat16 or not lora_a.dtype == lora_b.dtype == torch.float32:
            return _NOT_NATIVE
        bf16x3 = True
    if bf16x3 and (
        not is_cuda or any([p.spec.dropout > 0.0 and p.operands.magnitude is not None for p in projections])
    ):
        return _NOT_NATIVE
    return NativePath(True, True) if bf16x3 else _NATIVE


_Dtypes = tuple[torch.dtype | None, ...]


class OpArguments(NamedTuple):
    """What the native ops take besides tensors, and what gradients there are.

    dropouts and quantized, as `native.PackedWeight` has it, are None where there are none: a list costs the dispatcher
    more than its elements. needs: of each projection, the ops' bits. vectors: of each projection the dtypes of its
    bias, lora_bias and magnitude, None of one that is not trained; None where no projection has one that is. made: in
    a list of operands, the first one of each projection whose norm a forward makes.
    """

    scalings: list[float]
    dropouts: list[float] | None
    quantized: list[int] | None
    bf16x3: bool
    needs: list[int]
    vectors: list[_Dtypes] | None
    made: list[int]


class Prepared(NamedTuple):
    """A call as the ops take it.

    operands: of each projection OPERANDS tensors: weight [N, K], b + s·b_B, A, B, the magnitude where a forward makes
    the norm, and the mag_norm_scale where somebody else does; then the scales of all weights in four bits.
    of_backward: the same as the backward takes them, once `put_made` has put in what a forward makes: norms in place of
    magnitudes, and no bias that it does not read. trained: the operands that get a gradient, in the order in which
    backward gives them.
    """

    operands: list[Tensor | None]
    of_backward: list[Tensor | None]
    arguments: OpArguments
    trained: list[Tensor]


OPERANDS = 6
_BIAS, _MAGNITUDE_OR_NORM, _MAG_NORM_SCALE = 1, 4, 5
_NO_VECTORS: _Dtypes = (None, None, None)


def prepare(projections: Sequence[Projection], bf16x3: bool) -> Prepared:
    """All that a call takes from its projections, in one pass, since each pass costs 0.5 to 1 µs."""
    operands: list[Tensor | None] = []
    scalings: list = []  # numbers: `specs.fold` has multiplied those that are tensors into B
    vectors: list[_Dtypes] = []
    needs, trained = [], []
    unread, made, elsewhere = [], [], []
    drops = is_quantized = has_vectors = False
    for projection in projections:
        tensors, scaling, spec = projection
        weight, bias, lora_a, lora_b, lora_bias, magnitude = tensors[:6]
        need, of_vectors, at = 0, _NO_VECTORS, len(operands)
        if lora_a is not None and lora_a.requires_grad:
            need = NEED_A
            trained.append(lora_a)
        if lora_b is not None and lora_b.requires_grad:
            need |= NEED_B
            trained.append(lora_b)
        if bias is not None or lora_bias is not None or magnitude is not None:
            if lora_bias is not None or magnitude is not None or bias.requires_grad:
                need, of_vectors = _with_vectors(need, bias, lora_bias, magnitude, trained)
                has_vectors = has_vectors or need >= NEED_BIAS
            if lora_bias is not None:
                bias = _whole_bias(projection)
            if magnitude is None:
                unread.append(at)
            elif select.norm_is_native(weight, lora_a, lora_b, spec.quantized):
                magnitude = native.as_magnitude(magnitude)
                made.append(at)
            else:
                magnitude = None
                elsewhere.append(at)
        operands += (weight.t() if spec.transposed else weight, bias, lora_a, lora_b, magnitude, None)
        scalings.append(scaling)
        needs.append(need)
        vectors.append(of_vectors)
        drops = drops or spec.dropout > 0.0
        is_quantized = is_quantized or spec.quantized is not None
    numbers = _pack(projections, operands) if is_quantized else None
    kept = _of_backward(projections, operands, unread, elsewhere) if unread or made or elsewhere else operands
    dropouts = [spec.dropout for _, _, spec in projections] if drops else None
    arguments = new_tuple(
        OpArguments,
        (scalings, dropouts, numbers, bf16x3, needs, vectors if has_vectors else None, made),
    )
    return new_tuple(Prepared, (operands, kept, arguments, trained))


def _with_vectors(
    need: int, bias: Tensor | None, lora_bias: Tensor | None, magnitude: Tensor | None, trained: list[Tensor]
) -> tuple[int, _Dtypes]:
    """`need` with that of a projection's vectors, and the dtypes of those that are trained, which `trained` gets."""
    of_bias = of_lora_bias = of_magnitude = None
    if bias is not None and bias.requires_grad:
        need, of_bias = need | NEED_BIAS, bias.dtype
        trained.append(bias)
    if lora_bias is not None and lora_bias.requires_grad:
        need, of_lora_bias = need | NEED_BIAS, lora_bias.dtype
        trained.append(lora_bias)
    if magnitude is not None and magnitude.requires_grad:
        need, of_magnitude = need | NEED_MAGNITUDE, magnitude.dtype
        trained.append(magnitude)
    return need, (of_bias, of_lora_bias, of_magnitude)


def _pack(projections: Sequence[Projection], operands: list[Tensor | None]) -> list[int]:
    """`OpArguments.quantized`; puts the scales at the end of `operands`."""
    numbers, scales = quantization.packed([p.spec.quantized for p in projections], [p.operands for p in projections])
    operands += scales
    return numbers


def _of_backward(
    projections: Sequence[Projection], operands: list[Tensor | None], unread: list[int], elsewhere: list[int]
) -> list[Tensor | None]:
    """`Prepared.of_backward`, where that is not `operands`. unread, elsewhere: where the operands of projections begin
    whose bias the backward does not read, and of those whose norm a forward does not make; their mag_norm_scales are
    put in `operands`."""
    norms = _other_norms(projections, operands, elsewhere) if elsewhere else None
    kept = operands.copy()
    for at in unread:
        kept[at + _BIAS] = None
    if norms:
        for at, norm in zip(elsewhere, norms):
            kept[at + _MAGNITUDE_OR_NORM] = norm
    return kept


def _other_norms(
    projections: Sequence[Projection], operands: list[Tensor | None], elsewhere: Sequence[int]
) -> list[Tensor]:
    """Norms of projections whose norm a forward does not make; puts their mag_norm_scales in `operands`."""
    chosen = [projections[at // OPERANDS] for at in elsewhere]
    with torch.no_grad():
        norms, mag_norm_scales = quantization.dora_scales(
            [operands[at] for at in elsewhere],
            [projection.operands for projection in chosen],
            [projection.spec.quantized for projection in chosen],
            [projection.scaling for projection in chosen],
        )
    for at, mag_norm_scale in zip(elsewhere, mag_norm_scales):
        operands[at + _MAG_NORM_SCALE] = mag_norm_scale
    return norms


def reads_x(needs: Sequence[int]) -> bool:
    """Whether the backward of projections of one x reads its values."""
    for need in needs:
        if need & NEED_A:
            return True
    return False


def put_made(operands: list[Tensor | None], places: Sequence[int], made: Sequence[Tensor]) -> None:
    """Puts in `of_backward` the norms and then the mag_norm_scales that a forward has made."""
    for i, at in enumerate(places):
        operands[at + _MAGNITUDE_OR_NORM], operands[at + _MAG_NORM_SCALE] = made[i], made[len(places) + i]


@torch.no_grad()
def _whole_bias(projection: Projection) -> Tensor:
    """b + s·b_B."""
    operands, scaling, spec = projection
    scaled = operands.lora_bias * scaling
    whole = scaled if operands.bias is None else operands.bias + scaled
    return whole.to(operands.weight.dtype if spec.quantized is None else spec.quantized.dtype)


def by_trained(grads: list[Tensor], arguments: OpArguments, used: Sequence[bool]) -> Sequence[Tensor | None]:
    """A gradient or None for each of `Prepared.trained`, from those that the ops give in turn; `used`: whether there is
    one of the projection's output."""
    if arguments.vectors is None and all(used):
        return grads
    found = iter(grads)
    result: list[Tensor | None] = []
    vectors = arguments.vectors or [_NO_VECTORS] * len(used)
    for needs, (bias, lora_bias, magnitude), scaling, use in zip(arguments.needs, vectors, arguments.scalings, used):
        if needs & NEED_A:
            result.append(next(found) if use else None)
        if needs & NEED_B:
            result.append(next(found) if use else None)
        db = next(found) if use and needs & NEED_BIAS else None
        if bias is not None:
            result.append(db.to(bias) if use else None)
        if lora_bias is not None:
            result.append((db * scaling).to(lora_bias) if use else None)
        if magnitude is not None:
            dm = next(found) if use else None
            result.append(dm if dm is None or dm.dtype == magnitude else dm.to(magnitude))
    return result


def group_forward(x: Tensor, seeds: Tensor | None, prepared: Prepared) -> list[Tensor]:
    """y of each projection, t, and for DoRA unscaled outputs; the others that the op gives go to the backward's
    operands."""
    scalings, dropouts, quantized, bf16x3, _, _, made = prepared.arguments
    outputs = native.lora_forward(x, prepared.operands, scalings, seeds, dropouts, quantized, bf16x3)
    if made:
        put_made(prepared.of_backward, made, outputs[-2 * len(made) :])
        del outputs[-2 * len(made) :]
    return outputs


def lora_group(
    x: Tensor, projections: Sequence[Projection], seeds: Tensor | None, bf16x3: bool = False, token: object = None
) -> tuple[Tensor, ...]:
    """[..., N] of each projection; `bf16x3` as `NativePath` has it, `token` is kept as `LoraLinearFunction` keeps
    it."""
    prepared = prepare(projections, bf16x3)
    if _is_grad_enabled():
        return _apply_to(x)(prepared, token, x, seeds, *prepared.trained)
    return tuple(group_forward(x, seeds, prepared)[: len(projections)])


class NativeGroupFunction(torch.autograd.Function):
    """Apply as `(prepared, token, x, seeds, *prepared.trained)`; gives a tuple of [..., N], one per projection, which
    separate backward calls may reach (`separate_backward`). Double backward raises."""

    @staticmethod
    def forward(ctx, prepared: Prepared, token, x: Tensor, seeds: Tensor | None, *_):
        outputs = group_forward(x, seeds, prepared)
        needs = prepared.arguments.needs
        count = len(needs)
        ctx.arguments, ctx.token, ctx.kept = prepared.arguments, token, None
        ctx.outputs, ctx.operands = len(outputs), len(prepared.of_backward)
        ctx.set_materialize_grads(False)
        if count > 1:
            x = x.detach()  # a graph that holds no x: `shared_input` keeps results as long as there is one
        kept = x if needs[0] & NEED_A or reads_x(needs) else left_out(ctx, x)  # nearly always the first's
        ctx.save_for_backward(kept, seeds, *outputs[count:], *prepared.of_backward)
        return tuple(outputs[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor | None):
        used = [dy is not None for dy in dys]
        saved = separate_backward.saved_tensors(ctx, used, _operands)
        x, seeds, t = saved[:3]
        if x is None:
            x = stand_in(ctx)
        start = 2 + ctx.outputs - len(dys)
        scalings, dropouts, quantized, bf16x3, needs, _, _ = ctx.arguments
        need_dx = ctx.needs_input_grad[2] and any(used)
        grads = native.lora_backward(
            dys, x, t, saved[3:start] if start > 3 else None, saved[start:], scalings, seeds, dropouts, quantized,
            bf16x3, need_dx, needs,
        )  # fmt: skip
        dx = grads.pop(0) if need_dx else None
        result = (None, None, dx, None, *by_trained(grads, ctx.arguments, used))
        separate_backward.ran(ctx, used, saved, result)
        return result


_apply_to = apply_of(NativeGroupFunction)


def _operands(ctx) -> list[separate_backward.Operand | None]:
    """Of the tensors that `NativeGroupFunction` saves. Weights and A are read for dx alone, biases for dm."""
    needs_x, count = ctx.needs_input_grad[2], len(ctx.arguments.needs)
    names = ("weight" if needs_x else None, "bias", "lora_a" if needs_x else None, "lora_b", None, None)
    found: list[separate_backward.Operand | None] = [("x", None), *[None] * (1 + ctx.outputs - count)]
    for i in range(count):
        found += [None if name is None else (name, i) for name in names]
    scales = ctx.operands - OPERANDS * count
    return found + [("the scale of a quantized weight", None) if needs_x else None] * scales
