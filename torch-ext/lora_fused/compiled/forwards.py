"""The layers' forwards as Dynamo traces them: they read the module as an eager call does, so Dynamo guards what was
read, and put one op into the graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch.autograd import forward_ad

from .. import last_call
from ..backends import native
from ..call_context import FORWARD, CallContext
from ..peft import (
    base_layer,
    embedding as peft_embedding,
    gated_mlp as peft_gated_mlp,
    linear as peft_linear,
    linear_call,
    replaced,
    small_batch,
)
from ..specs import Fallback, Projection, ProjectionSpec, folded
from . import ops

_is_traced = torch.compiler.is_dynamo_compiling
_REPLACED = Fallback("a function that PEFT calls is replaced")


def is_here() -> bool:
    """Whether what torch compiles is traced in this thread: `is_compiling` is one answer for all threads."""
    return _is_traced() or TracingContext.try_get() is not None


def _unusual_reason() -> str | None:
    """Who differentiates or records a traced call in a way for which there are no rules here. Dynamo guards each."""
    if torch.compiler.is_exporting():
        return "torch.export, whose graphs run without this library"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms the call"
    return "forward-mode differentiation" if forward_ad._current_level >= 0 else None


_prepared: weakref.ref | None = None  # the trace that modules were last prepared for


def _prepare_modules() -> None:
    """Notes and prepares all modules that a trace may meet, once a trace: no Python of a model runs in between."""
    global _prepared
    trace = TracingContext.get()
    if _prepared is not None and _prepared() is trace:
        return
    for module in last_call.note_trace():
        if peft_gated_mlp.is_adapted(module):
            peft_gated_mlp.prepare_trace(module)
        elif peft_embedding.is_plain_embedding(module):
            replaced.remember((type(module._modules["base_layer"]),))  # scaled embeddings are no list of classes
    _prepared = weakref.ref(trace)


def begin() -> tuple[str | None, str | None]:
    """Why a linear's and an embedding's call that is traced now is PEFT's. Dynamo runs this and takes the result for a
    constant; what may change later is compared again where Dynamo guards it. It looks at all that a forward will ask
    for: Dynamo knows a dict as it was when it first met it."""
    _prepare_modules()
    if native.may_be_old and torch.cuda.is_initialized():
        native.look_for_old_gpus()
    unusual = _unusual_reason()
    reasons = unusual or replaced.linear_reason(), unusual or replaced.embedding_reason()
    replaced.remember((*peft_linear.forwards(), *peft_embedding.forwards()))
    base_layer.remember_bases()
    return reasons


begin._dynamo_marked_constant = True  # type: ignore[attr-defined]


def context_of(x: Tensor) -> CallContext:
    """`CallContext.of` for Dynamo."""
    kind = x.device.type
    is_on = kind != "meta" and torch.is_autocast_enabled(kind)  # there is none for meta, and torch raises
    autocast = torch.get_autocast_dtype(kind) if is_on else None
    return CallContext(torch.is_grad_enabled(), x.requires_grad, autocast, FORWARD)


def _folded(projection: Projection) -> Projection:
    """`specs.folded`. The spec that all plain projections share is made anew: under `dynamic=True` a number that Dynamo
    finds in an object is an input of the graph, and where the graph of a checkpoint took it first, no other has it."""
    operands, scaling, spec = folded(projection)
    return Projection(operands, scaling, ProjectionSpec(0.0) if spec is peft_linear.PLAIN_SPEC else spec)


def _refused(module: nn.Module, parts_of: Callable[[nn.Module], list[nn.Module]]) -> Fallback | None:
    """Why a linear's or a gated MLP's call is PEFT's, whatever the module holds; Dynamo guards the forwards of its
    parts, which may be read once `begin` has run."""
    reason, _ = begin()
    if reason is not None:
        return Fallback(reason)
    if not replaced.linear_is_genuine():
        return _REPLACED
    replaced.guard_forwards(parts_of(module))
    return None


def linear(module: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Tensor | Fallback:
    """One of PEFT's linears as one op, its base called before where somebody else has to make the product."""
    refused = _refused(module, peft_linear.parts_of)
    if refused is not None:
        return refused
    state = peft_linear.read_linear(module)
    if isinstance(state, Fallback):
        return state
    call = context_of(x)
    fallback = linear_call.call_fallback(state, x, call, args, kwargs)
    if fallback is not None:
        return fallback
    operands, scaling, spec = projection = _folded(state.projection)
    reason = ops.unknown_reason(spec) or small_batch.few_traced_reason(x, call, (projection,))
    if reason is not None:
        return Fallback(reason)
    if linear_call.own_forward_reason(state, x, call) is None:
        return ops.traced_linear(x, list(operands), scaling, spec.dropout, ops.packed(spec))
    reason = peft_linear.delta_reason(state.projection)
    if reason is not None:
        return Fallback(reason)
    base = peft_linear.call_base(module, x)
    promotes = state.promotes and torch.is_autocast_enabled()
    return ops.traced_delta(base, x, list(operands), scaling, spec.dropout, ops.packed(spec), promotes)


def embedding(module: nn.Module, ids: Tensor, args: tuple, kwargs: dict) -> Tensor | Fallback:
    """PEFT's embedding as one op."""
    _, reason = begin()
    if reason is not None:
        return Fallback(reason)
    if not replaced.embedding_is_genuine():
        return _REPLACED
    replaced.guard_forwards(peft_linear.parts_of(module))
    state = peft_embedding.read_embedding(module)
    if isinstance(state, Fallback):
        return state
    reason = peft_embedding.embedding_call_reason(state, ids, args, kwargs)
    if reason is not None:
        return Fallback(reason)
    table, scaling, padding_idx, scale = state
    if isinstance(scaling, Tensor):
        table, scaling = table._replace(lora_b=table.lora_b * scaling.clone()), 1.0
    return ops.traced_embedding(ids, list(table), scaling, padding_idx, scale)


def gated_mlp(module: nn.Module, x: Tensor) -> Tensor | Fallback:
    """A gated MLP as one op."""
    refused = _refused(module, peft_gated_mlp.parts_of)
    if refused is not None:
        return refused
    call = context_of(x)
    state = peft_gated_mlp.read_mlp(module, x, call)
    if isinstance(state, Fallback):
        return state
    projections = [_folded(each) for each in (*state.inputs, state.output)]
    reason = small_batch.few_traced_reason(x, call, projections)
    if reason is not None:
        return Fallback(reason)
    operands: list[Tensor | None] = []
    scalings, dropouts, stored = [], [], []
    for of, scaling, spec in projections:
        reason = ops.unknown_reason(spec)
        if reason is not None:
            return Fallback(reason)
        operands += list(of)
        scalings.append(scaling)
        dropouts.append(spec.dropout)
        stored += ops.packed(spec)
    y = ops.traced_gated_mlp(x, operands, scalings, dropouts, stored, state.activation, state.gate_half)
    return y if state.result_dtype is None else y.to(state.result_dtype)
