"""The adapted modules of a model, kernelized alone.

`kernelize(model)` visits every module. Of the model's own extensible layers (norms, activations) that are not in the
mapping it logs a warning each, and gives each its class's forward back, also where another tool or an earlier mapping
had set one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import nn

from ..environment import versions
from ..mapping import Marks, layer_mapping
from ..peft import gated_mlp as peft_gated_mlp, linear as peft_linear


class _Alone(nn.Module):
    """What `kernelize` walks through in a module's place: that module, without the ones in it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def named_modules(self, *args, **kwargs) -> Iterator[tuple[str, nn.Module]]:
        yield "", self.module

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.module.parameters() if not parameter.is_meta)


def kernelize_adapted(model: nn.Module, *, mode, device: str | torch.device | None = None) -> nn.Module:
    """Binds our forwards on the LoRA modules and the adapted gated MLPs of `model`, as `kernelize(model, mode=mode)`
    does inside `use_peft_layers()`, and touches no other module. Returns `model`.

    `device`: as `kernelize` takes it; each module's own by default. A module whose tensors are all on the meta device,
    to be put elsewhere by another tool, counts as on the CPU. Raises ImportError as `register_peft_layers` does,
    ValueError where `kernelize` does.
    """
    versions.check()
    from kernels import kernelize, use_kernel_mapping

    peft_linear.note_names(model)
    modules = list(model.modules())
    adapted_mlps = [module for module in modules if peft_gated_mlp.is_adapted(module)]
    marks = Marks()
    try:
        marks.mark_all()
        for module in adapted_mlps:
            marks.mark_gated_mlp(module)
        with use_kernel_mapping(layer_mapping(), inherit_mapping=False), _without_a_line_a_module():
            for module in modules:
                if type(module) in marks.marked:
                    alone = _Alone(module)
                    kernelize(alone, mode=mode, device=device or _device(alone))
    finally:
        marks.restore()
    return model


@contextlib.contextmanager
def _without_a_line_a_module() -> Iterator[None]:
    """`kernels` logs on the root logger which layer each module gets, by `logging.info`, which gives that logger a
    handler where it has none; the user's own `basicConfig` would do nothing then."""

    def other(record: logging.LogRecord) -> bool:
        return not (record.levelno <= logging.INFO and __package__.partition(".")[0] in record.getMessage())

    root = logging.getLogger()
    root.addFilter(other)
    handlers = root.handlers[:]
    try:
        yield
    finally:
        root.removeFilter(other)
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)


def _device(alone: _Alone) -> str | None:
    """None, for `kernelize` to find it out, where there is a parameter to tell."""
    return "cpu" if next(alone.parameters(), None) is None else None
