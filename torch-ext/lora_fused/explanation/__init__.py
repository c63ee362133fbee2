"""What a kernelized model will run, what it last ran, and what ran while it was recorded."""

from __future__ import annotations

import warnings

from torch import nn

from ..functional.checks import check_module, shown
from ..peft import linear as peft_linear
from .next_call import BETWEEN_CALLS, COMPILED, EXPERTS_COMPILED, Model
from .recorder import Calls, record
from .table import FUSED, Explanation, Row

__all__ = [
    "BETWEEN_CALLS",
    "COMPILED",
    "EXPERTS_COMPILED",
    "FUSED",
    "Calls",
    "Explanation",
    "Row",
    "explain",
    "read",
    "record",
]
_MOST_ROWS = 2**63


def explain(model: nn.Module, rows: int = 8192, *, calls: Calls | None = None) -> Explanation:
    """What every LoRA module of `model` does at its next call, by its state now, and what its last call ran.

    The backend is that of a call with `rows` rows (tokens of all sequences together), in the base weight's dtype, or
    autocast's inside an autocast block. Of a module that torch.compile has traced, or will trace, it is what a trace
    takes now. Weights that FSDP shards between calls are known by what the last call ran. With the `calls` of
    `record()` each row has what it ran meanwhile. Warns where nothing is fused. Raises TypeError if `model` is no
    module, `rows` no number of rows or `calls` no recording, ValueError if `rows` is negative or no tensor has as many.
    """
    check_module("model", model)
    if not isinstance(rows, int) or isinstance(rows, bool):
        raise TypeError(f"rows: {shown(rows)}, expected an int, the number of rows of a call")
    if not 0 <= rows < _MOST_ROWS:
        raise ValueError(f"rows: {rows}, expected at least 0 and less than 2**63")
    if calls is not None and not isinstance(calls, Calls):
        raise TypeError(f"calls: {type(calls).__name__}, expected what `with lora_fused.record() as calls` gives")
    table = read(model, rows, calls)
    if not table:
        warnings.warn(
            f"lora_fused: {type(model).__name__} has no PEFT LoRA modules, nothing is fused; adapt it first: "
            "get_peft_model(model, LoraConfig(...))",
            stacklevel=2,
        )
    elif not any(row.fused for row in table):
        first = table[0]
        advice = f"; {first.suggestion}" if first.suggestion else ""
        warnings.warn(
            f"lora_fused: none of the {len(table)} LoRA modules is fused; {first.module}: {first.reason}{advice}",
            stacklevel=2,
        )
    return table


def read(model: nn.Module, rows: int = 8192, calls: Calls | None = None) -> Explanation:
    """`explain` of arguments that are right, without a warning."""
    seen = Model(model, rows)
    modules = {module: name for module, name in seen.names.items() if peft_linear.is_lora_module(module)}
    return Explanation([seen.row(module, name, calls) for module, name in modules.items()])
