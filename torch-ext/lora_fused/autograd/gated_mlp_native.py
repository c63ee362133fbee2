"""A gated MLP as one native op a direction.

The formulas are those of `gated_mlp_eager`, the op is described in kernel-src/ops/gated_mlp.cpp. Saved for backward is
what `gated_mlp_eager` saves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import native
from ..call_context import FORWARD
from ..specs import NEED_A, Projection
from .direct_apply import apply_of
from .group_native import Prepared, by_trained, group_forward, prepare, put_made, reads_x
from .once_differentiable import once_differentiable
from .saved_input import left_out, stand_in

# Bound once: torch looks its attributes up in a function of its own.
_is_grad_enabled, _current_backward = torch.is_grad_enabled, torch._C._current_graph_task_id
_dispatch_modes, _top_hooks = torch._C._len_torch_dispatch_stack, torch._C._autograd._top_saved_tensors_default_hooks


def _gated_forward(
    x: Tensor, seeds: Tensor | None, prepared: Prepared, options: tuple[int, int], up_to_h: bool = False
) -> list[Tensor]:
    """y and what else the op gives and the backward takes; norms go to the backward's operands."""
    scalings, dropouts, quantized, bf16x3, _, _, made = prepared.arguments
    outputs = native.gated_forward(
        x, prepared.operands, scalings, seeds, dropouts, quantized, bf16x3, *options, up_to_h
    )  # fmt: skip
    if made:
        put_made(prepared.of_backward, made, outputs[-2 * len(made) :])
        del outputs[-2 * len(made) :]
    return outputs


def gated_mlp(
    x: Tensor, projections: Sequence[Projection], options: tuple[int, int], seeds: Tensor | None, bf16x3: bool = False
) -> Tensor:
    """[..., N] of a gated MLP, down as the last projection; options: the activation as its index, and which half
    of a projection that holds both is the gate. `bf16x3` as `NativePath` has it."""
    prepared = prepare(projections, bf16x3)
    if not _is_grad_enabled():
        return _gated_forward(x, seeds, prepared, options)[0]
    if _is_recomputed() and projections[-1].operands.magnitude is None:
        return _recomputed(projections, prepared, options, x, seeds)
    return _apply_to(x)(projections, prepared, options, x, seeds, *prepared.trained)


class NativeGatedFunction(torch.autograd.Function):
    """Apply as `(projections, prepared, options, x, seeds, *prepared.trained)`, see `gated_mlp`. Double backward
    raises."""

    @staticmethod
    def forward(ctx, projections, prepared: Prepared, options, x: Tensor, seeds: Tensor | None, *_):
        return NativeGatedFunction._run(ctx, projections, prepared, options, x, seeds, up_to_h=False)

    @staticmethod
    def _run(ctx, projections, prepared: Prepared, options, x: Tensor, seeds: Tensor | None, up_to_h: bool) -> Tensor:
        y, *kept = _gated_forward(x, seeds, prepared, options, up_to_h)
        makes_u_again = _makes_u_again(projections)
        if makes_u_again:
            del kept[len(projections) + 1]  # the first unscaled output, after the outputs, t and down's t
        ctx.arguments, ctx.options, ctx.kept = prepared.arguments, options, len(kept)
        needs = prepared.arguments.needs
        is_read = needs[0] & NEED_A or makes_u_again or reads_x(needs[:-1])  # nearly always the first's
        ctx.save_for_backward(x if is_read else left_out(ctx, x), seeds, *kept, *prepared.of_backward)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        saved, start = ctx.saved_tensors, 2 + ctx.kept
        x, seeds = saved[:2]
        if x is None:
            x = stand_in(ctx)
        need_dx, (scalings, dropouts, quantized, bf16x3, needs, _, _) = ctx.needs_input_grad[3], ctx.arguments
        grads = native.gated_backward(
            dy, x, saved[2:start], saved[start:], scalings, seeds, dropouts, quantized, bf16x3, *ctx.options, need_dx,
            needs,
        )  # fmt: skip
        dx = grads.pop(0) if need_dx else None
        return None, None, None, dx, None, *by_trained(grads, ctx.arguments, [True] * len(needs))


_apply_to = apply_of(NativeGatedFunction)


class _UpToH(NativeGatedFunction):
    """Applied as `NativeGatedFunction`, saves the same and has the same gradients, but leaves out down's product:
    gives what stands for y in the graph, no memory of its own, and h."""

    @staticmethod
    def forward(ctx, projections, prepared: Prepared, options, x: Tensor, seeds: Tensor | None, *_):
        h = NativeGatedFunction._run(ctx, projections, prepared, options, x, seeds, up_to_h=True)
        ctx.mark_non_differentiable(h)
        return x.new_empty(()).expand(*x.shape[:-1], projections[-1].shape[0]), h

    @staticmethod
    def backward(ctx, dy: Tensor, _):
        return NativeGatedFunction.backward(ctx, dy)


class _Down(torch.autograd.Function):
    """Apply as `(stand_in, h, down, bf16x3, seeds)`, down a projection: y, whose gradient is that of what stands for
    it."""

    @staticmethod
    def forward(ctx, stand_in: Tensor, h: Tensor, down: Projection, bf16x3: bool, seeds: Tensor | None):
        y = group_forward(h, seeds, prepare((down,), bf16x3))[0]
        return y.view(stand_in.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return dy, None, None, None, None


def _makes_u_again(projections: Sequence[Projection]) -> bool:
    """Whether the gated MLP's backward makes gate's u again instead of keeping it: DoRA with dropout keeps u beside y
    of both gate and up. Not for a checkpoint, or whoever else decides by hooks what stays."""
    operands, _, spec = projections[0]
    if (
        len(projections) < 3
        or spec.dropout == 0.0
        or operands.magnitude is None
        or not operands.magnitude.requires_grad
    ):
        return False
    return _current_backward() == FORWARD and _top_hooks(True) is None


def _is_recomputed() -> bool:
    """Whether this is the forward of a backward pass, and one that may differ from the first: selective checkpoints
    watch every op through a mode, and give out what the same op gave before."""
    return _current_backward() != FORWARD and _dispatch_modes() == 0


def _recomputed(
    projections: Sequence[Projection], prepared: Prepared, options: tuple[int, int], x: Tensor, seeds: Tensor | None
) -> Tensor:
    """y where a checkpoint computes it again for what it saved. torch ends that with the last tensor saved, and so
    down's product, which comes after it, is not made where the MLP is the last of its layer."""
    stand_in, h = _UpToH.apply(projections, prepared, options, x, seeds, *prepared.trained)
    of_down = None if seeds is None else seeds[-1:]
    return _Down.apply(stand_in, h, projections[-1], prepared.arguments.bf16x3, of_down)
