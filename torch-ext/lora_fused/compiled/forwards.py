"""The layers' forwards as Dynamo traces them: they read the module as an eager call does, so Dynamo guards what was
read, and put one op into the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import last_call
from ..backends import native
from ..call_context import FORWARD, CallContext
from ..peft import base_layer, embedding as peft_embedding, linear as peft_linear, linear_call, replaced
from ..specs import Fallback
from . import ops


def _begin() -> tuple[str | None, str | None]:
    """Why a linear's and an embedding's call that is traced now is PEFT's. Dynamo runs this and takes the result for a
    constant; what may change later is compared again where Dynamo guards it. It looks at all that a forward will ask
    for: Dynamo knows a dict as it was when it first met it."""
    if native.available:
        from . import inductor

        inductor.register()
    last_call.note_trace()
    reasons = replaced.linear_reason(), replaced.embedding_reason()
    replaced.remember((*peft_linear.forwards(), *peft_embedding.forwards()))
    base_layer.remember_bases()
    return reasons


_begin._dynamo_marked_constant = True  # type: ignore[attr-defined]


def context_of(x: Tensor) -> CallContext:
    """`CallContext.of` for Dynamo."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return CallContext(torch.is_grad_enabled(), x.requires_grad, autocast, FORWARD)


def linear(module: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Tensor | Fallback:
    reason, _ = _begin()
    if reason is not None:
        return Fallback(reason)
    if not replaced.linear_is_genuine():
        return Fallback("a function that PEFT calls is replaced")
    state = peft_linear.read_linear(module)
    if isinstance(state, Fallback):
        return state
    call = context_of(x)
    fallback = linear_call.call_fallback(state, x, call, args, kwargs)
    if fallback is not None:
        return fallback
    operands, scaling, spec = state.projection
    if linear_call.own_forward_reason(state, x, call) is None:
        return ops.traced_linear(x, list(operands), scaling, spec.dropout, ops.packed(spec))
    reason = peft_linear.delta_reason(state.projection)
    if reason is not None:
        return Fallback(reason)
    base = peft_linear.call_base(module, x)
    promotes = state.promotes and torch.is_autocast_enabled()
    return ops.traced_delta(base, x, list(operands), scaling, spec.dropout, ops.packed(spec), promotes)


def embedding(module: nn.Module, ids: Tensor, args: tuple, kwargs: dict) -> Tensor | Fallback:
    _, reason = _begin()
    if reason is not None:
        return Fallback(reason)
    if not replaced.embedding_is_genuine():
        return Fallback("a function that PEFT calls is replaced")
    state = peft_embedding.read_embedding(module)
    if isinstance(state, Fallback):
        return state
    reason = peft_embedding.embedding_call_reason(state, ids, args, kwargs)
    if reason is not None:
        return Fallback(reason)
    table, scaling, padding_idx, scale = state
    return ops.traced_embedding(ids, list(table), scaling, padding_idx, scale)
