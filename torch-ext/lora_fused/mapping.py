"""Which PEFT classes get which layer, for `kernelize`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import layers
from .backends import native
from .environment import versions
from .peft import (
    embedding as peft_embedding,
    experts as peft_experts,
    gated_mlp as peft_gated_mlp,
    linear as peft_linear,
    replaced,
)
from .specs import Fallback

# As `kernels` names them. Native ops know no tensor of another device.
_DEVICES = ("cpu", "cuda") if native.available else ("cpu", "rocm", "xpu")
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


def layer_mapping() -> dict:
    """Our layers by name and device, as `kernels` takes them."""
    of_peft = layers.LoraLinear, layers.LoraLinearOfX, layers.LoraEmbedding, layers.LoraExperts
    mapped = *of_peft, *layers.GATED_MLP_BY_INPUT.values()
    return {layer.__name__: {device: LoadedLayer(layer) for device in _DEVICES} for layer in mapped}


class _Mark:
    """The condition that a class is marked with: whether a module of it gets our forward. Never once it is `over`, as
    another registration, of another build too, may have come in between and put it back. before: what the class said
    until then."""

    def __init__(self, condition: Callable[[nn.Module], bool], before: dict[str, Any]):
        self.condition, self.before, self.over = condition, before, False

    def __call__(self, module: nn.Module) -> bool:
        return not self.over and self.condition(module)


def _attributes(cls: type) -> dict[str, Any]:
    return {name: cls.__dict__[name] for name in _CLASS_ATTRIBUTES if name in cls.__dict__}


def _is_unmarked(cls: type) -> bool:
    """A mark that is over is none: somebody may have put a class's attributes back that they had seen before."""
    return "kernel_layer_name" not in cls.__dict__ or getattr(_mark_in(cls.__dict__), "over", False)


def _mark_in(attributes: Mapping[str, Any]) -> Any:
    return getattr(attributes.get("kernel_condition"), "__func__", None)  # a static method


class Marks:
    """Classes that `kernelize` is told of, and how."""

    def __init__(self):
        self.marked: dict[type, _Mark] = {}

    def mark(self, cls: type, layer_name: str, condition: Callable[[nn.Module], bool]) -> None:
        from kernels import replace_kernel_forward_from_hub

        if cls in self.marked:
            self.marked[cls].over = True
        mark = self.marked[cls] = _Mark(condition, _attributes(cls))
        replace_kernel_forward_from_hub(cls, layer_name, condition=mark)

    def mark_all(self) -> None:
        """PEFT's linears, embedding and wrappers of parameters, and the roots of models, at which their gated MLPs are
        looked for. All of them are found before the first is marked, so that an error leaves none."""
        marked: list[tuple[type, type[nn.Module], Callable[[nn.Module], bool]]] = [
            (cls, layers.LoraLinearOfX if kind.only_x else layers.LoraLinear, peft_linear.is_lora_linear)
            for cls, kind in peft_linear.linear_kinds().items()
        ]
        marked.append((peft_embedding.embedding_class(), layers.LoraEmbedding, peft_embedding.is_plain_embedding))
        marked.append((peft_experts.wrapper_class(), layers.LoraExperts, peft_experts.is_param_wrapper))
        roots = peft_linear.root_classes()
        for cls, layer, serves in marked:
            self.mark(cls, layer.__name__, functools.partial(_is_free, layer, serves))
        for root in roots:
            self.mark(root, layers.LoraGatedMLP.__name__, self.find_gated_mlps)

    def find_gated_mlps(self, root: nn.Module) -> bool:
        """Marks the classes of the adapted gated MLPs in `root`, which `kernelize` visits after it.
        Not for `root` itself: always False."""
        peft_linear.note_names(root)
        for module in root.modules():
            if _is_unmarked(type(module)) and peft_gated_mlp.is_adapted(module):
                self.mark_gated_mlp(module)
        return False

    def mark_gated_mlp(self, module: nn.Module) -> None:
        """Marks the class of an adapted gated MLP, if its input is called as one of our layers calls it."""
        cls, structure = type(module), peft_gated_mlp.structure_of(module)
        if isinstance(structure, Fallback):
            return
        layer = layers.GATED_MLP_BY_INPUT.get(structure.input)
        if layer is not None and not structure.optional:
            adapted = functools.partial(_is_adapted_instance, cls)
            self.mark(cls, layer.__name__, functools.partial(_is_free, layer, adapted))

    def restore(self) -> None:
        """Classes say what they did before, but for those that somebody else has marked since."""
        for cls, mark in self.marked.items():
            mark.over = True
            if _mark_in(_attributes(cls)) is not mark:
                continue
            attributes = mark.before
            while getattr(_mark_in(attributes), "over", False):
                attributes = _mark_in(attributes).before
            for name in _CLASS_ATTRIBUTES:
                if name in attributes:
                    setattr(cls, name, attributes[name])
                elif name in cls.__dict__:
                    delattr(cls, name)
        self.marked.clear()


def _is_free(layer: type[nn.Module], serves: Callable[[nn.Module], bool], module: nn.Module) -> bool:
    """Whether `layer` may take a module's forward: nobody's is lost. Another tool (accelerate's hooks,
    X-LoRA) keeps its own, which `kernelize` would drop; a forward of the layer's name is an earlier one
    of this kernel's."""
    bound = module.__dict__.get("forward")
    name = getattr(getattr(bound, "__func__", None), "__qualname__", None)
    free = bound is None or replaced.is_own(bound, module) or name == layer.forward.__qualname__
    return free and serves(module)


def _is_adapted_instance(cls: type, module: nn.Module) -> bool:
    return type(module) is cls and peft_gated_mlp.is_adapted(module)


_registered = Marks()


def register_peft_layers() -> None:
    """Map PEFT's LoRA classes, and MLPs made of them, to this kernel's layers for every later
    `kernelize`, globally; `unregister_peft_layers` undoes it.

    Global, because `kernelize` run again without a mapping gives layers their old forward back.
    Raises ImportError, and maps nothing, where peft, kernels or torch is missing or too old.
    """
    versions.check()
    from kernels import register_kernel_mapping

    _registered.mark_all()
    register_kernel_mapping(layer_mapping())


def unregister_peft_layers() -> None:
    """Undo `register_peft_layers`: a later `kernelize` passes PEFT's classes and the MLPs made of them over, as before.

    Models that were kernelized keep our forwards until `restore(model)`. Does nothing where nothing was registered.
    """
    _registered.restore()


@contextlib.contextmanager
def use_peft_layers() -> Iterator[None]:
    """`register_peft_layers` for the duration of a with-block; models kernelized inside keep their
    layers afterwards. Raises ImportError as that does."""
    versions.check()
    from kernels import use_kernel_mapping

    marks = Marks()
    marks.mark_all()
    try:
        with use_kernel_mapping(layer_mapping()):
            yield
    finally:
        marks.restore()
