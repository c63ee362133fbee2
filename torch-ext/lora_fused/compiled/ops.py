"""Ops that Dynamo puts into a graph, one a linear or gated MLP, and that AOTAutograd traces through: each runs the very
Function that an eager call runs, so that a graph has the native ops, forward and backward, or the chain of operations.

An op takes tensors and numbers alone, so a projection's spec goes in as numbers (`packed`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ..backends import select
from ..functional import delta as functional_delta, dispatch, embedding as functional_embedding
from ..specs import OPERANDS_PER_PROJECTION, EightBit, EmbeddingOperands, FourBit, Operands, Projection, ProjectionSpec, Quantized

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SIZE = 8
_DENSE, _FOUR_BIT, _EIGHT_BIT = range(3)

_library = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "FRAGMENT")


def packed(spec: ProjectionSpec) -> list[int]:
    """A spec but for its dropout, as numbers."""
    transposed, quantized = int(spec.transposed), spec.quantized
    if quantized is None:
        return [transposed, _DENSE, 0, 0, 0, 0, 0, 0]
    n, k = quantized.shape
    if isinstance(quantized, FourBit):
        return [transposed, _FOUR_BIT, n, k, quantized.blocksize, quantized.nested_blocksize, int(quantized.fp4), _DTYPES.index(quantized.dtype)]
    return [transposed, _EIGHT_BIT, n, k, 0, 0, 0, _DTYPES.index(quantized.dtype)]


def _unpacked(numbers: Sequence[int], dropout: float) -> ProjectionSpec:
    transposed, kind, n, k, blocksize, nested_blocksize, fp4, dtype = numbers
    quantized: Quantized | None = None
    if kind == _FOUR_BIT:
        quantized = FourBit((n, k), blocksize, nested_blocksize, bool(fp4), _DTYPES[dtype])
    elif kind == _EIGHT_BIT:
        quantized = EightBit((n, k), _DTYPES[dtype])
    return ProjectionSpec(dropout, bool(transposed), quantized)


def _projections(operands, scalings, dropouts, stored) -> tuple[Projection, ...]:
    size = OPERANDS_PER_PROJECTION
    found = []
    for i, (scaling, dropout) in enumerate(zip(scalings, dropouts)):
        of = Operands(*operands[size * i : size * (i + 1)])
        found.append(Projection(of, scaling, _unpacked(stored[_SIZE * i : _SIZE * (i + 1)], float(dropout))))
    return tuple(found)


def _traced_linear(x: Tensor, operands, scaling: float, dropout: float, stored) -> Tensor:
    return dispatch.compute_group(x, _projections(operands, [scaling], [dropout], stored), backend=select.NATIVE)[0]


def _traced_delta(base: Tensor, x: Tensor, operands, scaling: float, dropout: float, stored, promotes: bool) -> Tensor:
    (projection,) = _projections(operands, [scaling], [dropout], stored)
    return functional_delta.add_delta(base, x, projection, promotes)


def _traced_gated_mlp(x: Tensor, operands, scalings, dropouts, stored, activation: str, gate_half: int) -> Tensor:
    *inputs, output = _projections(operands, scalings, dropouts, stored)
    return dispatch.compute_gated(x, inputs, output, activation, gate_half)


def _traced_embedding(ids: Tensor, table, scaling: float, padding_idx: int | None, scale: float) -> Tensor:
    return functional_embedding.compute_embedding(ids, EmbeddingOperands(*table), scaling, padding_idx, scale)


for _schema, _kernel in (
    ("traced_linear(Tensor x, Tensor?[] operands, float scaling, float dropout, int[] stored) -> Tensor", _traced_linear),
    ("traced_delta(Tensor base, Tensor x, Tensor?[] operands, float scaling, float dropout, int[] stored, bool promotes) -> Tensor", _traced_delta),
    ("traced_gated_mlp(Tensor x, Tensor?[] operands, float[] scalings, float[] dropouts, int[] stored, str activation, int gate_half) -> Tensor", _traced_gated_mlp),
    ("traced_embedding(Tensor ids, Tensor?[] table, float scaling, int? padding_idx, float scale) -> Tensor", _traced_embedding),
):
    _library.define(_schema)
    _library.impl(_schema.partition("(")[0], _kernel, "CompositeImplicitAutograd")

traced_linear, traced_delta, traced_gated_mlp = ops.traced_linear.default, ops.traced_delta.default, ops.traced_gated_mlp.default
traced_embedding = ops.traced_embedding.default
