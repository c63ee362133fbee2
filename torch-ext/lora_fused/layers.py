"""The layers that `kernelize` maps onto PEFT modules: stateless, `forward` alone.

`kernelize` binds a forward on each instance, so `self` is PEFT's own module here and
`type(self).forward(self, ...)` is PEFT's own forward. torch.compile traces `compiled.forwards` in place of an eager
call's. torch.jit.trace gets PEFT's forward: what runs together is observed from call to call, which no trace can hold.
So do torch.func's transforms and forward-mode differentiation, for which the ops have no rules. And so does every call
in which PEFT's forward would run what another tool has put in the place of a forward or a function (`peft.replaced`).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import last_call, shared_input
from .call_context import CallContext
from .compiled import forwards as compiled
from .functional import (
    delta as functional_delta,
    dispatch,
    embedding as functional_embedding,
    experts as functional_experts,
)
from .peft import (
    embedding as peft_embedding,
    experts as peft_experts,
    gated_mlp as peft_gated_mlp,
    linear as peft_linear,
    linear_call,
    replaced,
)
from .specs import Fallback

# Bound once: attributes of modules cost as much as the answers.
_is_compiling = torch.compiler.is_compiling
_notes, _NEVER = last_call.notes, last_call.NEVER
_is_traced, _is_transformed = torch._C._is_tracing, torch._C._are_functorch_transforms_active


class LoraLinear(nn.Module):
    """LoRA and DoRA for PEFT's linears, `peft.tuners.lora.Linear` and those on quantized bases, y as
    `lora_linear` defines it: fused where the module's state allows, together with its siblings; the base
    module called and the delta fused where the base is of an unknown format; PEFT's own forward
    otherwise (`explain` says which and why). Raises ValueError, naming the module, where its quantized
    weight is damaged or on another device than x."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return _linear(self, x, args, kwargs)


last_call.GROUPED.add(LoraLinear.forward)


class LoraLinearOfX(nn.Module):
    """`LoraLinear` for PEFT's linears whose forward takes x alone."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _linear(self, x, (), {})


def _unusual_reason(x: object) -> str | None:
    """Who differentiates or records a call in a way for which there are no rules here, or what x is instead of a
    tensor."""
    if _is_traced():
        return "torch.jit traces the call"
    if _is_transformed():
        return "torch.func transforms the call"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return None if isinstance(x, Tensor) else f"x is a {type(x).__name__}"


def _linear(module: nn.Module, x: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
    if _is_compiling() and compiled.is_here():
        y = compiled.linear(module, x, args, kwargs)
        if not isinstance(y, Fallback):
            return y
        if y.raises:
            raise ValueError(f"{peft_linear.name_of(module)}: {y.reason}")
        return type(module).forward(module, x, *args, **kwargs)
    reason = _unusual_reason(x)
    if reason is None:
        call = CallContext.of(x)
        reason = shared_input.small_reason(module, x, call) or replaced.linear_reason()
    if reason is None:
        y = _fused_linear(module, x, call, args, kwargs)
        if not isinstance(y, Fallback):
            return y
        if y.raises:
            raise ValueError(f"{peft_linear.name_of(module)}: {y.reason}")
        reason = y.reason
    last_call.note(module, reason)
    return type(module).forward(module, x, *args, **kwargs)


def _note_fused(module: nn.Module) -> None:
    """Before the computation, which a checkpoint that recomputes it may stop."""
    if _notes.get(id(module), _NEVER) is not None:
        last_call.note(module, None)


def _fused_linear(
    module: nn.Module, x: torch.Tensor, call: CallContext, args: tuple, kwargs: dict
) -> torch.Tensor | Fallback:
    if not args and not kwargs:
        y = shared_input.take_precomputed(module, x, call)
        if y is not None:
            _note_fused(module)
            return y
    state = peft_linear.read_linear(module)
    if isinstance(state, Fallback):
        return state
    fallback = linear_call.call_fallback(state, x, call, args, kwargs)
    if fallback is not None:
        return fallback
    if linear_call.own_forward_reason(state, x, call) is None:
        _note_fused(module)
        return shared_input.compute(module, x, call, state)
    reason = peft_linear.delta_reason(state.projection)
    if reason is not None:
        return Fallback(reason)
    _note_fused(module)
    base = peft_linear.call_base(module, x)
    return functional_delta.add_delta(base, x, state.projection, state.promotes and torch.is_autocast_enabled())


class LoraGatedMLP(nn.Module):
    """down(f(gate(x))·up(x)) for MLP modules that compute just that, one graph node: fused where every
    projection is a fusable LoRA linear or a plain one, and the module's own forward otherwise, in
    which each projection is fused alone where it can be."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _gated_mlp(self, x)


