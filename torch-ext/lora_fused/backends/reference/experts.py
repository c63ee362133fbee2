"""Experts with LoRA in plain PyTorch, one expert after the other: the oracle, which autograd differentiates.

    z = x W1ᵀ + s1·(x A1ᵀ) B1ᵀ + b1      h = gate(z)      y = h W2ᵀ + s2·(h A2ᵀ) B2ᵀ + b2      out = Σ_k w_k·y_k

Shapes: x [T, H], index and routing [T, k], W1 [E, N, H], W2 [E, H', I] (`ExpertWeights`); out [T, H'].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...specs import AnyGate, ExpertWeights, Gate

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda g: F.relu(g).square(),
}


def lora_experts(
    x: Tensor, index: Tensor, routing: Tensor, up: ExpertWeights, down: ExpertWeights, gate: AnyGate
) -> Tensor:
    """out [T, H'] in x's dtype, summed in the wider of the weight's and the routing's; indices from E on are left
    out."""
    experts = up.weight.shape[0]
    dtype = torch.promote_types(up.weight.dtype, routing.dtype)
    out = torch.zeros((x.shape[0], down.weight.shape[1]), dtype=dtype, device=x.device)
    rows = x.to(up.weight.dtype)
    for expert in range(experts):
        token, choice = torch.where(index == expert)
        h = gated(_linear(rows[token], up, expert), gate)
        y = _linear(h, down, expert) * routing[token, choice, None]
        out = out.index_add(0, token, y.to(dtype))
    return out.to(x.dtype)


def _linear(x: Tensor, weights: ExpertWeights, expert: int) -> Tensor:
    bias = None if weights.bias is None else weights.bias[expert]
    y = F.linear(x, weights.weight[expert], bias)
    if weights.lora_a is None:
        return y
    t = F.linear(x, weights.lora_a[expert].to(x.dtype))
    return y + F.linear(t, weights.lora_b[expert].to(x.dtype)) * weights.scaling


def gated(z: Tensor, gate: AnyGate) -> Tensor:
    """h [S, I] of z [S, 2I], or [S, I] without a gate, as `Gate` defines it."""
    if not isinstance(gate, Gate):
        return gate(z)
    activation = _ACTIVATIONS[gate.activation]
    if not gate.gated:
        return activation(z)
    g, u = (z[..., ::2], z[..., 1::2]) if gate.interleaved else z.chunk(2, -1)
    if gate.limit is not None:
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    return activation(gate.slope * g) / gate.slope * (u + gate.offset)
