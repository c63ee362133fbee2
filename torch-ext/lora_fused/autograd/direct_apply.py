"""`Function.apply` looks at every argument for what torch.func may have made of it, one by one in Python, before it
calls what applies the Function. One look at x serves as well where no transform is active: nothing else comes from a
caller."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_is_transformed = torch._C._are_functorch_transforms_active
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # so are tensors that a transform has left behind


def apply_of(function: type[torch.autograd.Function]) -> Callable[[Tensor], Callable]:
    """What gives for x what applies `function`, as `function.apply` does, to arguments that x is among."""
    checked, direct = function.apply, super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply_to(x: Tensor) -> Callable:
        return checked if _is_transformed() or _is_wrapped(x) else direct

    return apply_to
