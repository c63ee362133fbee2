"""What PEFT's embedding computes now: the embedding's half of `peft.linear`, and with it all that knows
PEFT's attribute names. Read anew at every call, so nothing here can go stale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..backends import native, select
from ..call_context import autocast_dtype, new_tuple
from ..specs import EmbeddingOperands, Fallback
from . import replaced
from .adapters import only_active
from .base_layer import tensor_of, unfit_reason, unread
from .dora import EMBEDDING, forwards as dora_forwards, read_dora
from .scaling import read_scaling

_ID_DTYPES = (torch.int64, torch.int32)
# Its forward puts a second table in place of some ids.
_SCALED_BUT_DIFFERENT = ("T5Gemma2TextScaledWordEmbedding",)


class AdaptedTable(NamedTuple):
    """An embedding ready to compute; `scale` is the embedding's own where it is a number."""

    table: EmbeddingOperands
    scaling: float | Tensor
    padding_idx: int | None
    scale: float


def embedding_class() -> type[nn.Module]:
    """PEFT's LoRA embedding, the class that `LoraEmbedding` takes the forward of."""
    from peft.tuners.lora import Embedding

    return Embedding


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether a module is PEFT's LoRA embedding itself and no subclass, which may compute otherwise."""
    return type(module) is embedding_class()


def read_embedding(module: nn.Module) -> AdaptedTable | Fallback:
    """The embedding that a `peft.tuners.lora.Embedding` computes now, or why it is PEFT's to compute. What all
    embeddings have in common `replaced.embedding_reason` looks at."""
    cls = type(module)
    reason = replaced.forward_reason(cls)
    if reason:
        return Fallback(reason)
    if module.disable_adapters:
        return Fallback("adapters are disabled")
    if module.merged:
        return Fallback("the adapter is merged into the base weight")
    # Straight from the registries: nn.Module.__getattr__ would cost more than the checks do.
    modules = module._modules
    adapters = modules["lora_embedding_A"]._parameters
    name = only_active(module.active_adapters, adapters)
    if isinstance(name, Fallback):
        return name
    try:
        return _read_adapter(module, name)
    except (KeyError, RuntimeError) as error:
        return unread(error)


def _read_adapter(module: nn.Module, name: str) -> AdaptedTable | Fallback:
    modules = module._modules
    base = modules["base_layer"]
    magnitude = None
    if name in module.lora_variant:
        dora = read_dora(module, name, EMBEDDING)
        if isinstance(dora, Fallback):
            return dora
        reason = replaced.bypass_reason(("lora_magnitude_vector",), (dora,))
        if reason:
            return Fallback(reason)
        magnitude = tensor_of(dora, "weight")
    if name in getattr(module, "input_fns", ()) or name in getattr(module, "output_fns", ()):  # not before PEFT 0.19
        return Fallback("the embedding is sharded by tensor parallelism")
    reason = _base_reason(base) or replaced.bypass_reason(("base_layer",), (base,))
    if reason is None and type(base) is not nn.Embedding:
        reason = replaced.module_reason(type(base))
    if reason:
        return Fallback(reason)
    if _has_any_global_hook():
        return Fallback("hooks on all modules")
    own = 1.0 if type(base) is nn.Embedding else base.embed_scale
    scale, number = (own, 1.0) if isinstance(own, Tensor) else (None, float(own))
    a, b = modules["lora_embedding_A"]._parameters[name], modules["lora_embedding_B"]._parameters[name]
    table = new_tuple(EmbeddingOperands, (tensor_of(base, "weight"), a, b, magnitude, scale))
    reason = _table_reason(table, (base.num_embeddings, base.embedding_dim))
    if reason:
        return Fallback(reason)
    scaling = module.scaling[name]
    if type(scaling) is not float:
        scaling = read_scaling(scaling, b)
        if isinstance(scaling, Fallback):
            return scaling
    return new_tuple(AdaptedTable, (table, scaling, base.padding_idx, number))


def forwards() -> tuple[type, ...]:
    """The classes whose forwards run in PEFT's LoRA embedding."""
    return embedding_class(), *dora_forwards(EMBEDDING)


def _base_reason(base: nn.Module) -> str | None:
    cls: type = type(base)
    if cls is nn.Embedding:
        # PEFT multiplies its delta by any attribute of this name, also where the base ignores it.
        if "embed_scale" in base.__dict__ or "embed_scale" in base._buffers:
            return "embed_scale on a plain Embedding"
    elif not _is_scaled(cls):
        return f"unknown base layer {cls.__name__} of {cls.__module__}"
    elif not isinstance(base.embed_scale, (int, float)) and getattr(base.embed_scale, "numel", lambda: 0)() != 1:
        return "embed_scale is neither a number nor a tensor of one element"
    if base.max_norm is not None:
        return "max_norm renormalises rows in place at every call"
    if base.scale_grad_by_freq:
        return "scale_grad_by_freq"
    return "sparse gradients" if base.sparse else None


def _is_scaled(cls: type) -> bool:
    """The embeddings of transformers whose forward is nn.Embedding's times `embed_scale`."""
    known = cls.__module__.startswith("transformers.models.") and cls.__name__.endswith("ScaledWordEmbedding")
    return known and cls.__name__ not in _SCALED_BUT_DIFFERENT and issubclass(cls, nn.Embedding)


def _table_reason(table: EmbeddingOperands, shape: tuple[int, int]) -> str | None:
    device, (rows, columns) = table.weight.device, shape
    for name, tensor in zip(EmbeddingOperands._fields, table):
        if tensor is None:
            continue
        reason = unfit_reason(name, tensor, device)
        if reason:
            return reason
    if table.weight.shape != shape:
        return f"weight has shape {tuple(table.weight.shape)} (sharded or replaced)"
    if table.lora_a.shape[1] != rows or table.lora_b.shape != (columns, table.lora_a.shape[0]):
        return f"adapter of shapes {tuple(table.lora_a.shape)} and {tuple(table.lora_b.shape)} on a table of {shape}"
    if table.magnitude is not None and table.magnitude.shape != (columns,):
        return f"magnitude has shape {tuple(table.magnitude.shape)}, which does not fit"
    return None


def embedding_call_reason(adapted: AdaptedTable, ids: object, args: tuple, kwargs: dict) -> str | None:
    """Why this call, with these ids, is PEFT's own to compute; None where it is fused."""
    if args or kwargs:
        given = ", ".join(kwargs) or "positional arguments"
        return f"the call passes {given}"
    table = adapted.table
    if type(ids) is not Tensor or ids.dtype not in _ID_DTYPES:
        return f"ids are a {type(ids).__name__} of {getattr(ids, 'dtype', None)}"
    if ids.layout is not torch.strided or ids.is_nested:
        return f"ids are {'nested' if ids.is_nested else ids.layout}"
    if ids.device != table.weight.device:
        return f"ids are on {ids.device}, the base weight on {table.weight.device}"
    if native.may_be_old:
        reason = select.old_gpu_reason(ids, *(tensor.dtype for tensor in table if tensor is not None))
        if reason:
            return reason
    if autocast_dtype(ids) is not None:
        double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in table)
        return "autocast with float64" if double else None
    if table.lora_a.dtype != table.lora_b.dtype:
        return "the adapter's two dtypes differ, without autocast"
    return None
