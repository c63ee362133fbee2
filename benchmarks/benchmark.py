"""The public functions in the form that `kernels benchmark` runs: forward, or forward and backward, each
checked against the formula in plain PyTorch in the same dtype, whose time is the reference.

    kernels benchmark . --iterations 20 --warmup 5

The file's name is the one for which the card says how to run it. Model level, PEFT and the frozen base: compare_*.py.
"""

import torch
from kernels.benchmark import Benchmark

SCALING = 2.0
# Outputs of a few tenths: what the runner allows, 1e-2, is more than their bfloat16 rounding.
SIZE = 0.2


def lora(x, weight, a, b, mag_norm_scale=None):
    """y = x Wᵀ + s·x Aᵀ Bᵀ, times DoRA's mag_norm_scale where one is given, each step in x's dtype."""
    y = x @ weight.t() + (x @ a.t()) @ b.t() * SCALING
    return y if mag_norm_scale is None else (y * mag_norm_scale).to(x.dtype)


def row_norm(weight, a, b):
    """‖W + s·B·A‖ by row, B·A formed."""
    return torch.linalg.vector_norm(weight + SCALING * (b @ a), dim=1, dtype=torch.float32)


class Linear(Benchmark):
    """2048 tokens of 2048 features, three projections to 2048, rank 32, everything in bfloat16; on a CPU 128 tokens of
    512 features in float32."""

    seed = 0
    rank = 32

    def setup(self):
        on_cpu = self.device == "cpu"
        (tokens, k), r = (128, 512) if on_cpu else (2048, 2048), self.rank
        dtype = torch.float32 if on_cpu else torch.bfloat16

        def draw(*shape, size=1.0):
            return (size * torch.randn(*shape)).to(self.device, dtype)

        self.x = draw(tokens, k).requires_grad_()
        self.operands = [
            (draw(k, k, size=SIZE * k**-0.5), draw(r, k, size=k**-0.5).requires_grad_(),
             draw(k, r, size=0.1 * SIZE * r**-0.5).requires_grad_())
            for _ in range(3)
        ]  # fmt: skip
        self.weight, self.a, self.b = self.operands[0]
        self.magnitude = (row_norm(self.weight, self.a, self.b) * 1.1).detach().to(dtype)

    def clear(self):
        for tensor in (self.x, *(t for operands in self.operands for t in operands)):
            tensor.grad = None

    def benchmark_lora(self):
        with torch.no_grad():
            self.out = self.kernel.lora_linear(self.x, self.weight, self.a, self.b, SCALING)

    def verify_lora(self):
        with torch.no_grad():
            return lora(self.x, self.weight, self.a, self.b)

    def benchmark_dora(self):
        with torch.no_grad():
            self.out = self.kernel.lora_linear(self.x, self.weight, self.a, self.b, SCALING, magnitude=self.magnitude)

    def verify_dora(self):
        with torch.no_grad():
            mag_norm_scale = self.magnitude.float() / row_norm(self.weight, self.a, self.b)
            return lora(self.x, self.weight, self.a, self.b, mag_norm_scale)

    def benchmark_lora_backward(self):
        self.clear()
        self.kernel.lora_linear(self.x, self.weight, self.a, self.b, SCALING).float().sum().backward()
        self.out = self.x.grad

    def verify_lora_backward(self):
        self.clear()
        lora(self.x, self.weight, self.a, self.b).float().sum().backward()
        return self.x.grad

    def benchmark_group_backward(self):
        self.clear()
        projections = [
            self.kernel.Projection(self.kernel.Operands(weight, None, a, b), SCALING) for weight, a, b in self.operands
        ]
        ys = self.kernel.lora_linear_group(self.x, projections)
        torch.stack([y.float() for y in ys]).mean(0).sum().backward()
        self.out = self.x.grad

    def verify_group_backward(self):
        self.clear()
        torch.stack([lora(self.x, *operands).float() for operands in self.operands]).mean(0).sum().backward()
        return self.x.grad

    def benchmark_row_norm(self):
        self.out = self.kernel.row_norm(self.weight, self.a, self.b, SCALING)

    def verify_row_norm(self):
        with torch.no_grad():
            return row_norm(self.weight, self.a, self.b)
