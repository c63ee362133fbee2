"""The gate of experts and its backward in plain PyTorch.

    h = f(α·g)/α · (u + c)      dg = dh · (u + c) · f'(α·g)      du = dh · f(α·g)/α

g and u are first cut off at the limit; where that acts, their gradient is zero. Half precision is computed in float32
and rounded once. (gpt-oss: f = SiLU, α = 1.702, c = 1, limit 7.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...specs import AnyGate, Gate
from . import activations


def value(z: Tensor, gate: AnyGate) -> Tensor:
    """h [S, I] of z [S, 2I], or of z [S, I] where there is no gate; in z's dtype."""
    if not isinstance(gate, Gate):
        return gate(z)
    if not gate.gated:
        return activations.activate(z, gate.activation).to(z.dtype)
    g, u = halves(z, gate)
    if _is_plain(gate):
        return activations.gated(g, u, gate.activation)
    g, u = _arguments(g, u, gate)
    return activations.gated(g, u, gate.activation).div_(gate.slope).to(z.dtype)


def with_pullback(z: Tensor, gate: AnyGate) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """h and the function that makes dz of dh. For use where autograd records nothing."""
    if not isinstance(gate, Gate):
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            h = gate(leaf)
        return h.detach(), lambda dh: torch.autograd.grad(h, leaf, dh)[0]
    return value(z, gate), lambda dh: _gradient(z, dh, gate)


def _gradient(z: Tensor, dh: Tensor, gate: Gate) -> Tensor:
    dz = torch.empty_like(z)
    if not gate.gated:
        activations.gated_backward(dh, z, z.new_ones(()), gate.activation, False, dgate=dz)
        return dz
    (g, u), (dg, du) = halves(z, gate), halves(dz, gate)
    if _is_plain(gate):
        activations.gated_backward(dh, g, u, gate.activation, False, dgate=dg, dup=du)
        return dz
    of_g, of_u = _arguments(g, u, gate)
    _, slope_g, slope_u = activations.gated_backward(dh, of_g, of_u, gate.activation, False)
    slope_u.div_(gate.slope)
    if gate.limit is not None:
        slope_g.masked_fill_(g > gate.limit, 0.0)
        slope_u.masked_fill_(u.abs() > gate.limit, 0.0)
    dg.copy_(slope_g)
    du.copy_(slope_u)
    return dz


def halves(z: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """The gate's part of z and the other one, views."""
    if gate.interleaved:
        return z[..., ::2], z[..., 1::2]
    g, u = z.chunk(2, -1)
    return g, u


def _is_plain(gate: Gate) -> bool:
    return gate.limit is None and gate.slope == 1.0 and gate.offset == 0.0


def _arguments(g: Tensor, u: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """α·g and u + c after the limit, in at least float32."""
    if g.dtype in (torch.float16, torch.bfloat16):
        g, u = g.float(), u.float()
    if gate.limit is not None:
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    return g * gate.slope, u + gate.offset
