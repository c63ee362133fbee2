"""Frozen descriptions of adapted projections, of the groups that share an input, of adapted embeddings and of experts.

An autograd Function sees tensors only as flat arguments (a tensor inside a tuple gets no
gradient), so a group is described by a hashable `GroupSpec` and a flat tuple of operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Fallback(NamedTuple):
    """In place of what reading a module gives: its own forward computes the call. reason: why, for a reader. raises:
    whether that cannot compute it either, so that the call raises."""

    reason: str
    raises: bool = False


class Operands(NamedTuple):
    """Tensors of one projection: weight [N, K], bias [N], lora_a [R, K], lora_b [N, R],
    lora_bias [N], magnitude [N]. None where the projection has none; without lora_a and lora_b it
    is the base product alone, with a magnitude it is DoRA.

    A quantized weight is stored as its `Quantized` says, and comes with absmax, the scale of each
    block or row. Where absmax itself is quantized, it holds codes and nested_absmax, nested_code and
    offset are there. A weight of None is the base module's own to multiply with."""

    weight: Tensor | None
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    lora_bias: Tensor | None = None
    magnitude: Tensor | None = None
    absmax: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None


OPERANDS_PER_PROJECTION = len(Operands._fields)


@dataclass(frozen=True)
class FourBit:
    """A frozen weight of four bits a value, packed as bitsandbytes packs NF4 and FP4
    (kernel-src/common/four_bit.h has the formula).

    shape: [N, K]. blocksize: values that share one absmax. nested_blocksize: blocks that share one
    nested_absmax, 0 where absmax is float32 itself. fp4: FP4, else NF4. dtype: of the weight before
    it was quantized. native_format: its name in `native.FORMATS`.
    """

    shape: tuple[int, int]
    blocksize: int
    nested_blocksize: int
    fp4: bool
    dtype: torch.dtype

    @property
    def native_format(self) -> str:
        return "fp4" if self.fp4 else "nf4"


@dataclass(frozen=True)
class EightBit:
    """A frozen weight [N, K] in int8, w = q · absmax / 127 with absmax [N] in float32. No native op reads it."""

    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    native_format: ClassVar[None] = None


Quantized = FourBit | EightBit  # the rows of `quantization.FORMATS`


@dataclass(frozen=True)
class ProjectionSpec:
    """What is fixed about one projection.

    dropout: probability with which an element of the LoRA path's input is dropped, 0 for none.
    transposed: the weight is stored [K, N], as `Conv1D` does.
    quantized: how the weight is stored where it is not as floating-point numbers.
    """

    dropout: float = 0.0
    transposed: bool = False
    quantized: Quantized | None = None


class Projection(NamedTuple):
    """One projection ready to compute; the scaling stands beside the spec since it may change at
    every step. As a tensor without dimensions it is not to be waited for: `fold` comes first."""

    operands: Operands
    scaling: float | Tensor = 1.0
    spec: ProjectionSpec = ProjectionSpec()

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        if self.spec.quantized is not None:
            return self.spec.quantized.shape
        n, k = self.operands.weight.shape
        return (k, n) if self.spec.transposed else (n, k)


def fold(projections: Sequence[Projection]) -> Sequence[Projection]:
    """The same projections with scalings that are tensors multiplied into B and its bias, where autograd sees them."""
    for projection in projections:
        if type(projection.scaling) is not float:
            return tuple(map(folded, projections))
    return projections


def folded(projection: Projection) -> Projection:
    """`fold` of one projection."""
    operands, scaling, spec = projection
    if not isinstance(scaling, Tensor):
        return projection
    scaling = scaling.clone()  # autograd keeps it, and the next swap fills the tensor itself
    lora_bias = None if operands.lora_bias is None else operands.lora_bias * scaling
    return Projection(operands._replace(lora_b=operands.lora_b * scaling, lora_bias=lora_bias), 1.0, spec)


@dataclass(frozen=True)
class GroupSpec:
    """What is fixed about a group of projections of one input.

    members: one spec a projection.
    backend: name of the backend that computes it, see `select.choose`.
    lora_dtype: dtype of the LoRA path under autocast, None where the adapter's own holds.
    """

    members: tuple[ProjectionSpec, ...]
    backend: str
    lora_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class GatedSpec:
    """What is fixed about a gated MLP.

    inputs: the group of gate and up, or of the one projection that holds both.
    output: the group of down alone.
    activation: one of `activations.ACTIVATIONS`.
    gate_half: which half of a projection that holds both is the gate.
    """

    inputs: GroupSpec
    output: GroupSpec
    activation: str
    gate_half: int = 0

    @property
    def members(self) -> tuple[ProjectionSpec, ...]:
        return (*self.inputs.members, *self.output.members)


class NativePath(NamedTuple):
    """Whether the ops compute a group, and whether exactly: adapters of float32 beside bfloat16 without autocast,
    of which they multiply two parts (kernel-src/group/adapters.h)."""

    native: bool
    bf16x3: bool = False


