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

from typing import Optional

import torch
from torch import Tensor

from ..backends import select
from ..backends.reference import embedding as reference_embedding
from ..call_context import without_autocast
from ..specs import Table, TableSpec
from .once_differentiable import once_differentiable


def forward_table(ids: Tensor, table: Table, spec: TableSpec, keep: bool):
    """(y, rows or None, norm or None, gain or None)."""
    norm = gain = None
    if table.magnitude is not None:
        norm, gain = select.column_gain(spec.backend, table, spec.scaling)
    y, rows = select.get_embedding(spec.backend).gather_add(ids, table, spec, gain, keep)
    return y, rows, norm, gain


class LoraEmbeddingFunction(torch.autograd.Function):
    """Apply as `(spec, ids, *table)`; gives [*ids.shape, H] in the table's dtype. Double backward
    raises. Autocast is off inside: the result's dtype does not depend on it."""

    @staticmethod
    def forward(ctx, spec: TableSpec, ids: Tensor, *tensors: Optional[Tensor]):
        table = Table(*tensors)
        needs = Table(*ctx.needs_input_grad[2:])
        with without_autocast(table.weight):
            y, *kept = forward_table(ids, table, spec, needs.lora_b or needs.magnitude)
        ctx.spec = spec
        ctx.save_for_backward(ids, *kept, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        ids, rows, norm, gain, *tensors = ctx.saved_tensors
        spec, table, needs = ctx.spec, Table(*tensors), Table(*ctx.needs_input_grad[2:])
        dw = None
        with without_autocast(dy):
            da, db, dm = _gradients(dy, ids, rows, table, spec, gain, norm, needs)
            if needs.weight:
                dw = _weight_grad(dy.reshape(-1, dy.shape[-1]), ids.reshape(-1), table, spec, gain)
        return None, None, dw, da, db, dm, None


def _gradients(dy, ids, rows, table: Table, spec: TableSpec, gain, norm, needs: Table):
    """(dA, dB, dm), None where `needs` has False."""
    kernels = select.get_embedding(spec.backend)
    if spec.backend == select.CUDA:
        return kernels.gradients(dy, ids, rows, table, spec, gain, norm, needs)
    ids, dy = ids.reshape(-1), dy.reshape(-1, dy.shape[-1]).contiguous()
    drows, db, dm = kernels.gather_backward(dy, ids, rows, table, spec, gain, norm, needs)
    da = kernels.scatter_rows(drows, ids, table.lora_a, spec.padding_idx) if needs.lora_a else None
    return da, db, dm


def _weight_grad(dy: Tensor, ids: Tensor, table: Table, spec: TableSpec, gain: Optional[Tensor]) -> Tensor:
    weight = table.weight
    if gain is not None:
        dy = (dy * gain).to(weight.dtype)
    dy = dy * reference_embedding.own_scale(table, spec, weight.dtype)
    return reference_embedding.scatter_table(dy, ids, weight.shape[0], spec.padding_idx)
