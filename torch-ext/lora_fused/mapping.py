"""Which PEFT classes get which layer, and what a kernelized model will do (`explain`)."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import warnings
from dataclasses import dataclass
from typing import Callable, Iterator, Optional, Sequence

import torch
from torch import nn

from . import backend, layers, mlp_state, peft_embedding, peft_state, siblings
from .autocast import autocast_dtype
from .autograd.native import takes

_DEVICES = ("cpu", "cuda")
BASE_CALLED = "base called"  # in place of a backend
_CLASS_ATTRIBUTES = ("kernel_layer_name", "kernel_condition")


@dataclass(frozen=True)
class LoadedLayer:
    """Stands where `kernels` expects a repository: a layer of this very module, loaded already.

    It pins what was loaded (from the Hub, LOCAL_KERNELS or a folder) and asks nobody again.
    """

    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        """The layer class."""
        return self.layer

    def __str__(self) -> str:
        return f"{self.layer.__module__}.{self.layer.__name__}"


def _mapping() -> dict:
    mapped = (layers.LoraLinear, layers.LoraLinearOfX, layers.LoraEmbedding, *layers.GATED_MLP_BY_INPUT.values())
    return {layer.__name__: {device: LoadedLayer(layer) for device in _DEVICES} for layer in mapped}


class _Marks:
    """Classes that `kernelize` is told of, and what they said before."""

    def __init__(self):
        self.before: dict[type, dict] = {}

    def mark(self, cls: type, layer_name: str, condition: Callable[[nn.Module], bool]) -> None:
        from kernels import replace_kernel_forward_from_hub

        self.before.setdefault(cls, {name: cls.__dict__[name] for name in _CLASS_ATTRIBUTES if name in cls.__dict__})
        replace_kernel_forward_from_hub(cls, layer_name, condition=condition)

    def mark_all(self) -> None:
        """PEFT's linears and embedding, and the roots of models, at which their gated MLPs are looked for."""
        for cls, kind in peft_state.linear_kinds().items():
            layer = layers.LoraLinearOfX if kind.only_x else layers.LoraLinear
            self.mark(cls, layer.__name__, functools.partial(_is_free, layer, peft_state.is_lora_linear))
        embedding = functools.partial(_is_free, layers.LoraEmbedding, peft_embedding.is_plain_embedding)
        self.mark(peft_embedding.embedding_class(), layers.LoraEmbedding.__name__, embedding)
        for root in peft_state.root_classes():
            self.mark(root, layers.LoraGatedMLP.__name__, self.find_gated_mlps)

    def find_gated_mlps(self, root: nn.Module) -> bool:
        """Marks the classes of the adapted gated MLPs in `root`, which `kernelize` visits after it.
        Not for `root` itself: always False."""
        peft_state.note_names(root)
        for module in root.modules():
            cls = type(module)
            if "kernel_layer_name" in cls.__dict__ or not mlp_state.is_adapted(module):
                continue
            structure = mlp_state.structure_of(module)
            layer = layers.GATED_MLP_BY_INPUT.get(structure.input)
            if layer is not None and not structure.optional:
                adapted = functools.partial(_is_adapted_instance, cls)
                self.mark(cls, layer.__name__, functools.partial(_is_free, layer, adapted))
        return False

    def restore(self) -> None:
        for cls, attributes in self.before.items():
            for name in _CLASS_ATTRIBUTES:
                delattr(cls, name)
            for name, value in attributes.items():
                setattr(cls, name, value)


def _is_free(layer: type[nn.Module], serves: Callable[[nn.Module], bool], module: nn.Module) -> bool:
    """Whether `layer` may take a module's forward: nobody's is lost. Another tool (accelerate's hooks,
    X-LoRA) keeps its own, which `kernelize` would drop; a forward of the layer's name is an earlier one
    of this kernel's."""
    bound = module.__dict__.get("forward")
    name = getattr(getattr(bound, "__func__", None), "__qualname__", None)
    free = bound is None or _is_original(module, bound) or name == layer.forward.__qualname__
    return free and serves(module)


def _is_adapted_instance(cls: type, module: nn.Module) -> bool:
    return type(module) is cls and mlp_state.is_adapted(module)


