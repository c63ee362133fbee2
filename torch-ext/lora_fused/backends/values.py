"""What tensors stand for, where their memory does not hold it."""

from __future__ import annotations

from torch import Tensor


def with_values(arg):
    """An argument whose tensors hold their values in memory as they are: not negated by a bit, as z.conj().imag is, and
    no zeros without memory. Lists and named tuples of them too."""
    if isinstance(arg, Tensor):
        return arg.clone() if arg._is_zerotensor() else arg.resolve_neg() if arg.is_neg() else arg
    if isinstance(arg, (list, tuple)):
        values = [with_values(each) for each in arg]
        return type(arg)._make(values) if hasattr(arg, "_make") else values
    return arg
