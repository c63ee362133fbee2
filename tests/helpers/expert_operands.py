"""Operands of `lora_experts`, drawn small: E experts, T tokens of which each chooses K, ranks R1 and R2."""

from __future__ import annotations

import torch

E, T, K, H, I, R1, R2 = 5, 10, 2, 32, 16, 3, 6
GATES = {
    "swiglu": dict(),
    "geglu": dict(activation="gelu_tanh"),
    "reglu": dict(activation="relu"),
    "clamped": dict(limit=0.7),
    "gpt-oss": dict(interleaved=True, limit=0.7, slope=1.702, offset=1.0),
    "none": dict(gated=False, activation="relu2"),
    "none, silu": dict(gated=False),
}


def tanh_gate(z):
    g, u = z.chunk(2, -1)
    return torch.tanh(g) * u


class Case:
    """Operands of one call, drawn anew; leaves are those that get gradients."""

    def __init__(
        self, lora_fused, gate="swiglu", bias=False, transposed=False, ranks=(R1, R2), dtype=torch.float64, experts=E
    ):
        specs = lora_fused.specs
        self.gate = tanh_gate if gate == "unknown" else specs.Gate(**GATES[gate])
        width = I if gate.startswith("none") else 2 * I

        def draw(*sizes):
            return torch.randn(*sizes, dtype=torch.float64).mul_(0.4).to(dtype)

        def product(n, k, rank):
            weight = draw(experts, k, n).transpose(1, 2) if transposed else draw(experts, n, k)
            a = draw(experts, rank, k).requires_grad_() if rank else None
            b = draw(n, rank, experts).permute(2, 0, 1).requires_grad_() if rank else None
            return specs.ExpertWeights(weight, draw(experts, n).requires_grad_() if bias else None, a, b, 0.7)

        self.up, self.down = product(width, H, ranks[0]), product(H, I, ranks[1])
        self.x, self.dy = draw(T, H).requires_grad_(), draw(T, H)
        self.index, self.routing = (
            torch.randint(0, experts, (T, K)),
            torch.rand(T, K, dtype=torch.float64).to(dtype).requires_grad_(),
        )
        given = (self.x, self.routing, *self.up[1:4], *self.down[1:4])
        self.leaves = [tensor for tensor in given if tensor is not None]

    @property
    def operands(self):
        return self.x, self.index, self.routing, self.up, self.down, self.gate

    def run(self, function, **options):
        y = function(*self.operands, **options)
        return y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)
