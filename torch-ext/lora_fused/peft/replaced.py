"""Whether what PEFT's forward would call is what its library defines.

Tools replace a forward on its class or a function in its module, for all instances, at any time: PEFT's forward would
run the replacement, so a fused forward must not. Watched are the forwards of classes, `nn.Module.__call__`, the
functions that multiply, embed, drop and activate, and modes that see every operation. Argument checks are not.

A Python function is genuine if its code lies in the file of the module that should define it, under the name it should
have: wrappers cannot imitate that, and it does not matter who was imported first. A builtin cannot be imitated. What
was found genuine is remembered, so that a call compares identities alone, one by one: a loop would take twice the time.

Hooks and forwards on one instance are the same matter: `bypass_reason`.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

_is_traced = torch.compiler.is_dynamo_compiling
_function_modes, _dispatch_modes = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
# Same mathematics under another name. DeepSpeed's ZeRO-3 leaves its own `linear` in place for good.
_EQUIVALENT = {("torch.nn.functional", "linear"): ("deepspeed.runtime.zero.linear", "zero3_linear_wrap")}
# They change nothing that a layer computes: the default device of new tensors, and selective checkpointing.
HARMLESS_MODES = (
    ("torch.utils._device", "DeviceContext"),
    ("torch.utils.checkpoint", "_CachingTorchDispatchMode"),
    ("torch.utils.checkpoint", "_CachedTorchDispatchMode"),
)
_CODE_NAMES = {("Module", "__call__"): "Module._wrapped_call_impl"}  # defined under a name of its own

# The last genuine one of each, None before the first call that asks.
_linear = _linear_forward = _dropout = _dropout_forward = _identity_forward = _call = None
_embedding = _embedding_forward = None
_linear_code = _embedding_code = None
# Of each class, see `forward_reason`; who is asked at every call looks here first.
FORWARDS: dict[type, Callable] = {}
CODES: dict[type, types.CodeType] = {}
_functions: dict[tuple[str, str], Callable] = {}


def linear_reason() -> str | None:
    """What is replaced of that which PEFT calls in every linear, and by whom; None where all is genuine. The forward
    of PEFT's own class, and of a base of another class than nn.Linear, is `forward_reason`'s."""
    if linear_is_genuine() and not _function_modes() and not _dispatch_modes():
        return None
    return _look_at_linear()


def linear_is_genuine() -> bool:
    """Whether what PEFT calls in every linear is what was found genuine before."""
    return (
        F.linear is _linear
        and (forward := nn.Linear.forward) is _linear_forward
        and forward.__code__ is _linear_code
        and nn.Linear.__call__ is _call
        and nn.Dropout.forward is _dropout_forward
        and nn.Dropout.__call__ is _call
        and F.dropout is _dropout
        and nn.Identity.forward is _identity_forward
        and nn.Identity.__call__ is _call
    )


def _look_at_linear() -> str | None:
    global _linear, _linear_forward, _linear_code, _dropout, _dropout_forward, _identity_forward, _call
    found = F.linear, nn.Linear.forward, nn.Linear.__call__, nn.Dropout.forward, F.dropout, nn.Identity.forward
    owners = (F, "linear"), (nn.Linear, "forward"), (nn.Linear, "__call__"), (nn.Dropout, "forward"), (F, "dropout")
    others = (nn.Identity, "forward"), (nn.Dropout, "__call__"), (nn.Identity, "__call__")
    reason = _first_reason((*owners, *others)) or _mode_reason()
    if reason is None:
        _linear, _linear_forward, _call, _dropout_forward, _dropout, _identity_forward = found
        _linear_code = _linear_forward.__code__
    return reason


def embedding_reason() -> str | None:
    """`linear_reason` of PEFT's embedding."""
    if embedding_is_genuine() and not _function_modes() and not _dispatch_modes():
        return None
    return _look_at_embedding()


def embedding_is_genuine() -> bool:
    """`linear_is_genuine` of PEFT's embedding."""
    return (
        F.embedding is _embedding
        and (forward := nn.Embedding.forward) is _embedding_forward
        and forward.__code__ is _embedding_code
        and nn.Embedding.__call__ is _call
    )


