"""The gated activation and its backward in plain PyTorch: the oracle, and the path of CPU tensors.

    h = f(g) · u        dg = dh · u · f'(g)        du = dh · f(g)

    silu       f = g·σ(g)            f' = σ(g)·(1 + g·(1 - σ(g)))
    gelu       f = g·Φ(g)            f' = Φ(g) + g·φ(g), the normal distribution and density
    gelu_tanh  f = g·σ(2z)           f' = σ(2z)·(1 + g·σ(-2z)·2z'), z = √(2/π)·(g + 0.044715·g³)
    relu       f = max(g, 0)         f' = 0 for g ≤ 0, else 1
    relu2      f = max(g, 0)²        f' = 2·max(g, 0)

gelu_tanh uses (1 + tanh z)/2 = σ(2z). All tensors of a call have one shape and one
dtype. Half precision is computed in float32 and rounded once; float32 and float64 stay. These
run inside an autograd Function; autograd itself does not look into them.
Sources: Shazeer 2020, arXiv:2002.05202; Hendrycks & Gimpel 2016, arXiv:1606.08415; So et al.
2021, arXiv:2109.08668 (ReLU squared).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native

TANH_SCALE = math.sqrt(2.0 / math.pi)
TANH_CUBIC = 0.044715
# Beyond this σ(2z) is 0 or 1 in float64 too, so z of the clamped g is exact and g³ is finite.
TANH_SATURATED = 30.0


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _silu_slope(g: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(g)
    return (1.0 - sigmoid).mul_(g).add_(1.0).mul_(sigmoid)


def _gelu_slope(g: Tensor) -> Tensor:
    density = (g * g).mul_(-0.5).exp_().mul_(1.0 / math.sqrt(2.0 * math.pi))
    cdf = torch.erf(g * math.sqrt(0.5)).add_(1.0).mul_(0.5)
    return density.mul_(g).add_(cdf)


def _gelu_tanh_slope(g: Tensor) -> Tensor:
    near = g.clamp(-TANH_SATURATED, TANH_SATURATED)
    square = near * near
    exponent = near.mul_(1.0 + TANH_CUBIC * square).mul_(2.0 * TANH_SCALE)
    exponent_slope = square.mul_(3.0 * TANH_CUBIC).add_(1.0).mul_(2.0 * TANH_SCALE)
    # 1 - σ(2z) as σ(-2z): g·2z' would make much of the difference's rounding.
    return exponent_slope.mul_(torch.sigmoid(-exponent)).mul_(g).add_(1.0).mul_(exponent.sigmoid_())


class Activation(NamedTuple):
    """f and its derivative f', of a tensor in float32 or float64 that neither writes to."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


# The one list in Python: the native ops' (kernel-src/common/names.h) and Triton's are compared with it, and a gated MLP
# is recognised by these values.
TABLE = {
    "silu": Activation(F.silu, _silu_slope),
    "gelu": Activation(F.gelu, _gelu_slope),
    "gelu_tanh": Activation(lambda g: F.gelu(g, approximate="tanh"), _gelu_tanh_slope),
    "relu": Activation(F.relu, lambda g: (g <= 0).logical_not_().to(g.dtype)),
    "relu2": Activation(lambda g: F.relu(g).square_(), lambda g: F.relu(g).mul_(2.0)),
}
ACTIVATIONS = tuple(TABLE)
INDEX = {name: native.ACTIVATIONS.index(name) for name in ACTIVATIONS}  # of each in the native ops


def activate(gate: Tensor, activation: str) -> Tensor:
    """f(gate) for one of ACTIVATIONS, in float32 for half precision and in gate's dtype otherwise."""
    return TABLE[activation].value(_wide(gate))


def _give(value: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    return value.to(dtype) if out is None else out.copy_(value)


def gated(gate: Tensor, up: Tensor, activation: str, *, out: Tensor | None = None) -> Tensor:
    """h = f(gate)·up, elementwise, in gate's dtype; into `out` where given (it may be gate or up)."""
    return _give(activate(gate, activation).mul_(up), gate.dtype, out)


def gated_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    need_h: bool = True,
    *,
    dgate: Tensor | None = None,
    dup: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(h, dgate, dup) of h = f(gate)·up, recomputed from the projections; h is None unless needed.

    `dgate` and `dup` receive the gradients where given: any tensors of gate's shape, gate and up
    themselves included. The results are in gate's dtype.
    """
    wide = _wide(gate)
    value, slope = TABLE[activation].value(wide), TABLE[activation].slope(wide)
    del wide
    h = (value * up).to(gate.dtype) if need_h else None
    slope.mul_(up).mul_(dh)
    value.mul_(dh)
    return h, _give(slope, gate.dtype, dgate), _give(value, gate.dtype, dup)
