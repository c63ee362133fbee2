"""A callback of transformers' Trainer, and of those that derive from it, as TRL's."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

from ..explanation import FUSED, read
from ..last_call import TRACED
from .apply import ON_ITS_COPIES, apply, checked_mode

if TYPE_CHECKING:
    from kernels import Mode


_log = logging.getLogger("lora_fused")


class LoraFusedCallback:
    """Applies the fused forwards to a trainer's model when training begins, and reports what runs.

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[lora_fused.LoraFusedCallback()])

    A trainer that adapts the model itself, as TRL's do with `peft_config`, has done so by then. The first log of a
    training gets "lora_fused", the share of the model's LoRA modules whose last call was fused, or a graph's that has
    them fused, from 0 to 1; it stands in `trainer.state.log_history` and in what is printed. What is fused and why not,
    `explain(trainer.model)` says. The forwards stay bound when training ends; `restore(trainer.model)` takes them off.

    Where one process sees several GPUs the trainer takes `nn.DataParallel`, but for quantized models: then PEFT's own
    forward runs, and one line at level WARNING says so.

    `mode` as `apply` takes it, whose errors of it come at once, and those of the model when training begins. An
    instance is a `transformers.TrainerCallback`, one of a class that derives from this one too; transformers is
    imported when the first one is made.
    """

    def __new__(cls, *args, **kwargs):
        return super().__new__(_with_every_event(cls))

    def __init__(self, mode: Mode | None = None):
        self.mode = checked_mode(mode)
        self._reports = False

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Before the first step, when the trainer has wrapped and placed the model."""
        if _is_copied(args, model):
            _log.warning("nothing is fused: the trainer takes nn.DataParallel, %s", ON_ITS_COPIES)
        else:
            apply(model, self.mode)
        self._reports = True

    def on_log(self, args, state, control, logs=None, model=None, **kwargs) -> None:
        """At the first log after it began."""
        if not self._reports or logs is None:
            return
        self._reports = False
        found = read(model)
        share = sum(row.last == FUSED or (row.fused and row.last == TRACED) for row in found) / max(len(found), 1)
        logs["lora_fused"] = share
        if state.log_history:  # a copy of the log, by now
            state.log_history[-1]["lora_fused"] = share


def _is_copied(args: object, model: object) -> bool:
    """Whether the trainer takes `nn.DataParallel`, which is not among what a callback is given. It wraps no model that
    bitsandbytes has quantized."""
    quantized = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    return getattr(args, "n_gpu", 1) > 1 and not quantized


@functools.cache
def _with_every_event(cls: type) -> type:
    """The class with transformers' base, which has a method for every event."""
    from transformers import TrainerCallback

    if issubclass(cls, TrainerCallback):
        return cls
    return type(cls.__name__, (cls, TrainerCallback), {"__module__": cls.__module__})
