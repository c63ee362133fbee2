"""The embedding's formula and its backward in plain PyTorch: the oracle, and the path of CPU tensors.

    y = e · g ∘ (W[i] + s · A[:, i]ᵀ Bᵀ)        g = m / ‖W + s·(B·A)ᵀ‖ by column, 1 for plain LoRA

Shapes: ids of any shape with M elements, weight [V, H], lora_a [R, V], lora_b [H, R], mag_norm_scale and
norm [H], rows A[:, i]ᵀ [M, R]. The base is read in its own dtype, the adapter multiplied in its own, float16
in float32;
e is cast to each one's dtype where it is a tensor, as the modules that hold one do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...specs import EmbeddingOperands, EmbeddingSpec

NORM_CHUNK = 8192  # rows of the table that one step of the norm expands
_sum_by_id = torch.ops.aten.embedding_dense_backward.default  # an overload that is named need not be looked for


def column_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + s·(B·A)ᵀ‖ by column, [H] in at least float32, one chunk of the vocabulary at a time."""
    wide = torch.promote_types(torch.promote_types(weight.dtype, lora_a.dtype), torch.float32)
    up = lora_b.to(wide).t() * scaling

    def squares(start: int) -> Tensor:
        stop = start + NORM_CHUNK
        merged = torch.addmm(weight[start:stop].to(wide), lora_a[:, start:stop].to(wide).t(), up)
        return merged.square_().sum(0)

    total = squares(0)
    for start in range(NORM_CHUNK, weight.shape[0], NORM_CHUNK):
        total += squares(start)
    return total.sqrt_()


def gather_add(
    ids: Tensor, table: EmbeddingOperands, spec: EmbeddingSpec, mag_norm_scale: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(y [*ids.shape, H] in the table's dtype, rows [M, R] in A's dtype if `keep`)."""
    base = torch.nn.functional.embedding(ids, table.weight)
    rows = table.lora_a.index_select(1, ids.reshape(-1)).t()
    base = _scaled(base, table, spec, base.dtype)
    delta = _scaled(_product(rows, table.lora_b.t()).mul_(spec.scaling), table, spec, table.lora_b.dtype)
    delta = delta.view(base.shape)
    y = base + delta
    if mag_norm_scale is not None:
        y = y * mag_norm_scale
    return y.to(table.weight.dtype), rows if keep else None


def gather_backward(
    dy: Tensor,
    ids: Tensor,
    rows: Tensor | None,
    table: EmbeddingOperands,
    spec: EmbeddingSpec,
    mag_norm_scale: Tensor | None,
    norm: Tensor | None,
    needs: EmbeddingOperands,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(drows [M, R], dB [H, R], dm [H]) for dy [M, H] and flat ids [M], None where `needs` has False:

    drows = s·e·(g∘dy) B        dB = s·e·(g∘dy)ᵀ rows        dm = Σ dy ∘ e·(W[i] + s·rows Bᵀ) / norm
    """
    drows = db = dm = None
    gained = dy if mag_norm_scale is None else dy * mag_norm_scale
    if needs.lora_a:
        drows = _scaled(_product(gained, table.lora_b).mul_(spec.scaling), table, spec, table.lora_b.dtype)
    if needs.lora_b:
        db = _product(gained.t(), rows).mul_(spec.scaling)
        db = _scaled(db, table, spec, table.lora_b.dtype).to(table.lora_b.dtype)
    if needs.magnitude:
        wide = torch.promote_types(dy.dtype, norm.dtype)
        base = _scaled(torch.nn.functional.embedding(ids, table.weight), table, spec, table.weight.dtype)
        delta = _scaled(_product(rows, table.lora_b.t()).mul_(spec.scaling), table, spec, table.lora_b.dtype)
        dm = ((base + delta).to(wide) * dy).sum(0).div_(norm).to(table.magnitude.dtype)
    return drows, db, dm


def scatter_rows(drows: Tensor, ids: Tensor, lora_a: Tensor, padding_idx: int | None) -> Tensor:
    """dA [R, V] in A's dtype: the sum of drows [M, R] over the tokens of each id, zero elsewhere and
    at `padding_idx`. Deterministic: tokens of one id are added in an order that only ids fix."""
    return (
        scatter_table(drows, ids, lora_a.shape[1], padding_idx)
        .t()
        .to(lora_a.dtype, memory_format=torch.contiguous_format)
    )


def scatter_table(drows: Tensor, ids: Tensor, vocabulary: int, padding_idx: int | None) -> Tensor:
    """Sum of drows [M, D] by id: [V, D]."""
    padding = -1 if padding_idx is None else padding_idx
    return _sum_by_id(drows, ids, vocabulary, padding, False)


def own_scale(table: EmbeddingOperands, spec: EmbeddingSpec, dtype: torch.dtype):
    """e, as it multiplies a tensor of this dtype."""
    return spec.scale if table.scale is None else table.scale.to(dtype)


def _scaled(value: Tensor, table: EmbeddingOperands, spec: EmbeddingSpec, dtype: torch.dtype) -> Tensor:
    if table.scale is None and spec.scale == 1.0:
        return value
    return value * own_scale(table, spec, dtype)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left right in the wider of their dtypes, and for float16 in float32: what it is multiplied by or added to may
    bring it back into float16's range."""
    if left.dtype == right.dtype != torch.float16:
        return left @ right
    wide = torch.promote_types(left.dtype, right.dtype)
    wide = torch.float32 if wide == torch.float16 else wide
    return left.to(wide) @ right.to(wide)
