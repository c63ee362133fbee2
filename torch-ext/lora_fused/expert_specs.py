"""The operands of an experts module, and the gate between its two products."""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional, Union

from torch import Tensor


class ExpertWeights(NamedTuple):
    """One product of E experts, y = x Wᵀ + s·(x Aᵀ) Bᵀ + b for the rows of each.

    weight [E, N, K] (any strides: a transposed view where a model stores [E, K, N]), bias [E, N] or None,
    lora_a [E, R, K] and lora_b [E, N, R] or both None, scaling s.
    """

    weight: Tensor
    bias: Optional[Tensor] = None
    lora_a: Optional[Tensor] = None
    lora_b: Optional[Tensor] = None
    scaling: float = 1.0


TENSORS = ExpertWeights._fields[:4]


class Gate(NamedTuple):
    """h = f(α·g)/α · (u + c), g and u the halves of z, or h = f(z) where there is no gate.

    activation: f, one of `activation.ACTIVATIONS`. interleaved: g and u are the even and odd columns of z, else its
    first and second half. limit: g is cut off above it, u on both sides, before all else. slope: α. offset: c.
    """

    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    limit: Optional[float] = None
    slope: float = 1.0
    offset: float = 0.0


AnyGate = Union[Gate, Callable[[Tensor], Tensor]]


class ExpertsSpec(NamedTuple):
    """All of a call but its tensors.

    gate: a `Gate`, or a function of z without parameters of its own, which autograd differentiates.
    scalings: of the first and the second product's adapter.
    leaves_out: whether indices from E on may occur on a GPU, where looking would wait for it.
    """

    gate: AnyGate
    scalings: tuple[float, float]
    leaves_out: bool
