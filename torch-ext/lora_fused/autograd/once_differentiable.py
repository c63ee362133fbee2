"""A backward that is not differentiated again says so, and a plain one pays nothing for it: it is in `no_grad`
already."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

_TWICE = (
    "lora_fused: gradients of gradients (create_graph=True, gradient penalties, second derivatives) are not computed "
    "by the fused layers; use this model without kernelize for them, where PEFT's own forward runs"
)


def once_differentiable(backward: Callable, always: bool = False) -> Callable:
    """A backward that raises where its result is differentiated again. `always`: also for what was saved, where the
    incoming gradients need none themselves."""

    @functools.wraps(backward)
    def run(ctx, *grads):
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not always and not any([isinstance(grad, Tensor) and grad.requires_grad for grad in grads]):
            return results
        return torch._C._functions.DelayedError(_TWICE.encode(), len(results))(*map(_leaf, results))

    return run


def _leaf(result: Tensor | None) -> Tensor | None:
    return None if result is None else result.detach().requires_grad_()