def register_peft_layers() -> None:
    """Map PEFT's LoRA classes, and MLPs made of them, to this kernel's layers for every later
    `kernelize`, globally.

    Global, because `kernelize` run again without a mapping gives layers their old forward back.
    Raises ImportError where peft or kernels is missing.
    """
    from kernels import register_kernel_mapping

    _Marks().mark_all()
    register_kernel_mapping(_mapping())


@contextlib.contextmanager
def use_peft_layers() -> Iterator[None]:
    """`register_peft_layers` for the duration of a with-block; models kernelized inside keep their
    layers afterwards."""
    from kernels import use_kernel_mapping

    marks = _Marks()
    marks.mark_all()
    try:
        with use_kernel_mapping(_mapping()):
            yield
    finally:
        marks.restore()


@dataclass(frozen=True)
class Row:
    """One LoRA module: `fused` with its `backend` and `group`, or PEFT's forward and the `reason`. Where
    the backend is "base called" the delta is fused and the base module's own forward runs, for the
    `reason`."""

    module: str
    layer: str
    fused: bool
    backend: Optional[str]
    group: Optional[str]
    reason: Optional[str]


class Explanation(Sequence[Row]):
    """The rows of `explain`, which print as a table."""

    def __init__(self, rows: Sequence[Row]):
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index]

    def __str__(self) -> str:
        cells = [("module", "runs", "backend", "group", "reason")]
        for row in self._rows:
            runs = f"{row.layer}, fused" if row.fused else "PEFT's own forward"
            cells.append((row.module, runs, row.backend or "-", row.group or "-", row.reason or ""))
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells]
        fused = sum(row.fused for row in self._rows)
        return "\n".join([f"{fused} of {len(self)} LoRA modules fused", *lines])


