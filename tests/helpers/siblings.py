"""Linears of one x, each a native call of its own, as a trace of kernelized layers has them."""

from __future__ import annotations

import importlib

import torch

from helpers.native_ops import flat_on, operands_of, projections_of

K = 64
# Of each linear: features out, rank, dropout, DoRA, bias.
GROUPS = {
    "LoRA": ((40, 8, 0.0, False, False), (24, 8, 0.0, False, False), (24, 8, 0.0, False, False)),
    "DoRA": ((40, 8, 0.0, True, False), (24, 16, 0.0, True, True), (32, 4, 0.0, True, False)),
    "bias": ((40, 3, 0.0, False, True), (24, 5, 0.0, False, False), (32, 7, 0.0, False, True)),
    "dropout": ((40, 8, 0.2, False, False), (24, 16, 0.5, False, True), (32, 4, 0.2, False, False)),
    "DoRA with dropout": ((40, 8, 0.2, True, False), (24, 16, 0.2, True, True), (32, 4, 0.3, False, False)),
    "DoRA and LoRA": ((40, 8, 0.0, True, True), (24, 16, 0.0, False, True), (32, 4, 0.0, True, False)),
    "not adapted": ((40, 8, 0.0, False, False), (24, 0, 0.0, False, True), (32, 4, 0.0, True, False)),
}
SCALINGS = (0.5, 0.7, 1.5, 0.25)


class Siblings:
    """Linears of K features in; calls of single ones are what a kernelized layer's trace holds."""

    def __init__(
        self, lora_fused, group=GROUPS["LoRA"], dtype=torch.float64, quantized=None, bf16x3=False, adapter=None
    ):
        """`quantized`: operands and description of weights that are, by the place of the linear."""
        self.lora_fused, self.bf16x3 = lora_fused, bf16x3
        self.specs = [lora_fused.ProjectionSpec(p) for _, _, p, _, _ in group]
        generator = torch.Generator().manual_seed(1)
        operands = [operands_of(generator, K, n, r or 1, dora, bias) for n, r, _, dora, bias in group]
        self.flat = flat_on(operands, "cpu", dtype, adapter or dtype)
        size = len(self.flat) // len(group)
        for i, (_, r, *_) in enumerate(group):
            if r == 0:
                self.flat[size * i + 2] = self.flat[size * i + 3] = None
        for i, (stored, description) in (quantized or {}).items():
            own = self.flat[size * i : size * (i + 1)]
            packed = lora_fused.specs.flatten([stored])
            self.flat[size * i : size * (i + 1)] = [old if new is None else new for new, old in zip(packed, own)]
            self.specs[i] = lora_fused.ProjectionSpec(self.specs[i].dropout, quantized=description)
        self.trained = [tensor for tensor in self.flat if tensor is not None and tensor.requires_grad]
        self.x = torch.randn(2, 5, K, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    def freeze_a(self, but=()):
        size = len(self.flat) // len(self.specs)
        for i in range(len(self.specs)):
            if i not in but:
                self.flat[size * i + 2].requires_grad_(False)
        self.trained = [tensor for tensor in self.trained if tensor.requires_grad]

    def traced(self, body):
        """body(x, call) as a function of tensors, call(i, x) one linear."""

        def function(x, *flat):
            return body(x, lambda i, h: self.single()(i, h, *flat))

        return function

    def single(self):
        """Linear i of x as a function of tensors: (i, x, *flat)."""

        def function(i, x, *flat):
            projections = projections_of(self.lora_fused, list(flat), SCALINGS, self.specs)[i : i + 1]
            seeds = self.lora_fused.functional.dispatch.draw_seeds(x.device, projections)
            return self.lora_fused.autograd.group_native.lora_group(x, projections, seeds, self.bf16x3)[0]

        return function

    def run(self, function):
        """Results, dx and all gradients; None where there is none."""
        torch.manual_seed(7)
        results = function(self.x, *self.flat)
        results = tuple(results) if isinstance(results, (list, tuple)) else (results,)
        wanted = [self.x, *self.trained]
        if not results[0].requires_grad:
            return list(results)
        total = sum(result.double().sum() for result in results if result.requires_grad)
        return [*results, *torch.autograd.grad(total, wanted, allow_unused=True)]


def assert_same(ours, truth, tolerance):
    assert len(ours) == len(truth)
    for i, (value, exact) in enumerate(zip(ours, truth)):
        assert (value is None) == (exact is None), f"result {i}"
        if value is not None:
            bound = tolerance * exact.abs().max().item()
            torch.testing.assert_close(value, exact, rtol=0, atol=bound, msg=lambda text, i=i: f"result {i}: {text}")


def run_by_inductor(lora_fused, group, **options):
    """Three siblings: (siblings, calls a direction and draws in Inductor's code, results)."""
    importlib.import_module(f"{lora_fused.__name__}.compiled.inductor").register()  # as the first layer that is traced
    from torch._inductor.utils import run_and_get_code

    siblings = Siblings(lora_fused, group)
    single = torch._dynamo.allow_in_graph(siblings.single())
    torch._dynamo.reset()

    def function(x, *flat):
        return tuple(single(i, x, *flat) for i in range(3))

    results, codes = run_and_get_code(lambda: siblings.run(torch.compile(function, fullgraph=True, **options)))
    calls = ("lora_forward.default(", "lora_backward.default(", "randint.low_out(")
    return siblings, tuple("".join(codes).count(call) for call in calls), results


def run_by_hand(siblings):
    """What `run_by_inductor` computes, in eager."""
    return siblings.run(lambda x, *flat: tuple(siblings.single()(i, x, *flat) for i in range(3)))
