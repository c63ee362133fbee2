"""Products over rows that are sorted by expert, so that each expert's are a block.

`Products` puts them together from products with one matrix an expert, which the backends differ in. `LoopedProducts`
makes these one after the other: for every device and dtype, with one wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...specs import AnyGate, ExpertWeights
from . import gates


class Rows(NamedTuple):
    """The T·k choices of tokens, sorted by expert.

    order [S]: which choice, t·k + j, a row is. ends [E], int32: how many rows an expert and all before it have. Rows
    from ends[-1] on are of no expert; `leaves_out` where there may be some.

    What a backend may know besides, int32: place [S], the row of a choice; tiles [3, ·], of tiles of rows that each are
    of one expert, the expert, the first row, and the end of the expert's rows; tile, the launch configuration that they
    are for. backend: whose products take these rows.
    """

    order: Tensor
    ends: Tensor
    tokens: int
    per_token: int
    leaves_out: bool
    place: Tensor | None = None
    tiles: Tensor | None = None
    backend: str = ""
    tile: Any = None

    @classmethod
    def sort(cls, index: Tensor, experts: int, leaves_out: bool) -> Rows:
        """The rows of `index` [T, k], the expert that each token chose."""
        chosen, order = torch.sort(index.reshape(-1), stable=True)
        numbers = torch.arange(experts, device=index.device, dtype=chosen.dtype)
        ends = torch.searchsorted(chosen, numbers, right=True, out_int32=True)
        tokens, per_token = index.shape
        return cls(order, ends, tokens, per_token, leaves_out)

    def token(self) -> Tensor:
        """[S]: which token a row is of."""
        return self.order // self.per_token

    def expert(self) -> Tensor:
        """[S]: which expert a row is of, the last one for rows of none."""
        return torch.searchsorted(self.ends, self._number(), right=True).clamp_(max=self.ends.numel() - 1)

    def weights(self, routing: Tensor) -> Tensor:
        """[S, 1]: the routing weights [T, k] by row."""
        return routing.reshape(-1, 1)[self.order]

    def _number(self) -> Tensor:
        return torch.arange(self.order.numel(), device=self.ends.device, dtype=torch.int32)

    def clear_outside(self, rows: Tensor) -> Tensor:
        """`rows` [S, ...], written over with zeros where they are of no expert."""
        if self.leaves_out:
            outside = self._number() >= self.ends[-1]
            rows.masked_fill_(outside.view(-1, *[1] * (rows.dim() - 1)), 0)
        return rows

    def by_choice(self, rows: Tensor) -> Tensor:
        """[T, k, ...]: `rows` [S, ...] where their choices were made, zero for choices without a row."""
        choices = self.tokens * self.per_token
        make = rows.new_empty if len(rows) == choices else rows.new_zeros
        placed = make((choices, *rows.shape[1:])).index_copy_(0, self.order, self.clear_outside(rows))
        return placed.view(self.tokens, self.per_token, *rows.shape[1:])

    def combine(self, rows: Tensor) -> Tensor:
        """[T, N]: the sum of each token's `rows` [S, N], deterministic, in their dtype, added up in float32 or
        wider."""
        return self.by_choice(rows).sum(1)


class Matrices(NamedTuple):
    """One matrix an expert that has rows, and the factor of its products, which is not rounded into them."""

    each: Sequence[Tensor]
    scaling: float = 1.0


class Factors(NamedTuple):
    """An adapter's A [E, R, K] and s·B transposed, [E, R, N], in the dtype of the products and contiguous; None where a
    backend reads them otherwise."""

    a: Tensor | None
    b: Tensor | None


NO_FACTORS = Factors(None, None)


class Products:
    """What is made of the rows of one call. `rows` says where they are.

    `project`, `project_back` and `gradients` put together what the six methods before them make, which a backend has:
    `weights` and `factor`, matrices [N, K] by expert in a form of its own, and products of them. A backend that has all
    three otherwise needs `shrink_back` and `sums` alone.
    """

    rows: Rows

    def weights(self, weight: Tensor) -> Any:
        """The matrices of a frozen weight [E, N, K]."""
        raise NotImplementedError

    def factor(self, factor: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Any:
        """The matrices of an adapter's factor [E, ·, ·], scaled and in the dtype of the products."""
        raise NotImplementedError

    def times_transposed(self, x, matrices, out: Tensor | None = None) -> Tensor:
        """x M_eᵀ by expert: x [S, K], M [N, K] each; added to `out` [S, N] where given."""
        raise NotImplementedError

    def times(self, x, matrices, out: Tensor | None = None) -> Tensor:
        """x M_e by expert: x [S, N], M [N, K] each; added to `out` [S, K] where given."""
        raise NotImplementedError

    def outer(self, x, y) -> Tensor:
        """[E, M, N]: x_eᵀ y_e of x [S, M] and y [S, N], zero for experts without rows."""
        raise NotImplementedError

    def sums(self, y, bias: Tensor, routing: Tensor | None = None) -> Tensor:
        """[E, N] in the dtype of a bias: the sum of each expert's rows of y [S, N], times their routing weights."""
        raise NotImplementedError

    def take(self, x: Tensor):
        """x [T, K] by row, for the methods below: [S, K], or what says how to read that."""
        return x[self.rows.token()]

    def lay_out(self, up: ExpertWeights, down: ExpertWeights) -> tuple[Factors, Factors]:
        """The adapters' factors as `project` and `project_back` read them, where both read the same."""
        return NO_FACTORS, NO_FACTORS

    def project(self, x, weights: ExpertWeights, factors: Factors) -> tuple[Tensor, Tensor | None]:
        """(y [S, N], t [S, R]) of x [S, K]: y = x Wᵀ + t (s·B)ᵀ + b, t = x Aᵀ."""
        y, t = self.times_transposed(x, self.weights(weights.weight)), None
        if weights.lora_a is not None:
            t = self.times_transposed(x, self.factor(weights.lora_a, y.dtype))
            self.times_transposed(t, self.factor(weights.lora_b, y.dtype, weights.scaling), y)
        if weights.bias is not None:
            y += weights.bias[self.rows.expert()]
        return y, t

    def project_back(self, dy, weights: ExpertWeights, factors: Factors) -> tuple[Tensor, Tensor | None]:
        """(dx [S, K], dt [S, R]) of dy [S, N]: dx = dy W + dt A, dt = dy (s·B)."""
        dx, dt = self.times(dy, self.weights(weights.weight)), self.shrink_back(dy, weights, factors)
        if dt is not None:
            self.times(dt, self.factor(weights.lora_a, dx.dtype), dx)
        return dx, dt

    def shrink_back(self, dy, weights: ExpertWeights, factors: Factors) -> Tensor | None:
        """dt [S, R] of dy [S, N] alone; None without an adapter."""
        if weights.lora_a is None:
            return None
        return self.times(dy, self.factor(weights.lora_b, weights.weight.dtype, weights.scaling))

    def gradient(
        self, factor: Tensor, short: Tensor, long, scaling: float = 1.0, routing: Tensor | None = None
    ) -> Tensor:
        """s·Σ w·(short longᵀ) over each expert's rows, of short [S, R] and long [S, L]: the gradient of a factor
        [E, R, L], in its dtype."""
        if routing is not None:
            short = (short * self.rows.weights(routing)).to(short.dtype)
        gradient = self.outer(short, long)[:, : factor.shape[1], : factor.shape[2]].to(factor.dtype)
        return gradient if scaling == 1.0 else gradient * scaling

    def gradients(
        self,
        weights: ExpertWeights,
        needs: tuple[bool, bool],
        of_a: tuple[Tensor, Any],
        of_b: tuple[Tensor, Any],
        routing: Tensor | None = None,
        crossed: bool | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dA, dB) of an adapter where `needs` says so, else None: Σ w·(dt xᵀ) of (dt, x) and s·Σ w·(dy tᵀ) of
        (t, dy), rows of each expert; in the shapes that they are stored in unless `crossed`, of `StoredFactors`, is
        None."""
        da = db = None
        if needs[0]:
            da = self.gradient(weights.lora_a, *of_a, routing=routing)
            da = da if crossed is None else as_stored(da, experts_last=crossed)
        if needs[1]:
            db = self.gradient(weights.lora_b.transpose(1, 2), *of_b, weights.scaling, routing)
            db = db.transpose(1, 2) if crossed is None else as_stored(db, experts_last=not crossed)
        return da, db

    def gate(self, z: Tensor, gate: AnyGate) -> Tensor:
        """h [S, I] of z."""
        return gates.value(z, gate)

    def gate_back(
        self, z: Tensor, dh: Tensor, routing: Tensor, gate: AnyGate, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(h, dz, dots) of dh [S, I] before the routing weights [T, k]: dz = gate'(w·dh), dots [T, k] = <dh, h> summed
        in float32 or wider, in `dtype`. dh is overwritten."""
        h, pull = gates.with_pullback(z, gate)
        dots = (dh.to(torch.promote_types(dh.dtype, torch.float32)) * h).sum(1)
        return h, pull(dh.mul_(self.rows.weights(routing))), self.rows.by_choice(dots).to(dtype)

    def combine(self, y: Tensor, routing: Tensor | None = None) -> Tensor:
        """[T, N]: the sum of each token's rows of y [S, N], times their routing weights [T, k]; in the wider dtype of
        the two."""
        if routing is not None:
            weights = self.rows.weights(routing)
            same = torch.promote_types(y.dtype, weights.dtype) == y.dtype
            y = y.mul_(weights) if same else y * weights
        return self.rows.combine(y)


