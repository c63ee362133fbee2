"""Random groups against autograd through the formula itself, in float64: ranks, widths and token numbers of any
alignment, masks, members without an adapter, DoRA, adapters of other dtypes, outputs without a gradient, frozen
matrices, x without a gradient. By the native op, and by the chain of operations that serves what the op does not
take."""

import random

import pytest
import torch
from helpers import formula
from helpers.cases import UNIT, relative
from helpers.native_ops import draw, flat_on, operands_of, poison, projections_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")

RANKS = (1, 3, 4, 8, 12, 16, 40)


class RandomGroup:
    """`stored`: what the adapter's values are rounded to, the others' to `dtype`."""

    def __init__(self, seed, dtype, stored, bf16x3):
        pick, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.m, self.k = pick.choice((0, 1, 5, 33, 70, 300)), pick.choice((7, 24, 64, 136, 520))
        alike = pick.random() < 0.4  # one rank and one scaling, as most models have them
        rank, count = pick.choice(RANKS), pick.randint(1, 4)
        self.operands, self.dropouts, self.scalings, self.kinds = [], [], [], []
        for i in range(count):
            n, r, dora = pick.choice((5, 24, 40, 264)), rank if alike else pick.choice(RANKS), pick.random() < 0.25
            p = 0.0 if (dora and bf16x3) or pick.random() < 0.6 else pick.choice((0.1, 0.5, 1.0))
            # Beside a bias DoRA's values may cancel: its dm is of what a rounded sum leaves then.
            operands = operands_of(self.generator, self.k, n, r, dora, not dora and pick.random() < 0.5)
            if i > 0 and pick.random() < 0.15:
                operands[2:], p = [None] * 4, 0.0
            half = bf16x3 and pick.random() < 0.2  # an adapter in x's dtype beside float32 ones
            kept = [dtype] * 2 + [dtype if half else stored] * 4
            self.operands.append([None if t is None else t.to(to).double() for t, to in zip(operands, kept)])
            self.dropouts.append(p)
            self.scalings.append(0.5 if alike else pick.choice((0.5, 0.7)))
            self.kinds.append((half, pick.choice(("", "", "a", "b"))))  # what is frozen
        self.used = [i == 0 or pick.random() < 0.85 for i in range(count)]
        self.used[0] = count == 1 or pick.random() < 0.85 or not any(self.used[1:])
        self.need_x = pick.random() < 0.8
        self.x = draw(self.generator, self.m, self.k).to(dtype).double()
        self.dys = [draw(self.generator, self.m, each[0].shape[0]).to(dtype).double() for each in self.operands]
        self.seeds = torch.randint(2**62, (count,), generator=self.generator)

    def run(self, compute, device, dtype, adapter):
        """[outputs, dx, gradients of the trained operands] of `compute(x, flat operands)`."""
        flat = flat_on(self.operands, device, dtype, adapter)
        fields = len(flat) // len(self.operands)
        for i, (half, frozen) in enumerate(self.kinds):
            for at, name in ((2, "a"), (3, "b")):
                tensor = flat[fields * i + at]
                if tensor is None:
                    continue
                wanted = dtype if half else tensor.dtype
                flat[fields * i + at] = tensor.detach().to(wanted).requires_grad_(frozen != name)
        x = self.x.detach().to(device, dtype).requires_grad_(self.need_x)
        dys = [dy.to(device, dtype) for dy in self.dys]
        poison(device)
        ys = compute(x, flat)
        pairs = [(y, dy) for y, dy, used in zip(ys, dys, self.used) if used and y.requires_grad]
        if pairs:
            torch.autograd.backward(*zip(*pairs))
        return [*ys, x.grad, *(tensor.grad for tensor in flat if tensor is not None and tensor.requires_grad)]

    def seeds_on(self, device):
        return self.seeds.to(device) if any(self.dropouts) else None

    def natively(self, lora_fused, bf16x3):
        def compute(x, flat):
            specs = [lora_fused.ProjectionSpec(p) for p in self.dropouts]
            projections = projections_of(lora_fused, flat, self.scalings, specs)
            return lora_fused.autograd.group_native.lora_group(x, projections, self.seeds_on(x.device), bf16x3)

        return compute

    def in_a_chain(self, lora_fused):
        def compute(x, flat):
            specs = tuple(lora_fused.ProjectionSpec(p) for p in self.dropouts)
            group = lora_fused.specs.GroupSpec(specs, "reference")
            seeds = self.seeds_on(x.device)
            return lora_fused.autograd.group_eager.LoraLinearFunction.apply(group, self.scalings, None, x, seeds, *flat)

        return compute

    def by_formula(self, lora_fused):
        def compute(x, flat):
            operands = lora_fused.specs.unflatten(flat)
            return formula.group(lora_fused, x, operands, self.scalings, self.dropouts, self.seeds)

        return compute


def compare(ours, truth, dtype):
    assert len(ours) == len(truth)
    for i, (value, expected) in enumerate(zip(ours, truth)):
        assert (value is None) == (expected is None), f"result {i}"
        if value is None or expected.numel() == 0:
            continue
        assert value.shape == expected.shape
        if not expected.any():
            assert not value.any(), f"result {i}"
            continue
        error, _ = relative(value, expected)
        summed = 0.0 if dtype == torch.float64 else expected.numel() ** 0.5 * 2.0**-24
        assert error <= 8 * UNIT[dtype] + summed, f"result {i}: {error:.3g}"


PRECISIONS = {
    "float32": (torch.float32, torch.float32, False),
    "as under autocast": (torch.bfloat16, torch.float32, False),
    "bf16x3": (torch.bfloat16, torch.float32, True),
}


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("dtype, adapter, bf16x3", PRECISIONS.values(), ids=PRECISIONS)
def test_random_group(lora_fused, device, seed, dtype, adapter, bf16x3):
    group = RandomGroup(seed, dtype, adapter if bf16x3 else dtype, bf16x3)
    truth = group.run(group.by_formula(lora_fused), "cpu", torch.float64, torch.float64)
    compare(group.run(group.natively(lora_fused, bf16x3), device, dtype, adapter), truth, dtype)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_random_group_in_a_chain(lora_fused, device, seed, dtype):
    group = RandomGroup(seed, dtype, dtype, bf16x3=False)
    truth = group.run(group.by_formula(lora_fused), "cpu", torch.float64, torch.float64)
    compare(group.run(group.in_a_chain(lora_fused), device, dtype, dtype), truth, dtype)
