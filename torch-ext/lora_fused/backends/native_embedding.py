"""An adapted embedding by the native CUDA ops, one a direction: for few tokens, where a step waits for
the host. A float32 adapter is multiplied to 16 bits, any other exactly; every sum has a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..specs import EmbeddingOperands, EmbeddingSpec
from . import native

_HALVES = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, *_HALVES)
RANKS = 512  # up to which the ops hold A of some tokens in shared memory
NORM_RANKS = 64  # up to which `column_norm` holds B in registers


def fits(table: EmbeddingOperands) -> bool:
    """Whether the ops take this table: half precision on a GPU, contiguous, rows
    of 16-byte pieces, A and B of one dtype, a rank up to RANKS."""
    weight, lora_a, lora_b, _, _ = table
    return (
        native.available
        and weight.is_cuda
        and weight.dtype in _HALVES
        and all(tensor is None or tensor.dtype in _DTYPES for tensor in table)
        and lora_a.dtype == lora_b.dtype
        and lora_a.shape[0] <= RANKS
        and weight.shape[1] % 8 == 0
        and weight.is_contiguous()
        and lora_a.is_contiguous()
        and lora_b.is_contiguous()
        and (type(weight) not in (Tensor, torch.nn.Parameter) or weight.data_ptr() % 16 == 0)
    )


def norm_fits(table: EmbeddingOperands) -> bool:
    """Whether `column_norm` takes this table: one that `fits`, of a usual rank, A and B in float32 or its dtype."""
    dtypes = (torch.float32, table.weight.dtype)
    return table.lora_a.shape[0] <= NORM_RANKS and table.lora_a.dtype in dtypes and fits(table)


def column_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """‖W + s·(B·A)ᵀ‖ by column: [H] in float32. A float32 A enters in two parts, but in large
    vocabularies, over which the rounding of one part averages out."""
    return native.column_norm(weight, lora_a, lora_b, scaling)[0]


def column_norm_and_scale(table: EmbeddingOperands, scaling: float) -> tuple[Tensor, Tensor]:
    """(`column_norm`, `native.mag_norm_scale` of it), both [H] in float32."""
    weight, lora_a, lora_b, magnitude, _ = table
    norm, mag_norm_scale = native.column_norm(weight, lora_a, lora_b, scaling, magnitude.contiguous())
    return norm, mag_norm_scale


def gather_add(
    ids: Tensor, table: EmbeddingOperands, spec: EmbeddingSpec, mag_norm_scale: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """(y [*ids.shape, H] in the table's dtype, rows [M, R] in float32 if `keep`)."""
    weight, lora_a, lora_b, _, scale = table
    y, rows = native.embedding_forward(
        ids.contiguous(), weight, lora_a, lora_b, mag_norm_scale, scale, spec.scaling, spec.scale, keep
    )
    return y, rows if keep else None


def gradients(
    dy: Tensor,
    ids: Tensor,
    rows: Tensor | None,
    table: EmbeddingOperands,
    spec: EmbeddingSpec,
    mag_norm_scale: Tensor | None,
    norm: Tensor | None,
    needs: EmbeddingOperands,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dA [R, V], dB [H, R], dm [H]) for dy [*ids.shape, H], None where `needs` has False."""
    weight, lora_a, lora_b, magnitude, scale = table
    padding = -1 if spec.padding_idx is None else spec.padding_idx
    wanted = (needs.lora_a, needs.lora_b, needs.magnitude)
    if dy.data_ptr() % 16:  # of a view into something else
        dy = dy.clone(memory_format=torch.contiguous_format)
    found = iter(
        native.embedding_backward(
            dy,
            ids.contiguous(),
            rows,
            weight,
            lora_a,
            lora_b,
            magnitude,
            mag_norm_scale,
            norm,
            scale,
            spec.scaling,
            spec.scale,
            padding,
            *wanted,
        )
    )
    return tuple(next(found) if want else None for want in wanted)
