"""Which adapter of a module is active, and how large all on it are."""

from __future__ import annotations

from collections.abc import Container, Sequence

from torch import nn

from ..specs import Fallback


def parameters_of(module: nn.Module) -> int:
    """The number of parameters of all adapters on a LoRA module: those that are not of the layer it adapts. Sharded
    ones count whole; DeepSpeed keeps the number of what it has taken away in `ds_numel`."""
    base = {id(parameter) for parameter in module._modules["base_layer"].parameters()}
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if id(p) not in base)


def only_active(active: str | Sequence[str], adapters: Container[str]) -> str | Fallback:
    """The active adapter among those that a layer has."""
    names = [name for name in ((active,) if isinstance(active, str) else active) if name in adapters]
    if len(names) == 1:
        return names[0]
    return Fallback(f"several active adapters ({', '.join(names)})" if names else "no active adapter on this layer")
