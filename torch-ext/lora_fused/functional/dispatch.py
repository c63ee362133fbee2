"""Operands that are known to be right, to the Function of the backend that computes them: the one place where a call
goes to the native ops, or to the chain of operations (Triton, torch)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..autograd.gated_mlp_eager import GatedMLPFunction, forward_gated
from ..autograd.gated_mlp_native import gated_mlp
from ..autograd.group_eager import LoraLinearFunction, forward_group
from ..autograd.group_native import lora_group, native_path
from ..autograd.members import members_of
from ..backends import select
from ..backends.reference.activations import INDEX
from ..call_context import CallContext, without_autocast
from ..specs import GatedSpec, GroupSpec, NativePath, Projection, flatten, fold


def compute_group(
    x: Tensor,
    projections: Sequence[Projection],
    call: CallContext | None = None,
    *,
    share_mask: bool = False,
    backend: str | None = None,
    token: object = None,
) -> tuple[Tensor, ...]:
    """`lora_linear_group` on operands that are known to be right; `token` is kept as the graph is."""
    call = call or CallContext.of(x)
    projections, lora_dtype, x = fold(projections), call.autocast, _cast(x, call)
    path = native_path(projections, x.dtype, lora_dtype, x.is_cuda)
    backend = backend or _choose(x, projections, path, lora_dtype)
    seeds = draw_seeds(x.device, projections, share_mask)
    if path.native and backend == select.NATIVE:
        return lora_group(x, projections, seeds, path.bf16x3, token)
    group = GroupSpec(tuple(projection.spec for projection in projections), backend, lora_dtype)
    scalings = tuple(projection.scaling for projection in projections)
    flat = flatten([projection.operands for projection in projections])
    if call.grad:
        return LoraLinearFunction.apply(group, scalings, token, x, seeds, *flat)
    with without_autocast(x):
        rows = x.reshape(-1, x.shape[-1])
        outputs, _ = forward_group(group, rows, members_of(group.members, scalings, seeds, flat), x.shape[:-1])
        return tuple(outputs)


def compute_gated(
    x: Tensor,
    inputs: Sequence[Projection],
    output: Projection,
    activation: str,
    gate_half: int = 0,
    call: CallContext | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """down(f(gate(x))·up(x)) on operands that are known to be right: `inputs` are gate and up, or the one
    projection that holds both as halves, `output` is down, f one of `activations.ACTIVATIONS`."""
    call = call or CallContext.of(x)
    *inputs, output = projections = fold((*inputs, output))
    lora_dtype, x = call.autocast, _cast(x, call)
    path = native_path(projections, x.dtype, lora_dtype, x.is_cuda)
    of_inputs = backend or _choose(x, inputs, path, lora_dtype)
    of_output = backend or _choose(x, (output,), path, lora_dtype)
    seeds = draw_seeds(x.device, projections)
    if path.native and of_inputs == of_output == select.NATIVE:
        return gated_mlp(x, projections, (INDEX[activation], gate_half), seeds, path.bf16x3)
    members = tuple(projection.spec for projection in projections)
    group, last = GroupSpec(members[:-1], of_inputs, lora_dtype), GroupSpec(members[-1:], of_output, lora_dtype)
    spec = GatedSpec(group, last, activation, gate_half)
    scalings = tuple(projection.scaling for projection in projections)
    flat = flatten([projection.operands for projection in projections])
    if call.grad:
        return GatedMLPFunction.apply(spec, scalings, x, seeds, *flat)
    with without_autocast(x):
        rows = x.reshape(-1, x.shape[-1])
        y, *_ = forward_gated(spec, rows, members_of(spec.members, scalings, seeds, flat), x.shape[:-1])
        return y


def _cast(x: Tensor, call: CallContext) -> Tensor:
    """x in autocast's dtype where that is on."""
    return x if call.autocast is None or x.dtype == call.autocast else x.to(call.autocast)


def _choose(
    x: Tensor,
    projections: Sequence[Projection],
    path: NativePath,
    lora_dtype: torch.dtype | None,
    rows: int | None = None,
) -> str:
    """Name of the backend; `path` is of all that is computed together. `rows` in place of x's own, where given."""
    if not x.is_cuda:
        return select.NATIVE
    if x.dtype == torch.float16 and lora_dtype is None and any([_is_wide(p.operands.lora_a) for p in projections]):
        return select.NATIVE  # Triton stores t and dt in x's dtype, which has not the range for an adapter in float32

    def work() -> int:
        tokens = math.prod(x.shape[:-1]) if rows is None else rows
        return tokens * max(math.prod(projection.shape) for projection in projections)

    return select.choose(x.device, x.dtype, path, work)


def _is_wide(lora_a: Tensor | None) -> bool:
    return lora_a is not None and lora_a.dtype != torch.float16


def describe_backend(
    x: Tensor, projection: Projection, groups: Sequence[Sequence[Projection]], rows: int, compiled: bool = False
) -> str:
    """What a reader calls the backend of a projection of `rows` rows like those of x. `groups`: what one Function
    computes, a group or a gated MLP's two, the projection's own first. `compiled` where torch.compile traces it, which
    takes no other than NATIVE."""
    call = CallContext.of(x)
    lora_dtype, x = call.autocast, _cast(x, call)
    path = native_path([each for group in groups for each in group], x.dtype, lora_dtype, x.is_cuda)
    chosen = [select.NATIVE if compiled else _choose(x, group, path, lora_dtype, rows) for group in groups]
    if not path.native or set(chosen) != {select.NATIVE}:
        return select.describe(chosen[0])
    return select.HOPPER_GEMM if select.gemm_is_faster(x, rows, projection.shape[0]) else select.NATIVE


def draw_seeds(device: torch.device, projections: Sequence[Projection], share_mask: bool = False) -> Tensor | None:
    """int64 [members] from torch's generator for the device, on the device; None without dropout."""
    if not any([spec.dropout > 0 for _, _, spec in projections]):
        return None
    count = len(projections)
    seeds = torch.randint(0, 2**63 - 1, (1 if share_mask else count,), device=device, dtype=torch.int64)
    return seeds.repeat(count) if share_mask else seeds