# What a gradient is wanted of, by projection: bits of the native ops' `needs` (kernel-src/group/members.h).
NEED_A, NEED_B, NEED_BIAS, NEED_MAGNITUDE = 1, 2, 4, 8


class Mask(NamedTuple):
    """Dropout with probability p, a function of seed (int64 [1], on the device), row and column."""

    seed: Tensor
    p: float


def split_scaling(scaling: float, *dtypes: torch.dtype) -> tuple[float, float]:
    """(down, up), of which the scaling is the product: t = down·dropout(x) Aᵀ is kept, and what is made of t has the
    factor up. `dtypes`: those that t may be stored in.

    float16 may not have the range for s·dropout(x) Aᵀ where it has it for dropout(x) Aᵀ, which PEFT multiplies by B
    first. So there |down| is at most 1, and up a power of two, 1 elsewhere. kernel-src/group/members.h,
    `expand_scaling_of`, has the same rule."""
    if torch.float16 not in dtypes or not abs(scaling) > 1.0:
        return scaling, 1.0
    mantissa, exponent = math.frexp(abs(scaling))
    up = math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)
    return scaling / up, up


def flatten(projections: Sequence[Operands]) -> tuple[Tensor | None, ...]:
    """Operands of all projections, one after another."""
    return tuple(tensor for operands in projections for tensor in operands)


def unflatten(flat: Sequence[Tensor | None]) -> tuple[Operands, ...]:
    """Inverse of `flatten`."""
    step = OPERANDS_PER_PROJECTION
    return tuple(Operands(*flat[i : i + step]) for i in range(0, len(flat), step))


class EmbeddingOperands(NamedTuple):
    """Tensors of one embedding: weight [V, H], lora_a [R, V], lora_b [H, R], magnitude [H] or None
    for plain LoRA, scale of one element or None."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None = None
    scale: Tensor | None = None


class EmbeddingSpec(NamedTuple):
    """What is no tensor: the scaling s, the row that gets no gradient, the embedding's own scale
    where it is a number, the name of the backend."""

    scaling: float
    padding_idx: int | None
    scale: float
    backend: str


class ExpertWeights(NamedTuple):
    """One product of E experts, y = x Wᵀ + s·(x Aᵀ) Bᵀ + b for the rows of each.

    weight [E, N, K] (any strides: a transposed view where a model stores [E, K, N]), bias [E, N] or None,
    lora_a [E, R, K] and lora_b [E, N, R] or both None, scaling s.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the scaling."""
        return self.weight, self.bias, self.lora_a, self.lora_b


class StoredFactors(NamedTuple):
    """An adapter of one product as PEFT stores it: A [E·R, p] and B [q, R·E], whose views lora_a and lora_b are.
    crossed: lora_a is of B, and lora_b of A."""

    a: Tensor
    b: Tensor
    crossed: bool

    def views(self, experts: int) -> tuple[Tensor, Tensor]:
        """(lora_a [E, R, K], lora_b [E, N, R]), to be made where autograd does not record: its node of a view costs
        more than the view."""
        a, b, crossed = self
        (rows, p), q, (a_row, a_column), (b_row, b_column) = a.shape, b.shape[0], a.stride(), b.stride()
        rank = rows // experts
        by_rank = experts * b_column
        if crossed:
            of_b = b.as_strided((experts, rank, q), (b_column, by_rank, b_row))
            return of_b, a.as_strided((experts, p, rank), (rank * a_row, a_column, a_row))
        of_a = a.as_strided((experts, rank, p), (rank * a_row, a_row, a_column))
        return of_a, b.as_strided((experts, q, rank), (b_column, b_row, by_rank))


def with_factors(weights: ExpertWeights, stored: StoredFactors | None) -> ExpertWeights:
    """`weights` with the factors that are stored beside them, if any are."""
    if stored is None:
        return weights
    weight, bias, _, _, scaling = weights
    return ExpertWeights(weight, bias, *stored.views(weight.shape[0]), scaling)


class Gate(NamedTuple):
    """h = f(α·g)/α · (u + c), g and u the halves of z, or h = f(z) where there is no gate.

    activation: f, one of `reference.activations.ACTIVATIONS`. interleaved: g and u are the even and odd columns of z,
    else its first and second half. limit: g is cut off above it, u on both sides, before all else. slope: α. offset: c.
    """

    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    limit: float | None = None
    slope: float = 1.0
    offset: float = 0.0


AnyGate = Gate | Callable[[Tensor], Tensor]


class ExpertsSpec(NamedTuple):
    """All of a call but its tensors.

    gate: a `Gate`, or a function of z without parameters of its own, which autograd differentiates.
    leaves_out: whether indices from E on may occur on a GPU, where looking would wait for it.
    crossed: `StoredFactors.crossed` of both products; None where factors are not stored so.
    """

    gate: AnyGate
    leaves_out: bool
    crossed: tuple[bool | None, bool | None] = (None, None)
