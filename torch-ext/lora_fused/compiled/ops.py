"""Ops that Dynamo puts into a graph, one a linear or gated MLP, and that AOTAutograd traces through: each runs the very
Function that an eager call runs, so that a graph has the native ops, forward and backward, or the chain of operations.

An op takes tensors and numbers alone, so a projection's spec goes in as numbers (`packed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ..backends import select
from ..functional import delta as functional_delta, dispatch, embedding as functional_embedding
from ..specs import (
    OPERANDS_PER_PROJECTION,
    EightBit,
    EmbeddingOperands,
    FourBit,
    Operands,
    Projection,
    ProjectionSpec,
    Quantized,
)
from .options import register_pass

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of a weight before it was quantized
_DENSE, _FOUR_BIT, _EIGHT_BIT = range(3)
_Scaling = float | torch.SymFloat
_MaybeTensors = Sequence[Tensor | None]


def unknown_reason(spec: ProjectionSpec) -> str | None:
    """Why no op here takes a projection: its weight is in a format that `packed` has no numbers for."""
    kind = type(spec.quantized)
    return None if kind in (type(None), FourBit, EightBit) else f"torch.compile: weights of format {kind.__name__}"


def packed(spec: ProjectionSpec) -> list[int]:
    """A spec but for its dropout, as NUMBERS numbers: transposed, the kind of the weight, its [N, K] where it is
    quantized, blocksize, nested_blocksize and fp4 of four bits, and the place of its dtype in _DTYPES."""
    transposed, quantized = int(spec.transposed), spec.quantized
    if quantized is None:
        return [transposed, _DENSE, 0, 0, 0, 0, 0, 0]
    n, k = quantized.shape
    dtype = _DTYPES.index(quantized.dtype)
    if isinstance(quantized, FourBit):
        sizes = quantized.blocksize, quantized.nested_blocksize, int(quantized.fp4)
        return [transposed, _FOUR_BIT, n, k, *sizes, dtype]
    return [transposed, _EIGHT_BIT, n, k, 0, 0, 0, dtype]


NUMBERS = len(packed(ProjectionSpec()))


def spec_of(numbers: Sequence[int], dropout: float) -> ProjectionSpec:
    """The inverse of `packed`."""
    transposed, kind, n, k, blocksize, nested_blocksize, fp4, dtype = numbers
    quantized: Quantized | None = None
    if kind == _FOUR_BIT:
        quantized = FourBit((n, k), blocksize, nested_blocksize, bool(fp4), _DTYPES[dtype])
    elif kind == _EIGHT_BIT:
        quantized = EightBit((n, k), _DTYPES[dtype])
    return ProjectionSpec(dropout, bool(transposed), quantized)


def _projections(
    operands: _MaybeTensors, scalings: Sequence[_Scaling], dropouts: Sequence[float], stored: Sequence[int]
) -> tuple[Projection, ...]:
    """The projections of an op's arguments, `stored` NUMBERS of each."""
    register_pass()
    found = []
    for i, (scaling, dropout) in enumerate(zip(scalings, dropouts)):
        of = Operands(*operands[OPERANDS_PER_PROJECTION * i : OPERANDS_PER_PROJECTION * (i + 1)])
        spec = spec_of(stored[NUMBERS * i : NUMBERS * (i + 1)], float(dropout))
        if of.lora_b is not None:
            scaling, factor = _apart(scaling, of.lora_b)
            if factor is not None:
                bias = None if of.lora_bias is None else of.lora_bias * factor
                of = of._replace(lora_b=of.lora_b * factor, lora_bias=bias)
        found.append(Projection(of, float(scaling), spec))
    return tuple(found)


def _apart(scaling: _Scaling, lora_b: Tensor) -> tuple[float, Any]:
    """A scaling as a number of the graph, and as a factor of B, whose product it is. One that has changed is a symbol
    from then on, so that a graph serves all values, and is multiplied into B. That may leave float16's range, so there
    each value is a number and has its graph. So it is on a GPU, where Inductor of torch 2.11 makes a kernel for the CPU
    of such a symbol: it takes long to compile, and a backward of ours crashed there."""
    if not isinstance(scaling, torch.SymFloat) or lora_b.dtype == torch.float16 or lora_b.is_cuda:
        return float(scaling), None
    return 1.0, scaling


def _traced_linear(
    x: Tensor, operands: _MaybeTensors, scaling: _Scaling, dropout: float, stored: Sequence[int]
) -> Tensor:
    """A linear, its base product with it."""
    projections = _projections(operands, [scaling], [dropout], stored)
    return dispatch.compute_group(x, projections, backend=select.NATIVE)[0]


def _traced_delta(
    base: Tensor,
    x: Tensor,
    operands: _MaybeTensors,
    scaling: _Scaling,
    dropout: float,
    stored: Sequence[int],
    promotes: bool,
) -> Tensor:
    """A linear whose base product somebody else made."""
    (projection,) = _projections(operands, [scaling], [dropout], stored)
    return functional_delta.add_delta(base, x, projection, promotes)


def _traced_gated_mlp(
    x: Tensor,
    operands: _MaybeTensors,
    scalings: Sequence[_Scaling],
    dropouts: Sequence[float],
    stored: Sequence[int],
    activation: str,
    gate_half: int,
) -> Tensor:
    """A gated MLP; the last projection is down."""
    *inputs, output = _projections(operands, scalings, dropouts, stored)
    return dispatch.compute_gated(x, inputs, output, activation, gate_half, backend=select.NATIVE)


def _traced_embedding(
    ids: Tensor, table: _MaybeTensors, scaling: _Scaling, padding_idx: int | None, scale: float
) -> Tensor:
    """An embedding, `table` its `EmbeddingOperands`."""
    of = EmbeddingOperands(*table)
    number, factor = _apart(scaling, of.lora_b)
    if factor is not None:
        of = of._replace(lora_b=of.lora_b * factor)
    return functional_embedding.compute_embedding(ids, of, number, padding_idx, scale)


_OF_ONE = "Tensor?[] operands, Scalar scaling, float dropout, int[] stored"
_SCHEMAS = {
    f"traced_linear(Tensor x, {_OF_ONE}) -> Tensor": _traced_linear,
    f"traced_delta(Tensor base, Tensor x, {_OF_ONE}, bool promotes) -> Tensor": _traced_delta,
    (
        "traced_gated_mlp(Tensor x, Tensor?[] operands, Scalar[] scalings, float[] dropouts, int[] stored, "
        "str activation, int gate_half) -> Tensor"
    ): _traced_gated_mlp,
    (
        "traced_embedding(Tensor ids, Tensor?[] table, Scalar scaling, int? padding_idx, float scale) -> Tensor"
    ): _traced_embedding,
}
_library = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "FRAGMENT")
for _schema, _kernel in _SCHEMAS.items():
    _library.define(_schema)
    _library.impl(_schema.partition("(")[0], _kernel, "CompositeImplicitAutograd")

traced_linear = ops.traced_linear.default
traced_delta = ops.traced_delta.default
traced_gated_mlp = ops.traced_gated_mlp.default
traced_embedding = ops.traced_embedding.default
