"""Products over rows that are sorted by expert as torch's grouped product, bfloat16 on Hopper and Blackwell: the rows'
numbers stay on the GPU.

On other GPUs, and for other dtypes, torch's own function loops over experts and waits for the GPU at every product.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .reference.grouped import Products, Rows

_MULTIPLE = 8  # strides are multiples of 16 bytes
_MAJORS = () if torch.version.hip else (9, 10)
_grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def fits(weight: Tensor) -> bool:
    """Whether a weight [E, N, K] is one that torch multiplies without looking at the rows' numbers from the host."""
    if not weight.is_cuda or weight.dtype != torch.bfloat16 or _grouped_mm is None or weight.data_ptr() % 16:
        return False
    _, n, k = weight.shape
    if n % _MULTIPLE or k % _MULTIPLE or not _is_of_a_major(weight.device):
        return False
    return weight.is_contiguous() or weight.transpose(1, 2).is_contiguous()


@functools.cache
def _is_of_a_major(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] in _MAJORS


def product(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """x M_e by expert: x [S, K], M [E, K, N]; rows from ends[-1] on stay unwritten."""
    return _grouped_mm(x, matrices, offs=ends)


class PerRow:
    """A factor [S, ·, ·] gathered by row, for few rows: of no other expert anything is read."""

    def __init__(self, factor: Tensor):
        self.factor = factor


Matrices = Tensor | PerRow


class GroupedProducts(Products):
    """`few`: without a backward, of fewer rows than experts."""

    def __init__(self, rows: Rows, few: bool):
        self.rows, self.few = rows, few
        self._empty: Tensor | None = None

    def weights(self, weight: Tensor) -> Tensor:
        return weight

    def factor(self, factor: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Matrices:
        if self.few:
            gathered = factor[self.rows.expert()]
            return PerRow((gathered * scaling).to(dtype))
        return _laid_out(factor, dtype, scaling)

    def times_transposed(self, x: Tensor, matrices: Matrices, out: Tensor | None = None) -> Tensor:
        if isinstance(matrices, PerRow):
            return _sum(torch.bmm(matrices.factor, x.unsqueeze(2)).squeeze(2), out)
        return _sum(product(x, matrices.transpose(1, 2), self.rows.ends), out)

    def times(self, x: Tensor, matrices: Tensor, out: Tensor | None = None) -> Tensor:
        return _sum(product(x, matrices, self.rows.ends), out)

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        if self._empty is None:
            counts = torch.diff(self.rows.ends, prepend=self.rows.ends.new_zeros(1))
            self._empty = (counts == 0).view(-1, 1, 1)
        # Blackwell's leaves experts without rows unwritten (pytorch#172439).
        return _grouped_mm(x.t(), y, offs=self.rows.ends).masked_fill_(self._empty, 0)

    def sums(self, y: Tensor, bias: Tensor, routing: Tensor | None = None) -> Tensor:
        return self.gradient(bias.unsqueeze(1), y.new_ones((y.shape[0], _MULTIPLE)), y, routing=routing)[:, 0]


def _sum(product: Tensor, out: Tensor | None) -> Tensor:
    return product if out is None else out.add_(product)


def _laid_out(factor: Tensor, dtype: torch.dtype, scaling: float) -> Tensor:
    """Row-major, in the products' dtype, the last two sizes multiples of eight: zeros add nothing."""
    experts, n, k = factor.shape
    sizes = -(-n // _MULTIPLE) * _MULTIPLE, -(-k // _MULTIPLE) * _MULTIPLE
    padded = sizes != (n, k)
    if (
        not padded
        and scaling == 1.0
        and factor.dtype == dtype
        and factor.is_contiguous()
        and factor.data_ptr() % 16 == 0
    ):
        return factor
    result = (torch.zeros if padded else torch.empty)((experts, *sizes), dtype=dtype, device=factor.device)
    torch.mul(factor, scaling, out=result[:, :n, :k])
    return result