def as_stored(factor: Tensor, experts_last: bool) -> Tensor:
    """[E, R, L] as `StoredFactors` has it: [L, R·E], or [E·R, L]."""
    return factor.permute(2, 1, 0).flatten(1) if experts_last else factor.flatten(0, 1)


class LoopedProducts(Products):
    """One matrix product an expert that has rows; the others' weights are not read."""

    def __init__(self, rows: Rows):
        ends = rows.ends.tolist()
        spans = zip(range(len(ends)), [0, *ends], ends)
        self.spans = [span for span in spans if span[2] > span[1]] or [(0, 0, 0)]
        self.rows = rows._replace(order=rows.order[: ends[-1]], leaves_out=False)

    def weights(self, weight: Tensor) -> Matrices:
        """The matrices of a frozen weight [E, N, K]."""
        return Matrices([weight[expert] for expert, _, _ in self.spans])

    def factor(self, factor: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Matrices:
        """The matrices of an adapter's factor [E, ·, ·], scaled and in the dtype of the products."""
        if len(self.spans) < factor.shape[0]:
            used = torch.tensor([expert for expert, _, _ in self.spans], device=factor.device)
            factor = factor.index_select(0, used)
        return Matrices(factor.to(dtype).contiguous().unbind(0), scaling)

    def times_transposed(self, x: Tensor, matrices: Matrices, out: Tensor | None = None) -> Tensor:
        """x M_eᵀ by expert: x [S, K], M [N, K] each; added to `out` [S, N] where given."""
        return self._times(x, [matrix.t() for matrix in matrices.each], matrices.scaling, out)

    def times(self, x: Tensor, matrices: Matrices, out: Tensor | None = None) -> Tensor:
        """x M_e by expert: x [S, N], M [N, K] each; added to `out` [S, K] where given."""
        return self._times(x, matrices.each, matrices.scaling, out)

    def _times(self, x: Tensor, each: Sequence[Tensor], scaling: float, out: Tensor | None) -> Tensor:
        beta = 0.0 if out is None else 1.0
        if out is None:
            out = x.new_empty((x.shape[0], each[0].shape[1]))
        for (_, start, end), matrix in zip(self.spans, each):
            if beta == 0.0 and scaling == 1.0:
                torch.mm(x[start:end], matrix, out=out[start:end])
            else:
                out[start:end].addmm_(x[start:end], matrix, beta=beta, alpha=scaling)
        return out

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """[E, M, N]: x_eᵀ y_e of x [S, M] and y [S, N], zero for experts without rows."""
        result = x.new_zeros((self.rows.ends.numel(), x.shape[1], y.shape[1]))
        for expert, start, end in self.spans:
            torch.mm(x[start:end].t(), y[start:end], out=result[expert])
        return result

    def sums(self, y: Tensor, bias: Tensor, routing: Tensor | None = None) -> Tensor:
        y = y if routing is None else (y * self.rows.weights(routing)).to(y.dtype)
        result = y.new_zeros((self.rows.ends.numel(), y.shape[1]))
        for expert, start, end in self.spans:
            torch.sum(y[start:end], 0, out=result[expert])
        return result.to(bias.dtype)