def explain(model: nn.Module, rows: int = 8192) -> Explanation:
    """What every LoRA module of `model` does at its next call, by its state now.

    The backend is that of a call with `rows` rows (tokens of all sequences together), in the base
    weight's dtype, or autocast's inside an autocast block. Warns where nothing is fused. Raises
    TypeError if `model` is no module or `rows` no number of rows, ValueError if that is negative.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(rows, int) or isinstance(rows, bool):
        raise TypeError(f"rows: {rows!r}, expected an int, the number of rows of a call")
    if rows < 0:
        raise ValueError(f"rows: {rows}, expected at least 0")
    names = {module: name for name, module in model.named_modules()}
    in_mlp = _gated_mlps(names)
    table = [
        _explain_module(name, module, rows, names, in_mlp.get(module))
        for module, name in names.items()
        if peft_state.is_lora_module(module)
    ]
    wrapped = [name for module, name in names.items() if _is_fully_sharded(module)]
    table = [_when_gathered(row, wrapped) for row in table]
    if not table:
        warnings.warn("lora_fused: the model has no PEFT LoRA modules, nothing is fused", stacklevel=2)
    elif not wrapped and not any(row.fused for row in table):
        warnings.warn(
            f"lora_fused: none of the {len(table)} LoRA modules is fused; {table[0].module}: {table[0].reason}",
            stacklevel=2,
        )
    return Explanation(table)


def _is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the module itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _when_gathered(row: Row, wrapped: Sequence[str]) -> Row:
    """What is sharded between calls may be whole in them: then the call is what decides."""
    inside = any(name == "" or row.module == name or row.module.startswith(f"{name}.") for name in wrapped)
    if not inside or "is a DTensor" not in (row.reason or ""):
        return row
    return _because(row, f"{row.reason} between calls; fully_shard gathers it for a call, whose own state decides")


def _gated_mlps(names: dict[nn.Module, str]) -> dict[nn.Module, str]:
    """The name of the gated MLP that computes a projection, for all that one computes."""
    found = {}
    for module, name in names.items():
        forward = getattr(module.__dict__.get("forward"), "__func__", None)
        if not any(forward is layer.forward for layer in layers.GATED_MLP_BY_INPUT.values()):
            continue
        parts = mlp_state.projections_of(module, mlp_state.structure_of(module))
        state = peft_state.read_linear(next(part for part in parts if peft_state.is_lora_linear(part)))
        if isinstance(state, str):
            continue
        example = _example(state)
        if not isinstance(mlp_state.read_mlp(module, example, layers.LoraLinear, check_features=False), str):
            found.update({part: name for part in parts})
    return found


def _explain_module(name: str, module: nn.Module, rows: int, names: dict[nn.Module, str], mlp: Optional[str]) -> Row:
    unfused = Row(name, type(module).__name__, fused=False, backend=None, group=None, reason=None)
    if peft_embedding.is_plain_embedding(module):
        return _explain_embedding(name, module, rows, unfused)
    if not peft_state.is_lora_linear(module):
        kind = f"{type(module).__module__}.{type(module).__name__}"
        return _because(unfused, f"no fused layer for {kind}")
    kind = peft_state.linear_kinds()[type(module)]
    layer = layers.LoraLinearOfX if kind.only_x else layers.LoraLinear
    reason = _unmapped_reason(module, layer)
    if reason:
        return _because(unfused, reason)
    state = peft_state.read_linear(module)
    if isinstance(state, str):
        return _because(unfused, state)
    example = _example(state)
    reason = peft_state.call_reason(state, example, (), {}) or siblings.small_reason(module, example, rows)
    if reason:
        return _because(unfused, reason)
    called = peft_state.called_reason(state, example, rows)
    if called:
        reason = peft_state.delta_reason(state.projection)
        if reason:
            return _because(unfused, f"{reason} ({called})")
        return Row(name, layer.__name__, fused=True, backend=BASE_CALLED, group="single", reason=called)
    lora_dtype = autocast_dtype(example)
    dtype, work = lora_dtype or example.dtype, rows * math.prod(state.projection.shape)
    taken = takes((state.projection,), dtype, lora_dtype, example.is_cuda)
    chosen = backend.choose(example.device, dtype, taken, lambda: work)
    if mlp is not None:
        return Row(name, layers.LoraGatedMLP.__name__, fused=True, backend=chosen, group=mlp, reason=None)
    return Row(name, layer.__name__, fused=True, backend=chosen, group=_group_name(module, names), reason=None)


def _example(state: peft_state.Adapted) -> torch.Tensor:
    """An x without rows that fits a projection: in the dtype of its base, the adapter's where that is unknown."""
    operands, base = state.projection.operands, state.base
    known = operands.weight if operands.weight is not None else operands.lora_a
    dtype = known.dtype if base.quantized is None else base.compute or base.quantized.dtype
    features = operands.lora_a.shape[1] if base.shape is None else base.shape[1]
    return torch.empty((0, features), dtype=dtype, device=known.device)


def _group_name(module: nn.Module, names: dict[nn.Module, str]) -> str:
    """The last parts of the siblings' names; groups are seen at a model's second pass."""
    members = siblings.group_of(module)
    return "+".join(names.get(member, "?").rpartition(".")[2] for member in members) or "single"


def _is_original(module: nn.Module, bound) -> bool:
    return getattr(bound, "__func__", None) is type(module).forward


def _because(row: Row, reason: str) -> Row:
    return Row(row.module, row.layer, row.fused, row.backend, row.group, reason)


def _unmapped_reason(module: nn.Module, layer: type[nn.Module]) -> Optional[str]:
    """Why the layer's forward is not the one that a module runs; None where it is."""
    bound = module.__dict__.get("forward")
    if getattr(bound, "__func__", None) is layer.forward:
        return None
    if bound is not None and not _is_original(module, bound):
        return "another tool set its forward"
    return "not kernelized: call register_peft_layers(), then kernelize(model)"


def _explain_embedding(name: str, module: nn.Module, rows: int, unfused: Row) -> Row:
    layer = layers.LoraEmbedding
    reason = _unmapped_reason(module, layer)
    if reason:
        return _because(unfused, reason)
    state = peft_embedding.read_embedding(module)
    if isinstance(state, str):
        return _because(unfused, state)
    example = torch.empty((0,), dtype=torch.int64, device=state.table.weight.device)
    reason = peft_embedding.embedding_call_reason(state, example, (), {})
    if reason:
        return _because(unfused, reason)
    chosen = backend.choose_embedding(state.table, rows)
    return Row(name, layer.__name__, fused=True, backend=chosen, group="single", reason=None)