def _look_at_embedding() -> str | None:
    global _embedding, _embedding_forward, _embedding_code, _call
    found = F.embedding, nn.Embedding.forward, nn.Embedding.__call__
    owners = (F, "embedding"), (nn.Embedding, "forward"), (nn.Embedding, "__call__")
    reason = _first_reason(owners) or _mode_reason()
    if reason is None:
        _embedding, _embedding_forward, _call = found
        _embedding_code = _embedding_forward.__code__
    return reason


def _first_reason(attributes) -> str | None:
    for owner, name in attributes:
        reason = _replaced(owner, name)
        if reason:
            return reason
    return None


def forward_reason(cls: type[nn.Module]) -> str | None:
    """Who has replaced the forward of a class; None where it is genuine."""
    if _is_traced():
        return _traced_reason(cls)
    found = cls.forward
    if FORWARDS.get(cls) is found and CODES[cls] is found.__code__:
        return None
    reason = _replaced(cls, "forward")
    if reason is None:
        FORWARDS[cls], CODES[cls] = found, found.__code__
    return reason


def module_reason(cls: type) -> str | None:
    """Who has replaced how modules of a class are called, or their forward; None where both are genuine."""
    return forward_reason(cls) or (None if cls.__call__ is _call else _replaced(cls, "__call__"))


def function_reason(module: types.ModuleType, name: str) -> str | None:
    """Who has replaced a function of a module; None where it is genuine."""
    key, found = (module.__name__, name), getattr(module, name)
    if _is_traced():
        return None if getattr(_traced, name, None) is found else f"{name} is replaced"
    if _functions.get(key) is found:
        return None
    reason = _replaced(module, name)
    if reason is None:
        _functions[key] = found
    return reason


class _Traced:
    """What a trace may ask for and was found genuine, by name: Dynamo guards the attributes that it reads, of a
    dictionary by class its length too."""


_traced = _Traced()


def remember(classes: Iterable[type[nn.Module]], functions: Iterable[tuple[types.ModuleType, str]] = ()) -> None:
    """Looks at the forwards of classes and at functions that a trace may ask for: while torch.compile traces, what is
    not known to be genuine counts as replaced."""
    for cls in classes:
        if forward_reason(cls) is None:
            setattr(_traced, _name_of_class(cls), (cls, cls.forward, cls.forward.__code__))
    for module, name in functions:
        if function_reason(module, name) is None:
            setattr(_traced, name, getattr(module, name))


def _name_of_class(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}".replace(".", "_")  # an attribute as Dynamo names it


def _traced_reason(cls: type[nn.Module]) -> str | None:
    known, forward, code = getattr(_traced, _name_of_class(cls), (None, None, None))
    if known is cls and forward is cls.forward and code is cls.forward.__code__:
        return None
    return f"{cls.__qualname__}.forward is replaced"


def is_defined_at(found: object, module: str, qualified: str) -> bool:
    """Whether something is the function that a module defines under a qualified name, and no wrapper around it."""
    return _is_defined_at(found, _Home(module, qualified))


class _Home(NamedTuple):
    """Where something should be defined, and as what."""

    module: str
    qualified: str


def _home_of(owner, name: str) -> _Home:
    if isinstance(owner, types.ModuleType):
        return _Home(owner.__name__, name)
    cls = next(cls for cls in owner.__mro__ if name in cls.__dict__)
    return _Home(cls.__module__, _CODE_NAMES.get((cls.__qualname__, name), f"{cls.__qualname__}.{name}"))


def _replaced(owner, name: str) -> str | None:
    found, home = getattr(owner, name), _home_of(owner, name)
    if _is_defined_at(found, home) or _is_equivalent(found, home):
        return None
    shown = (
        f"{owner.__name__}.{name}"
        if isinstance(owner, types.ModuleType)
        else f"{owner.__module__}.{owner.__qualname__}.{name}"
    )
    return f"{shown} is replaced by {name_of(found)}"


