"""The native ops of LoRA groups and gated MLPs on a GPU, small and odd: for compute-sanitizer.

Every kernel of ours behind them runs (conversions, dropout, gated activation), forward and backward,
and the results are compared with the same on the CPU in float64.
"""

from __future__ import annotations

import pathlib

import torch
from kernels import get_local_kernel

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPES = ((1, 8, 8, 1), (7, 33, 20, 3), (65, 130, 96, 16), (70, 67, 129, 5))
# Base, adapter, autocast; float32 adapters without autocast are multiplied in two parts.
CASES = (
    (torch.float32, torch.float32, False),
    (torch.bfloat16, torch.float32, True),
    (torch.bfloat16, torch.float32, False),
    (torch.float16, torch.float16, False),
)
# Ten roundings of what is stored, one after another.
TOLERANCE = {torch.float32: 10 * 2.0**-20, torch.bfloat16: 10 * 2.0**-7, torch.float16: 10 * 2.0**-10}


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5


def results(lora_fused, operands, device, dtype, adapter, activation, autocast) -> list[torch.Tensor]:
    """Outputs and gradients of a group of two and of a gated MLP, without dropout."""
    x, gate, up, down = [
        [
            tensor.to(device, adapter if i in (1, 2) else dtype).requires_grad_(i in (1, 2))
            for i, tensor in enumerate(each)
        ]
        for each in operands
    ]
    x = x[0].detach().requires_grad_()
    projections = [
        lora_fused.Projection(lora_fused.Operands(weight, None, a, b), 0.5) for weight, a, b in (gate, up, down)
    ]
    with torch.autocast(device, dtype=dtype, enabled=autocast):
        ys = lora_fused.lora_linear_group(x, projections[:2], backend="native")
        y = lora_fused.functional.dispatch.compute_gated(
            x, projections[:2], projections[2], activation, backend="native"
        )
    (ys[0].float().sum() + ys[1].float().square().sum() + y.float().sum()).backward()
    leaves = [x] + [tensor for each in (gate, up, down) for tensor in each[1:]]
    return [*ys, y, *(leaf.grad for leaf in leaves)]


def main() -> None:
    lora_fused = get_local_kernel(ROOT / "build")
    generator = torch.Generator().manual_seed(0)
    for m, k, n, r in SHAPES:
        adapters = [(draw(generator, n, k), draw(generator, r, k), draw(generator, n, r)) for _ in range(2)]
        down = (draw(generator, k, n), draw(generator, r, n), draw(generator, k, r))
        operands = [(draw(generator, m, k),), *adapters, down]
        for dtype, adapter, autocast in CASES:
            for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
                ours = results(lora_fused, operands, "cuda", dtype, adapter, activation, autocast)
                truth = results(lora_fused, operands, "cpu", torch.float64, torch.float64, activation, False)
                for value, exact in zip(ours, truth):
                    error = (value.double().cpu() - exact).norm() / exact.norm().clamp(min=1e-6)
                    assert error <= TOLERANCE[dtype], (m, k, n, r, dtype, activation, error)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x = draw(generator, m, k).to("cuda", dtype)
            out = torch.full_like(x, float("nan"))
            lora_fused._ops.ops.dropout(x, torch.tensor([m], device="cuda"), 0.3, out)
            lora_fused._ops.ops.dropout(x, torch.tensor([m], device="cuda"), 0.3, out, True)
            assert torch.isfinite(out).all()
    torch.cuda.synchronize()
    print("groups, gated MLPs and dropout: as in float64 on the CPU")


if __name__ == "__main__":
    main()
