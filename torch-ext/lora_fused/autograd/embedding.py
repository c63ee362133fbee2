"""One autograd Function for an embedding with LoRA or DoRA.

Forward, for tokens i:   y = e·g∘(W[i] + s·A[:, i]ᵀ Bᵀ)      g = m / ‖W + s·(B·A)ᵀ‖ by column
Backward, dy' = g∘dy:    dA[:, v] = Σ over tokens of v of s·e·(dy' B)    dB = s·e·dy'ᵀ A[:, i]ᵀ
                         dm = Σ dy∘y / (g·norm)                          dW[v] = Σ e·dy'

g is 1 for LoRA; the norm is detached and computed at every forward, since every optimizer step
changes it. padding_idx gets no gradient in dA and dW; dB and dm have its tokens' part. Saved for
backward: ids, A[:, i]ᵀ [M, R] where B is trained, the norm and g [H] and the operands themselves; W[i]
is gathered again for dm. g is exactly 1 where m and the norm differ by the norm's rounding alone, so DoRA
at initialisation changes nothing. (Hu et al. 2021, arXiv:2106.09685, equation 3; Liu et al. 2024,
arXiv:2402.09353, equations 5 and 11.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import select
from ..backends.reference import embedding as reference_embedding
from ..call_context import new_tuple, without_autocast
from ..specs import EmbeddingOperands, EmbeddingSpec
from .once_differentiable import once_differentiable


def forward_embedding(ids: Tensor, table: EmbeddingOperands, spec: EmbeddingSpec, keep: bool):
    """(y, rows or None, norm or None, mag_norm_scale or None)."""
    norm = mag_norm_scale = None
    if table.magnitude is not None:
        norm, mag_norm_scale = select.column_norm_and_scale(spec.backend, table, spec.scaling)
    y, rows = select.get_embedding(spec.backend).gather_add(ids, table, spec, mag_norm_scale, keep)
    return y, rows, norm, mag_norm_scale


class LoraEmbeddingFunction(torch.autograd.Function):
    """Apply as `(spec, ids, *table)`; gives [*ids.shape, H] in the table's dtype. Double backward
    raises. Autocast is off inside: the result's dtype does not depend on it."""

    @staticmethod
    def forward(ctx, spec: EmbeddingSpec, ids: Tensor, *tensors: Tensor | None):
        table = new_tuple(EmbeddingOperands, tensors)
        needs = new_tuple(EmbeddingOperands, ctx.needs_input_grad[2:])
        with without_autocast(table.weight):
            y, *kept = forward_embedding(ids, table, spec, bool(needs.lora_b or needs.magnitude))
        ctx.spec = spec
        ctx.save_for_backward(ids, *kept, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        ids, rows, norm, mag_norm_scale, *tensors = ctx.saved_tensors
        spec, table = ctx.spec, new_tuple(EmbeddingOperands, tensors)
        needs = new_tuple(EmbeddingOperands, ctx.needs_input_grad[2:])
        dw = None
        with without_autocast(dy):
            da, db, dm = _gradients(dy, ids, rows, table, spec, mag_norm_scale, norm, needs)
            if needs.weight:
                dw = _weight_grad(dy.reshape(-1, dy.shape[-1]), ids.reshape(-1), table, spec, mag_norm_scale)
        return None, None, dw, da, db, dm, None


def _gradients(
    dy, ids, rows, table: EmbeddingOperands, spec: EmbeddingSpec, mag_norm_scale, norm, needs: EmbeddingOperands
):
    """(dA, dB, dm), None where `needs` has False."""
    kernels = select.get_embedding(spec.backend)
    if spec.backend == select.NATIVE:
        return kernels.gradients(dy, ids, rows, table, spec, mag_norm_scale, norm, needs)
    ids, dy = ids.reshape(-1), dy.reshape(-1, dy.shape[-1]).contiguous()
    drows, db, dm = kernels.gather_backward(dy, ids, rows, table, spec, mag_norm_scale, norm, needs)
    da = kernels.scatter_rows(drows, ids, table.lora_a, spec.padding_idx) if needs.lora_a else None
    return da, db, dm


def _weight_grad(
    dy: Tensor, ids: Tensor, table: EmbeddingOperands, spec: EmbeddingSpec, mag_norm_scale: Tensor | None
) -> Tensor:
    weight = table.weight
    if mag_norm_scale is not None:
        dy = (dy * mag_norm_scale).to(weight.dtype)
    dy = dy * reference_embedding.own_scale(table, spec, weight.dtype)
    return reference_embedding.scatter_table(dy, ids, weight.shape[0], spec.padding_idx)
