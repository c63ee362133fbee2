"""Operands of the native ops of groups and gated MLPs, drawn at random, flat as the ops take them."""

import torch

from helpers import formula
from helpers.cases import UNIT, relative

# Of three members: features out, rank, dropout, DoRA, base bias.
GROUPS = {
    "masks": ((72, 8, 0.1, False, False), (40, 16, 0.3, False, True), (64, 32, 0.5, False, False)),
    "ranks": ((72, 64, 0.1, False, False), (48, 72, 0.3, False, False), (64, 160, 0.2, False, False)),
    "mixed": ((72, 16, 0.2, True, True), (40, 24, 0.0, True, True), (64, 8, 0.4, False, True)),
    "odd": ((31, 5, 0.2, False, True), (17, 3, 0.0, False, False), (9, 7, 0.9, True, False)),
    "no masks": ((72, 16, 0.0, True, False), (40, 40, 0.0, False, True), (64, 8, 0.0, False, False)),
}
FIELDS = ("weight", "bias", "lora_a", "lora_b", "lora_bias", "magnitude")
SCALES = 4  # of a quantized weight, which none of these is


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") * shape[-1] ** -0.5


def operands_of(generator, k, n, rank, dora, bias):
    weight, a, b = draw(generator, n, k), draw(generator, rank, k), draw(generator, n, rank)
    magnitude = None
    if dora:
        magnitude = (weight + 0.5 * b @ a).norm(dim=1) * (1 + 0.3 * torch.rand(n, generator=generator, device="cpu"))
    return [weight, draw(generator, n) if bias else None, a, b, None, magnitude]


def poison(device):
    """What is freed here is what the ops are given next."""
    if device == "cuda":
        torch.full((64 * 2**20,), float("nan"), device=device)


def flat_on(operands, device, dtype, adapter):
    flat = []
    for each in operands:
        for name, tensor in zip(FIELDS, each):
            wanted = dtype if name in ("weight", "bias") else adapter
            flat.append(None if tensor is None else tensor.detach().to(device, wanted).requires_grad_(name != "weight"))
        flat += [None] * SCALES
    return flat


def projections_of(lora_fused, flat, scalings, specs):
    operands = lora_fused.specs.unflatten(flat)
    return [lora_fused.Projection(*each) for each in zip(operands, scalings, specs)]


def backward(ys, dys, x, flat):
    torch.autograd.backward(ys, dys)
    grads = [x.grad, *(tensor.grad for tensor in flat if tensor is not None and tensor.requires_grad)]
    return [*ys, *grads]


def compare(ours, truth, dtype, stored):
    assert len(ours) == len(truth)
    for i, (value, exact) in enumerate(zip(ours, truth)):
        error, peak = relative(value, exact)
        bound = stored * UNIT[dtype] + (0.0 if dtype == torch.float64 else exact.numel() ** 0.5 * 2.0**-24)
        assert error <= bound and peak <= 8 * bound, (
            f"result {i} of shape {tuple(exact.shape)}: {error:.3g}, {peak:.3g}"
        )


def check_group(lora_fused, device, m, k, group, dtype, adapter):
    generator = torch.Generator().manual_seed(m)
    specs = [lora_fused.ProjectionSpec(p) for _, _, p, _, _ in group]
    operands = [operands_of(generator, k, n, r, dora, bias) for n, r, _, dora, bias in group]
    operands = [[None if t is None else t.to(dtype).double() for t in each] for each in operands]
    x, seeds = draw(generator, m, k).to(dtype).double(), torch.tensor([5, 2**40 + 1, 77], device="cpu")
    dys = [draw(generator, m, n).to(dtype).double() for n, *_ in group]
    scalings = (0.5, 0.7, 0.5)

    def run(compute, device, dtype, adapter):
        flat, own = flat_on(operands, device, dtype, adapter), x.detach().to(device, dtype).requires_grad_()
        given = [dy.to(device, dtype) for dy in dys]
        poison(device)
        return backward(compute(own, flat), given, own, flat)

    def native(x, flat):
        projections = projections_of(lora_fused, flat, scalings, specs)
        return lora_fused.autograd.group_native.lora_group(x, projections, seeds.to(x.device))

    def truth(x, flat):
        dropouts = [spec.dropout for spec in specs]
        return formula.group(lora_fused, x, lora_fused.specs.unflatten(flat), scalings, dropouts, seeds)

    exact = run(truth, "cpu", torch.float64, torch.float64)
    compare(run(native, device, dtype, adapter), exact, dtype, stored=4)
    if dtype == torch.float32:
        compare(run(native, "cpu", torch.float64, torch.float64), exact, torch.float64, stored=64)
