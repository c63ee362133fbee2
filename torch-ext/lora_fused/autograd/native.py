"""Groups and gated MLPs as one native op a direction, with as little Python as there can be: what waits
for the host is most of the cost of small work.

Formulas are those of `autograd.linear` and `autograd.gated`, the ops are described in
kernel-src/common/lora_group.cpp and gated_mlp.cpp. Saved for backward is what those save; DoRA keeps
the value before the gain with the base bias in it where the input is not dropped. `takes` says which
projections the ops compute.
"""

from __future__ import annotations

from typing import Optional, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backend as backends
from .. import base, ops
from ..projection import OPERANDS_PER_PROJECTION, Operands, Projection, ProjectionSpec, unflatten

_TRAINED = Operands._fields[:6]  # what follows are scales of a quantised weight
_NEED_A, _NEED_B, _NEED_BIAS, _NEED_MAGNITUDE = 1, 2, 4, 8


def takes(projection: Projection, dtype: torch.dtype, lora_dtype: Optional[torch.dtype]) -> bool:
    """Whether the ops compute all of a projection in `dtype`: on a frozen base of that dtype, with the
    LoRA path in it too."""
    weight, bias, lora_a, *_ = projection.operands
    quantized = projection.spec.quantized
    frozen = quantized.dtype == dtype if quantized is not None else weight.dtype == dtype and not weight.requires_grad
    if not frozen or (bias is not None and bias.dtype != dtype):
        return False
    return lora_a is None or (lora_dtype or lora_a.dtype) == dtype


class _Arguments:
    """What forward and backward pass to the ops, by field, from the operands by member."""

    def __init__(self, specs: Sequence[ProjectionSpec], scalings: Sequence[float], flat):
        step = OPERANDS_PER_PROJECTION
        weights, biases, lora_a, lora_b, lora_biases, magnitudes, *scales = (flat[i::step] for i in range(step))
        self.weights = [w.t() if spec.transposed else w for spec, w in zip(specs, weights)]
        self.biases, self.lora_biases, self.magnitudes = biases, lora_biases, magnitudes
        self.adapters = lora_a, lora_b
        self.scalings, self.dropouts = scalings, [spec.dropout for spec in specs]
        self.flat = flat
        self.formats = [spec.quantized for spec in specs]
        self.scales, self.quantized = [], []
        if any(self.formats):
            self._quantize(scales)

    def _quantize(self, scales) -> None:
        """The ops' `scales` and `quantized` (kernel-src/common/projections.h)."""
        for i, form in enumerate(self.formats):
            if form is None:
                self.quantized += [0] * 6
                continue
            kind = 2 if form.fp4 else 1
            self.quantized += [kind, *form.shape, form.blocksize, form.nested_blocksize, len(self.scales)]
            self.scales += [field[i] for field in scales if field[i] is not None]

    def whole_biases(self) -> list[Optional[Tensor]]:
        """b + s·b_B of each member."""
        wholes = list(self.biases)
        for i, lora_bias in enumerate(self.lora_biases):
            if lora_bias is not None:
                scaled = lora_bias * self.scalings[i]
                whole = scaled if wholes[i] is None else wholes[i] + scaled
                form = self.formats[i]
                wholes[i] = whole.to(self.weights[i].dtype if form is None else form.dtype)
        return wholes

    def gains(self) -> tuple[list[Optional[Tensor]], list[Optional[Tensor]]]:
        """(norms, gains) of each member, None for plain LoRA."""
        if not any(self.formats):
            return backends.dora_gains(self.weights, *self.adapters, self.magnitudes, self.scalings)
        return base.dora_gains(self.weights, unflatten(self.flat), self.formats, self.scalings)


def _needs(flags: Sequence[bool]) -> list[int]:
    """The ops' bits for each member, from flags for all operands."""
    bits = []
    for i in range(0, len(flags), OPERANDS_PER_PROJECTION):
        _, bias, lora_a, lora_b, lora_bias, magnitude = flags[i : i + len(_TRAINED)]
        of_a, of_b = _NEED_A if lora_a else 0, _NEED_B if lora_b else 0
        bits.append(of_a | of_b | (_NEED_BIAS if bias or lora_bias else 0) | (_NEED_MAGNITUDE if magnitude else 0))
    return bits


