"""The layers that `kernelize` maps onto PEFT modules: stateless, `forward` alone.

`kernelize` binds a forward on each instance, so `self` is PEFT's own module here and
`type(self).forward(self, ...)` is PEFT's own forward. That is what torch.compile gets as well: what
runs together is observed from call to call, which no graph can hold.
"""

from __future__ import annotations

import torch
from torch import nn

from . import functional, functional_embedding, mlp_state, peft_embedding, peft_state, siblings


class LoraLinear(nn.Module):
    """LoRA and DoRA for `peft.tuners.lora.Linear`, y as `lora_linear` defines it: fused where the
    module's state allows, together with its siblings, and PEFT's own forward otherwise (`explain`
    says which and why)."""

    can_torch_compile = False
    has_backward = True

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return type(self).forward(self, x, *args, **kwargs)
        state = peft_state.read_linear(self)
        if isinstance(state, str) or peft_state.call_reason(state, x, args, kwargs):
            return type(self).forward(self, x, *args, **kwargs)
        return siblings.compute(self, x, state.projection, LoraLinear)


class LoraGatedMLP(nn.Module):
    """down(f(gate(x))·up(x)) for MLP modules that compute just that, one graph node: fused where every
    projection is a fusable LoRA linear or a plain one, and the module's own forward otherwise, in
    which each projection is fused alone where it can be."""

    can_torch_compile = False
    has_backward = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _gated_mlp(self, x)


class LoraGatedMLPOfHiddenStates(nn.Module):
    """`LoraGatedMLP` for modules that name their input `hidden_states`."""

    can_torch_compile = False
    has_backward = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _gated_mlp(self, hidden_states)


GATED_MLP_BY_INPUT = {"x": LoraGatedMLP, "hidden_states": LoraGatedMLPOfHiddenStates}


def _gated_mlp(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return type(module).forward(module, x)
    state = mlp_state.read_mlp(module, x, LoraLinear)
    if isinstance(state, str):
        return type(module).forward(module, x)
    return functional.compute_gated(x, state.inputs, state.output, state.activation, state.gate_half)


class LoraEmbedding(nn.Module):
    """LoRA and DoRA for `peft.tuners.lora.Embedding`, y as `lora_embedding` defines it: fused where the
    module's state allows, and PEFT's own forward otherwise (`explain` says which and why)."""

    can_torch_compile = False
    has_backward = True

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return type(self).forward(self, x, *args, **kwargs)
        state = peft_embedding.read_embedding(self)
        if isinstance(state, str) or peft_embedding.embedding_call_reason(state, x, args, kwargs):
            return type(self).forward(self, x, *args, **kwargs)
        return functional_embedding.compute_table(x, *state)
