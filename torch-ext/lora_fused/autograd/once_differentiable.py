"""A backward that is not differentiated again says so, and a plain one pays nothing for it: it is in `no_grad`
already."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

_is_grad_enabled = torch.is_grad_enabled  # bound once: torch looks its attributes up in a function of its own
_TWICE = (
    "lora_fused: gradients of gradients (create_graph=True, gradient penalties, second derivatives) are not computed "
    "by the fused layers; use this model without kernelize for them, where PEFT's own forward runs"
)


def once_differentiable(backward: Callable) -> Callable:
    """A backward that raises where its result is differentiated again. With create_graph its results need a gradient,
    as they depend on saved tensors whether the incoming gradients need one or not: a penalty on a gradient would lose
    its part without a word otherwise."""

    @functools.wraps(backward)
    def run(ctx, *grads):
        if not _is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        return torch._C._functions.DelayedError(_TWICE.encode(), len(results))(*map(_leaf, results))

    return run


def _leaf(result: Tensor | None) -> Tensor | None:
    return None if result is None else result.detach().requires_grad_()
