"""How large the adapters on a module are."""

from __future__ import annotations

from torch import nn


def parameters_of(module: nn.Module) -> int:
    """The number of parameters of all adapters on a LoRA module: those that are not of the layer it adapts. Sharded
    ones count whole; DeepSpeed keeps the number of what it has taken away in `ds_numel`."""
    base = {id(parameter) for parameter in module._modules["base_layer"].parameters()}
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if id(p) not in base)
