"""Operands of the native ops of groups and gated MLPs, drawn at random, flat as the ops take them."""

import torch

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
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5


def operands_of(generator, k, n, rank, dora, bias):
    weight, a, b = draw(generator, n, k), draw(generator, rank, k), draw(generator, n, rank)
    magnitude = (weight + 0.5 * b @ a).norm(dim=1) * (1 + 0.3 * torch.rand(n, generator=generator)) if dora else None
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