def _by_operand(grads, needs: Sequence[int], used: Sequence[bool], scalings, flags, flat) -> list[Optional[Tensor]]:
    """A gradient or None for every operand, from those that the ops give in turn."""
    found = iter(grads)
    result: list[Optional[Tensor]] = [None] * len(flat)
    for i, (need, use) in enumerate(zip(needs, used)):
        if not use:
            continue
        first = i * OPERANDS_PER_PROJECTION
        _, bias, lora_a, lora_b, lora_bias, magnitude = range(first, first + len(_TRAINED))
        if need & _NEED_A:
            result[lora_a] = next(found)
        if need & _NEED_B:
            result[lora_b] = next(found)
        if need & _NEED_BIAS:
            db = next(found)
            result[bias] = db.to(flat[bias].dtype) if flags[bias] else None
            result[lora_bias] = (db * scalings[i]).to(flat[lora_bias].dtype) if flags[lora_bias] else None
        if need & _NEED_MAGNITUDE:
            result[magnitude] = next(found).to(flat[magnitude].dtype)
    return result


class NativeGroupFunction(torch.autograd.Function):
    """Apply as `(specs, scalings, token, x, seeds, *flatten(operands))`; gives a tuple of [..., N], one per
    projection. Double backward raises. `token` is kept as `LoraLinearFunction` keeps it."""

    @staticmethod
    def forward(ctx, specs, scalings, token, x: Tensor, seeds: Optional[Tensor], *flat):
        arguments = _Arguments(specs, scalings, flat)
        norms, gains = arguments.gains()
        ys, us, t = ops.lora_forward(
            x, arguments.weights, arguments.whole_biases(), *arguments.adapters, gains, scalings, seeds,
            arguments.dropouts, arguments.scales, arguments.quantized,
        )  # fmt: skip
        ctx.specs, ctx.scalings, ctx.token, ctx.us = specs, scalings, token, len(us)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, seeds, t, *us, *norms, *gains, *flat)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Optional[Tensor]):
        x, seeds, t, *rest = ctx.saved_tensors
        us, (norms, gains, flat) = rest[: ctx.us], _parts(rest[ctx.us :], len(dys))
        arguments, flags = _Arguments(ctx.specs, ctx.scalings, flat), ctx.needs_input_grad[5:]
        needs, used = _needs(flags), [dy is not None for dy in dys]
        dx, grads = ops.lora_backward(
            dys, x, t, us, arguments.weights, arguments.biases, *arguments.adapters, gains, norms, ctx.scalings, seeds,
            arguments.dropouts, arguments.scales, arguments.quantized, ctx.needs_input_grad[3] and any(used), needs,
        )  # fmt: skip
        ctx.token = None
        by_operand = _by_operand(grads, needs, used, ctx.scalings, flags, flat)
        return None, None, None, dx[0] if dx else None, None, *by_operand


class NativeGatedFunction(torch.autograd.Function):
    """Apply as `(specs, scalings, activation, gate_half, x, seeds, *flatten(operands))` with down as the
    last projection and the activation as its index; gives [..., N]. Double backward raises."""

    @staticmethod
    def forward(ctx, specs, scalings, activation: int, gate_half: int, x: Tensor, seeds: Optional[Tensor], *flat):
        arguments = _Arguments(specs, scalings, flat)
        norms, gains = arguments.gains()
        y, outputs, us, ts = ops.gated_forward(
            x, arguments.weights, arguments.whole_biases(), *arguments.adapters, gains, scalings, seeds,
            arguments.dropouts, arguments.scales, arguments.quantized, activation, gate_half,
        )  # fmt: skip
        ctx.specs, ctx.scalings, ctx.options, ctx.us = specs, scalings, (activation, gate_half), len(us)
        ctx.save_for_backward(x, seeds, *ts, *outputs, *us, *norms, *gains, *flat)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, seeds, *rest = ctx.saved_tensors
        count = len(ctx.specs)
        ts, outputs, rest = rest[:2], rest[2 : 1 + count], rest[1 + count :]
        us, (norms, gains, flat) = rest[: ctx.us], _parts(rest[ctx.us :], count)
        arguments, flags = _Arguments(ctx.specs, ctx.scalings, flat), ctx.needs_input_grad[6:]
        needs = _needs(flags)
        dx, grads = ops.gated_backward(
            dy, x, outputs, us, ts, arguments.weights, arguments.biases, *arguments.adapters, gains, norms,
            ctx.scalings, seeds, arguments.dropouts, arguments.scales, arguments.quantized, *ctx.options, ctx.needs_input_grad[4], needs,
        )  # fmt: skip
        by_operand = _by_operand(grads, needs, [True] * count, ctx.scalings, flags, flat)
        return *(None,) * 4, dx[0] if dx else None, None, *by_operand


def _parts(saved, count: int):
    """(norms, gains, operands) of `count` members."""
    return saved[:count], saved[count : 2 * count], saved[2 * count :]
