"""Which activation a function is, by its values and its derivative on a grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.reference import activations as formulas
from ..call_context import apart
from ..specs import Fallback

# Relative to the argument and the result: rounding of another order of operations, no more.
TOLERANCE = 1e-13
# Uneven, so that no mean or extremum vanishes; far ends show a clamp, fine steps an approximation.
GRID = tuple(sign * 1.0371 * 1.37**step for step in range(-18, 13) for sign in (1.0, -0.8137))
FAR = (0.0, 3e2, -7e2, 6.6e4, -1e5, 1e12, -3e12, 1e30, -2e30)


def activation_of(function: Callable[[Tensor], Tensor]) -> str | Fallback:
    """Which of `activations.ACTIVATIONS` a function of one tensor computes, or why it is none of them."""
    grid = torch.tensor(GRID + FAR, dtype=torch.float64, device="cpu").unsqueeze(0)
    found = apart(_differentiated, function, grid)
    if isinstance(found, Fallback):
        return found
    value, slope = found
    near = grid.abs() < 1e6  # beyond it a formula's slope may overflow
    for name, formula in formulas.TABLE.items():
        expected = formulas.activate(grid, name)
        if bool(((value - expected).abs() <= TOLERANCE * (grid.abs() + expected.abs())).all()):
            same = (slope - formula.slope(grid)).abs() <= 10 * TOLERANCE * (1.0 + grid.abs())
            return name if bool(same[near].all()) else Fallback(f"has the values of {name} and another gradient")
    return Fallback("is an unknown activation")


def _differentiated(function: Callable[[Tensor], Tensor], grid: Tensor) -> tuple[Tensor, Tensor] | Fallback:
    """What a function makes of each element of a grid, and its derivative."""
    argument = grid.clone().requires_grad_()
    value = function(argument)
    if not isinstance(value, Tensor) or value.shape != grid.shape or value.dtype != grid.dtype:
        return Fallback("is no function by element")
    if not value.requires_grad:
        return Fallback("has no gradient")
    return value.detach(), torch.autograd.grad(value.sum(), argument)[0]
