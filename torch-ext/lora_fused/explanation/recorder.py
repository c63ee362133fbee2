"""What really runs in a with-block."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Iterator

from torch import nn

from .. import last_call, layers
from ..functional.checks import check_module
from .table import FUSED


class Calls:
    """The calls of kernelized modules in `with record() as calls`: of LoRA modules, and of gated MLPs as a whole, in
    which case their projections are not called. Calls of a recomputation (checkpointing) count as well; a graph of
    torch.compile makes none that could be seen, its traces do not count. Modules are held weakly."""

    def __init__(self):
        self._counts: weakref.WeakKeyDictionary[nn.Module, Counter[str]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def _count(self, module: nn.Module, reason: str | None) -> None:
        """One call of `module`: fused, or its own forward for `reason`."""
        if reason is last_call.TRACED:
            return
        with self._lock:
            self._counts.setdefault(module, Counter())[FUSED if reason is None else reason] += 1

    def of(self, module: nn.Module) -> Counter[str]:
        """How often a module's call was "fused", or which reason its own forward had.
        Raises TypeError where `module` is none."""
        check_module("module", module, "a torch.nn.Module")
        return Counter(self._counts.get(module, ()))

    def by_module(self, model: nn.Module) -> dict[str, Counter[str]]:
        """`of` by name, of the modules of `model` that were called. Raises TypeError if that is none."""
        check_module("model", model)
        return {name: self.of(module) for name, module in model.named_modules() if module in self._counts}

    @property
    def total(self) -> Counter[str]:
        """`of`, summed over all modules."""
        with self._lock:
            return sum(self._counts.values(), Counter())

    @property
    def fused(self) -> int:
        """How many calls this kernel computed."""
        return self.total[FUSED]

    @property
    def own(self) -> int:
        """How many calls were the modules' own forward, PEFT's or the MLP's."""
        return self.total.total() - self.fused

    def __repr__(self) -> str:
        total = self.total
        unseen = "" if total else "; what graphs of torch.compile run is not seen"
        fused = total.pop(FUSED, 0)
        reasons = "".join(f"\n    {number} x {reason}" for reason, number in total.most_common())
        return f"{fused} fused calls, {total.total()} of the modules' own forwards{unseen}{reasons}"


class _Unknown(dict):
    """In place of the notes that layers look at, so that each call tells its own."""

    def get(self, _, default=None):
        return default


_active: list[Calls] = []
_switch = threading.Lock()
_notes, _note = last_call.notes, last_call.note


def _count_and_note(module: nn.Module, reason: str | None) -> None:
    for calls in tuple(_active):
        calls._count(module, reason)
    _note(module, reason)


@contextlib.contextmanager
def record() -> Iterator[Calls]:
    """What kernelized modules run in the with-block, in all threads: fused, or their own forward for which reason.

    A call outside of such blocks is not slower for it. Modules that nobody kernelized are not seen: `explain` names
    them.

        with lora_fused.record() as calls:
            trainer.train()
        print(calls, lora_fused.explain(model, calls=calls))
    """
    calls = Calls()
    with _switch:
        _active.append(calls)
        layers._notes, last_call.note = _Unknown(), _count_and_note
    try:
        yield calls
    finally:
        with _switch:
            _active.remove(calls)
            if not _active:
                layers._notes, last_call.note = _notes, _note