class LoraGatedMLPOfHiddenStates(nn.Module):
    """`LoraGatedMLP` for modules that name their input `hidden_states`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _gated_mlp(self, hidden_states)


class LoraGatedMLPOfHiddenState(nn.Module):
    """`LoraGatedMLP` for modules that name their input `hidden_state`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        return _gated_mlp(self, hidden_state)


GATED_MLP_BY_INPUT = {
    "x": LoraGatedMLP,
    "hidden_states": LoraGatedMLPOfHiddenStates,
    "hidden_state": LoraGatedMLPOfHiddenState,
}


def _gated_mlp(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if _is_compiling() and compiled.is_here():
        y = compiled.gated_mlp(module, x)
        return type(module).forward(module, x) if isinstance(y, Fallback) else y
    reason = _unusual_reason(x)
    if reason is None:
        call = CallContext.of(x)
        reason = peft_gated_mlp.small_reason(module, x, call) or replaced.linear_reason()
    state = Fallback(reason) if reason else peft_gated_mlp.read_mlp(module, x, call)
    if isinstance(state, Fallback):
        last_call.note(module, state.reason)
        return type(module).forward(module, x)
    _note_fused(module)
    y = dispatch.compute_gated(x, state.inputs, state.output, state.activation, state.gate_half, call)
    return y if state.result_dtype is None else y.to(state.result_dtype)


class LoraEmbedding(nn.Module):
    """LoRA and DoRA for `peft.tuners.lora.Embedding`, y as `lora_embedding` defines it: fused where the
    module's state allows, and PEFT's own forward otherwise (`explain` says which and why)."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if _is_compiling() and compiled.is_here():
            y = compiled.embedding(self, x, args, kwargs)
            return type(self).forward(self, x, *args, **kwargs) if isinstance(y, Fallback) else y
        reason = _unusual_reason(x) or replaced.embedding_reason()
        if reason is None:
            state = peft_embedding.read_embedding(self)
            reason = (
                state.reason
                if isinstance(state, Fallback)
                else peft_embedding.embedding_call_reason(state, x, args, kwargs)
            )
        if _notes.get(id(self), _NEVER) is not reason:
            last_call.note(self, reason)
        if reason is not None:
            return type(self).forward(self, x, *args, **kwargs)
        return functional_embedding.compute_embedding(x, *state)


def _fused_experts(module: nn.Module, x: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor | Fallback:
    state = peft_experts.read_experts(module)
    if isinstance(state, Fallback):
        return state
    call = peft_experts.read_call(state, x, args, kwargs)
    if isinstance(call, Fallback):
        return call
    _note_fused(module)
    up, down, gate, form, stored = state
    return functional_experts.compute_experts(x, *call, up, down, gate, form.leaves_out, stored)


class LoraExperts(nn.Module):
    """LoRA on the fused weights of a mixture's experts, for `peft.tuners.lora.layer.ParamWrapper`: the outermost
    wrapper of an experts module computes the whole of it, out as `lora_experts` defines it, where the state of all its
    wrappers allows, and PEFT's own forward runs otherwise (`explain` says which and why). Raises ValueError, naming the
    module, at negative indices on the CPU. Warns, naming the module, where what PEFT computes is wrong."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if _is_compiling() and compiled.is_here():
            compiled.begin()
            return type(self).forward(self, x, *args, **kwargs)
        reason = _unusual_reason(x) or replaced.linear_reason()
        if reason is None:
            out = _fused_experts(self, x, args, kwargs)
            if not isinstance(out, Fallback):
                return out
            if out.raises:
                raise ValueError(f"{peft_linear.name_of(self)}: {out.reason}")
            reason = out.reason
        if isinstance(reason, peft_experts.WrongInPeft) and last_call.of(self) != reason:
            warnings.warn(f"lora_fused: {peft_linear.name_of(self)}: {reason}", stacklevel=2)
        last_call.note(self, reason)
        return type(self).forward(self, x, *args, **kwargs)
