"""One call that puts our forwards on a model, and one that takes them away."""

from __future__ import annotations

import logging
import types
from typing import TYPE_CHECKING

from torch import nn

from .. import last_call
from ..environment import versions
from ..explanation import BETWEEN_CALLS, read
from ..functional.checks import check_module, shown
from ..peft import gated_mlp as peft_gated_mlp, linear as peft_linear, replaced
from .adapted import kernelize_adapted

if TYPE_CHECKING:
    from kernels import Mode

_log = logging.getLogger("lora_fused")
_FORWARDS = ("forward", "_old_forward")  # the second is where accelerate's hooks keep what they found
ON_ITS_COPIES = (
    "whose copies on other GPUs would call the first one's modules; start a process a GPU: torchrun --nproc-per-node N"
)


def apply(model: nn.Module, mode: Mode | None = None) -> nn.Module:
    """Binds the fused forwards on `model`, a PEFT model with LoRA modules, and returns it.

    What changes is the forward of each LoRA module and of each gated MLP that has one, on the instance: y and all
    gradients are PEFT's up to rounding. Modules, parameters, `state_dict` and classes stay as they are, and so do the
    forwards of other modules, whoever set them. Nothing is registered, so other models are not concerned. It does what
    `register_peft_layers()` and `kernelize(model, mode=mode)` do, for these modules alone; `restore(model)` undoes it.
    Logs one line under the name "lora_fused": how much is fused, at level INFO, or WARNING if nothing is.

    Args:
        model: as `get_peft_model` returns it, or a part of it; anything that holds LoRA modules, such as a trainer's
            wrapper. Applied again, it is bound anew.
        mode: of the `kernels` library: `Mode.TRAINING` (also if None), or `Mode.INFERENCE`, each alone or with
            `Mode.TORCH_COMPILE`: the forwards are the same.

    Raises:
        TypeError: `model` is no module, or `mode` no Mode.
        ValueError: `model` has no LoRA modules, or `mode` names neither training nor inference.
        ImportError: peft, kernels or torch is missing or too old.

    On an error the forwards stay as they were.
    """
    check_module("model", model)
    versions.check()
    mode = checked_mode(mode)
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ValueError(f"model: nn.DataParallel, {ON_ITS_COPIES}")
    if not any(map(peft_linear.is_lora_module, model.modules())):
        raise ValueError(
            f"model: {type(model).__name__} has no PEFT LoRA modules; adapt it first: "
            "get_peft_model(model, LoraConfig(...))"
        )
    before = {module: module.__dict__.get("forward") for module in model.modules()}
    try:
        kernelize_adapted(model, mode=mode)
    except BaseException:
        for module, forward in before.items():
            _put_back(module, forward)
        raise
    found = read(model)
    may_be_fused = any(row.fused or row.reason.endswith(BETWEEN_CALLS) for row in found)
    _log.log(logging.INFO if may_be_fused else logging.WARNING, "%s", found.headline())
    return model


def restore(model: nn.Module) -> nn.Module:
    """Takes our forwards off `model`, which computes as PEFT alone does from its next call on, and returns it.

    Whoever bound them: `apply`, `kernelize`, or another build of this kernel; and whatever became of the model since:
    `unload()` and `merge_and_unload()` leave the MLPs' forwards, wrappers and copies hold the same modules. Forwards of
    others stay; one that keeps ours and calls it is named in a line at level WARNING. Where `register_peft_layers()`
    was called, `unregister_peft_layers()` ends that; a later `kernelize` would bind our forwards again. Raises
    TypeError if `model` is no module.
    """
    check_module("model", model)
    kept = []
    for module_name, module in model.named_modules():
        module.__dict__.pop(peft_gated_mlp.TRACED, None)
        for name in _FORWARDS:
            if last_call.is_of_any_build(module.__dict__.get(name)):
                _put_back(module, None, name)
                last_call.forget(module)
                if name == "_old_forward" and last_call.is_hooked(module):  # which says what it is around
                    module.__dict__["forward"].__wrapped__ = module.__dict__[name]
        if any(last_call.ours_kept_by(module.__dict__.get(name)) for name in _FORWARDS):
            kept.append(f"{module_name}: {replaced.name_of(module.__dict__['forward'])}")
    if kept:
        text = "another tool's forward keeps ours and calls it, on %d modules (%s): undo it, then restore again"
        _log.warning(text, len(kept), kept[0])
    return model


def checked_mode(mode: Mode | None) -> Mode:
    """The mode that None stands for, or an error as `apply` raises it."""
    from kernels import Mode

    if mode is None:
        return Mode.TRAINING
    if not isinstance(mode, Mode):
        raise TypeError(f"mode: {shown(mode)}, expected a kernels.Mode, such as Mode.TRAINING")
    if Mode.TRAINING not in mode and Mode.INFERENCE not in mode:
        raise ValueError(f"mode: {mode}, expected one that contains Mode.TRAINING or Mode.INFERENCE")
    return mode


def _put_back(module: nn.Module, forward: object, name: str = "forward") -> None:
    """A module's forward as an attribute of the instance; none is its class's."""
    if forward is not None:
        module.__dict__[name] = forward
    elif name == "_old_forward":  # a hook calls it
        module.__dict__[name] = types.MethodType(type(module).forward, module)
    else:
        module.__dict__.pop(name, None)
