"""A gated MLP as one native op a direction.

The formulas are those of `gated_mlp_eager`, the op is described in kernel-src/ops/gated_mlp.cpp. Saved for backward is
what `gated_mlp_eager` saves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import native
from ..specs import Projection
from .direct_apply import apply_of
from .group_native import by_trained, for_backward, group_forward, magnitudes_in, read, trained
from .once_differentiable import once_differentiable


def _gated_forward(
    projections: Sequence[Projection],
    bf16x3: bool,
    options: tuple[int, int],
    x: Tensor,
    seeds: Tensor | None,
    up_to_h: bool = False,
):
    """(arguments of the backward, y, what else the op gives and the backward takes)."""
    arguments, norms = read(projections, bf16x3)
    operands, scalings, dropouts, quantized, _ = arguments
    outputs = native.gated_forward(x, operands, scalings, seeds, dropouts, quantized, bf16x3, *options, up_to_h)
    made = len(outputs) - 2 * magnitudes_in(projections, norms)
    operands = for_backward(projections, operands, norms, outputs[made:])
    return arguments._replace(operands=operands), outputs[0], outputs[1:made]


def gated_mlp(
    x: Tensor, projections: Sequence[Projection], options: tuple[int, int], seeds: Tensor | None, bf16x3: bool = False
) -> Tensor:
    """[..., N] of a gated MLP, down as the last projection; options: the activation as its index, and which half
    of a projection that holds both is the gate. `bf16x3` as `NativePath` has it."""
    if torch.is_grad_enabled():
        wanted, tensors = trained(projections)
        arguments = (projections, wanted, bf16x3, options, x, seeds, *tensors)
        if _is_recomputed() and projections[-1].operands.magnitude is None:
            return _recomputed(*arguments)
        return _apply(x, *arguments)
    return _gated_forward(projections, bf16x3, options, x, seeds)[1]


class NativeGatedFunction(torch.autograd.Function):
    """Apply as `(projections, wanted, bf16x3, options, x, seeds, *tensors)`, as `NativeGroupFunction`, see `gated_mlp`.
    Double backward raises."""

    @staticmethod
    def forward(ctx, projections, wanted, bf16x3, options, x: Tensor, seeds: Tensor | None, *_):
        return NativeGatedFunction._run(ctx, projections, wanted, bf16x3, options, x, seeds, up_to_h=False)

    @staticmethod
    def _run(ctx, projections, wanted, bf16x3, options, x: Tensor, seeds: Tensor | None, up_to_h: bool) -> Tensor:
        (operands, *ctx.numbers), y, kept = _gated_forward(projections, bf16x3, options, x, seeds, up_to_h)
        if _makes_u_again(projections):
            del kept[len(projections) + 1]  # the first of the unscaled outputs, after the outputs, t and down's t
        ctx.wanted, ctx.options, ctx.kept = wanted, options, len(kept)
        ctx.save_for_backward(x, seeds, *kept, *operands)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        saved, start = ctx.saved_tensors, 2 + ctx.kept
        x, seeds = saved[:2]
        need_dx, (scalings, dropouts, quantized, bf16x3) = ctx.needs_input_grad[4], ctx.numbers
        grads = native.gated_backward(
            dy, x, saved[2:start], saved[start:], scalings, seeds, dropouts, quantized, bf16x3, *ctx.options, need_dx,
            [wanted.needs for wanted in ctx.wanted],
        )  # fmt: skip
        dx = grads.pop(0) if need_dx else None
        return None, None, None, None, dx, None, *by_trained(grads, ctx.wanted, scalings, [True] * len(ctx.wanted))


_apply = apply_of(NativeGatedFunction)


class _UpToH(NativeGatedFunction):
    """Applied as `NativeGatedFunction`, saves the same and has the same gradients, but leaves out down's product:
    gives what stands for y in the graph, no memory of its own, and h."""

    @staticmethod
    def forward(ctx, projections, wanted, bf16x3, options, x: Tensor, seeds: Tensor | None, *_):
        h = NativeGatedFunction._run(ctx, projections, wanted, bf16x3, options, x, seeds, up_to_h=True)
        ctx.mark_non_differentiable(h)
        return x.new_empty(()).expand(*x.shape[:-1], projections[-1].shape[0]), h

    @staticmethod
    def backward(ctx, dy: Tensor, _):
        return NativeGatedFunction.backward(ctx, dy)


class _Down(torch.autograd.Function):
    """Apply as `(stand_in, h, down, bf16x3, seeds)`, down a projection: y, whose gradient is that of what stands for it."""

    @staticmethod
    def forward(ctx, stand_in: Tensor, h: Tensor, down: Projection, bf16x3: bool, seeds: Tensor | None):
        y = group_forward((down,), bf16x3, h, seeds)[1][0]
        return y.view(stand_in.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return dy, None, None, None, None


def _makes_u_again(projections: Sequence[Projection]) -> bool:
    """Whether the gated MLP's backward makes gate's u again instead of keeping it: DoRA with dropout keeps u beside y of
    both gate and up. Not for a checkpoint, or whoever else decides by hooks what stays."""
    operands, _, spec = projections[0]
    if (
        len(projections) < 3
        or spec.dropout == 0.0
        or operands.magnitude is None
        or not operands.magnitude.requires_grad
    ):
        return False
    return torch._C._current_graph_task_id() == -1 and torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def _is_recomputed() -> bool:
    """Whether this is the forward of a backward pass, and one that may differ from the first: selective checkpoints
    watch every op through a mode, and give out what the same op gave before."""
    return torch._C._current_graph_task_id() != -1 and torch._C._len_torch_dispatch_stack() == 0


def _recomputed(projections, wanted, bf16x3, options, x: Tensor, seeds: Tensor | None, *tensors) -> Tensor:
    """y where a checkpoint computes it again for what it saved. torch ends that with the last tensor saved, and so
    down's product, which comes after it, is not made where the MLP is the last of its layer."""
    stand_in, h = _UpToH.apply(projections, wanted, bf16x3, options, x, seeds, *tensors)
    return _Down.apply(stand_in, h, projections[-1], bf16x3, None if seeds is None else seeds[-1:])
