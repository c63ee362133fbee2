"""The public function of embeddings; every input error is raised here, as `functional` does it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd.direct_apply import apply_of
from ..autograd.embedding import LoraEmbeddingFunction, forward_embedding
from ..backends import native_embedding, select
from ..call_context import new_tuple, without_autocast
from ..specs import EmbeddingOperands, EmbeddingSpec
from .checks import check_number, check_tensor, shown

ID_DTYPES = (torch.int64, torch.int32)


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    magnitude: Tensor | None = None,
    embed_scale: float | Tensor = 1.0,
    padding_idx: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """LoRA on an embedding, or DoRA with a magnitude; differentiable once in every float tensor but
    `embed_scale`:

        y = e · g ∘ (W[i] + s · A[:, i]ᵀ Bᵀ)

    where g = 1 for LoRA and g = magnitude / ‖W + s·(B·A)ᵀ‖ by column for DoRA: a norm over the whole
    vocabulary for each hidden dimension, detached and computed anew at each call, in one pass over
    the table without a V×H intermediate.

    ids of any shape, int32 or int64; weight [V, H], lora_a [R, V], lora_b [H, R], magnitude [H] in
    float32, bfloat16, float16 or float64, each in a dtype of its own. `embed_scale` e is a number, or
    a tensor of one element, cast to the dtype of what it multiplies. The result is
    [*ids.shape, H] in weight's dtype, also under autocast. Gradients come in each tensor's own dtype
    and are dense and deterministic; those of A and W are zero at `padding_idx`, that of B is not.
    The reference backend multiplies the adapter in its own dtype, the native ops to 16 bits; Triton
    rounds it to weight's and sums in float32. Saved for backward: ids, A[:, i]ᵀ, norm, mag_norm_scale and the
    operands.

    Raises ValueError or TypeError naming the tensor, what was seen and what was expected. An id
    outside the vocabulary gives torch's own IndexError on the CPU and, as torch does, a device-side
    assertion on a GPU.
    Source: Hu et al. 2021, arXiv:2106.09685, equation 3; Liu et al. 2024, arXiv:2402.09353.
    """
    scale, number = (embed_scale, 1.0) if isinstance(embed_scale, Tensor) else (None, embed_scale)
    table = EmbeddingOperands(weight, lora_a, lora_b, magnitude, scale)
    for name, value in (("scaling", scaling), ("embed_scale", number)):
        check_number(name, value)
    _check_operands(table)
    _check_ids(ids, table)
    if padding_idx is not None:
        rows = weight.shape[0]
        if not isinstance(padding_idx, int) or not -rows <= padding_idx < rows:
            raise ValueError(f"padding_idx: {shown(padding_idx)}, expected one of the {rows} rows of weight")
        padding_idx %= rows
    select.check_backend(backend, weight.device)
    if backend == select.NATIVE and not native_embedding.fits(table):
        raise ValueError("backend: 'native' takes contiguous half-precision tables on a GPU, H a multiple of 8")
    return compute_embedding(ids, table, float(scaling), padding_idx, float(number), backend)


_apply_to = apply_of(LoraEmbeddingFunction)


def compute_embedding(
    ids: Tensor,
    table: EmbeddingOperands,
    scaling: float | Tensor,
    padding_idx: int | None,
    scale: float,
    backend: str | None = None,
) -> Tensor:
    """`lora_embedding` on operands that are known to be right; a scaling that is a tensor is multiplied into B."""
    if isinstance(scaling, Tensor):
        table, scaling = table._replace(lora_b=table.lora_b * scaling.clone()), 1.0
    if backend is None:
        backend = select.choose_embedding(table, ids.numel())
    spec = new_tuple(EmbeddingSpec, (scaling, padding_idx, scale, backend))
    if torch.is_grad_enabled():
        return _apply_to(ids)(spec, ids, *table)
    with without_autocast(table.weight):
        return forward_embedding(ids, table, spec, keep=False)[0]


def _check_operands(table: EmbeddingOperands) -> None:
    for name, tensor in zip(EmbeddingOperands._fields, table):
        if tensor is None and name in ("magnitude", "scale"):
            continue
        name = "embed_scale" if name == "scale" else name
        check_tensor(name, tensor)
        if tensor.device != table.weight.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {table.weight.device} as weight is")
    weight, lora_a, lora_b, magnitude, scale = table
    if weight.dim() != 2:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected [V, H]")
    v, h = weight.shape
    if lora_a.dim() != 2 or lora_a.shape[1] != v or lora_a.shape[0] == 0:
        raise ValueError(f"lora_a: shape {tuple(lora_a.shape)}, expected [R, {v}] with a rank of at least 1")
    if lora_b.shape != (h, lora_a.shape[0]):
        raise ValueError(f"lora_b: shape {tuple(lora_b.shape)}, expected [{h}, {lora_a.shape[0]}]")
    if magnitude is not None and magnitude.shape != (h,):
        raise ValueError(f"magnitude: shape {tuple(magnitude.shape)}, expected [{h}]")
    if scale is not None and scale.numel() != 1:
        raise ValueError(f"embed_scale: shape {tuple(scale.shape)}, expected one element")


def _check_ids(ids: Tensor, table: EmbeddingOperands) -> None:
    check_tensor("ids", ids, ID_DTYPES)
    if ids.device != table.weight.device:
        raise ValueError(f"ids: on {ids.device}, expected {table.weight.device} as weight is")