def _is_defined_at(found: object, home: _Home) -> bool:
    if isinstance(found, types.BuiltinFunctionType):
        return found.__name__ == home.qualified and (found.__module__ or "").startswith("torch.")
    if not isinstance(found, types.FunctionType):
        return False
    module = sys.modules.get(found.__globals__.get("__name__"))
    if module is None or found.__globals__ is not vars(module):
        return False
    spec = getattr(module, "__spec__", None)  # a script and a notebook have none
    if module.__name__ != "__main__" and (spec is None or found.__code__.co_filename != spec.origin):
        return False
    # A module may take a function from another of its package, as bitsandbytes' does.
    name = getattr(found.__code__, "co_qualname", found.__qualname__)  # what `wraps` does not copy, from Python 3.11 on
    return _is_within(module.__name__, home.module) and name == home.qualified


def _is_within(module: str, home: str) -> bool:
    return module == home or module.startswith(f"{home}.")


def _is_equivalent(found: object, home: _Home) -> bool:
    other = _EQUIVALENT.get(home)
    if other is None:
        return False
    known = sys.modules.get(other[0])
    return known is not None and found is vars(known).get(other[1]) and _is_defined_at(found, _Home(*other))


def name_of(found: Any) -> str:
    """Where a function is from: of a wrapper, its own code, not what it says it wraps."""
    found = found.func if isinstance(found, functools.partial) else found
    found = getattr(found, "__func__", found)
    code = getattr(found, "__code__", None)
    if code is None:
        return f"a {type(found).__module__}.{type(found).__qualname__}"
    return f"{found.__globals__.get('__name__', '?')}.{getattr(code, 'co_qualname', code.co_name)}"


def _mode_reason() -> str | None:
    """A mode that may watch or change operations, and would see others here than in PEFT's forward."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
        cls = type(mode)
        if (cls.__module__, cls.__qualname__) not in HARMLESS_MODES:
            return f"{cls.__module__}.{cls.__qualname__} is active, which sees every operation"
    return None


def bypass_reason(names: Sequence[str], parts: Sequence[nn.Module | None]) -> str | None:
    """Other tools watch or replace the calls of inner modules; a fused forward would skip them."""
    for part in parts:
        if part is None:
            continue
        state = part.__dict__
        if "forward" in state and not is_own(state["forward"], part) and not _moves_inputs_alone(part):
            return f"{names[parts.index(part)]} has a forward of its own, set by another tool{_sharded_note(part)}"
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
        ):
            return hooks_reason(names[parts.index(part)], part)
    return None


def guard_forwards(parts: Iterable[nn.Module]) -> None:
    """For torch.compile, before `bypass_reason`: of a module's `__dict__` Dynamo guards what is there, and not what is
    missing, of an attribute both."""
    for part in parts:
        getattr(part, "forward", None)


def is_own(bound: Any, part: nn.Module) -> bool:
    """Whether a forward on an instance is that of its class, as `kernelize` leaves it where there is no kernel."""
    # Not `getattr` with a default, which Dynamo of torch 2.11 always gives.
    return isinstance(bound, types.MethodType) and bound.__func__ is type(part).forward and bound.__self__ is part


def _moves_inputs_alone(part: nn.Module) -> bool:
    """Whether all that comes before the class's own forward is accelerate's hook of a `device_map` that offloads
    nothing: it moves inputs to the weights' device, and where they are not there PEFT's forward runs."""
    hooks = sys.modules.get("accelerate.hooks")
    hook, own = part.__dict__.get("_hf_hook"), part.__dict__.get("_old_forward")
    if hooks is None or type(hook) is not hooks.AlignDevicesHook or hook.offload or hook.no_grad:
        return False
    is_hooked = getattr(part.__dict__["forward"], "__wrapped__", None) is own  # and nobody else's forward
    return is_hooked and getattr(own, "__func__", None) is type(part).forward


def hooks_reason(name: str, part: nn.Module) -> str | None:
    """Whether somebody watches the calls of a module."""
    state = part.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return f"{name} has hooks{_sharded_note(part)}"
    return None


def _sharded_note(part: nn.Module) -> str:
    """Said beside the reason that a module's calls are changed: tensor and expert parallelism do so where they shard
    it."""
    distributed = sys.modules.get("torch.distributed.tensor")
    tensors = () if distributed is None else part._parameters.values()
    return " (its weights are sharded, DTensors)" if any([isinstance(t, distributed.DTensor) for t in tensors]) else ""
