"""torch's `once_differentiable` without its price: it enters `no_grad`, which a plain backward is in already."""

from __future__ import annotations

import functools
from typing import Callable

import torch
from torch.autograd import function


def once_differentiable(backward: Callable) -> Callable:
    """A backward that raises where its result is differentiated again."""
    checked = function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx, *grads):
        return checked(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run
