"""The layers that `kernelize` maps onto PEFT modules: stateless, `forward` alone.

`kernelize` binds a forward on each instance, so `self` is PEFT's own module here and
`type(self).forward(self, ...)` is PEFT's own forward.
"""

from __future__ import annotations

import torch
from torch import nn

from . import peft_state, siblings


class LoraLinear(nn.Module):
    """LoRA and DoRA for `peft.tuners.lora.Linear`, y as `lora_linear` defines it: fused where the
    module's state allows, together with its siblings, and PEFT's own forward otherwise (`explain`
    says which and why)."""

    can_torch_compile = False
    has_backward = True

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        state = peft_state.read_linear(self)
        if isinstance(state, str) or peft_state.call_reason(state, x, args, kwargs):
            return type(self).forward(self, x, *args, **kwargs)
        return siblings.compute(self, x, state.projection, LoraLinear)
