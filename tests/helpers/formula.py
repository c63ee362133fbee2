"""The formulas in plain PyTorch, which autograd differentiates: the truth of tests, with nothing of ours but the
masks."""

from __future__ import annotations

import torch


def dropped(lora_fused, x, seed, p):
    """mask ∘ x / (1 - p) with the native op's mask of a seed [1], for x [M, K]."""
    scale = torch.empty_like(x, requires_grad=False)
    lora_fused._ops.ops.dropout(torch.ones_like(x), seed, p, scale)
    return x * scale


def linear(lora_fused, x, operands, scaling, p=0.0, seed=None):
    """y of one projection for x [M, K]: LoRA or DoRA, whose norm is detached, or the base product alone."""
    weight, bias, a, b, lora_bias, magnitude, *_ = operands
    y = x @ weight.t()
    if a is not None:
        d = dropped(lora_fused, x, seed, p) if p else x
        delta = scaling * (d @ a.t() @ b.t())
        if magnitude is not None:
            mag_norm_scale = magnitude / (weight + scaling * b @ a).norm(dim=1).detach()
            delta = delta + (mag_norm_scale - 1) * (d @ weight.t() + delta)
        y = y + delta
    for vector, factor in ((bias, 1.0), (lora_bias, scaling)):
        y = y if vector is None else y + factor * vector
    return y


def group(lora_fused, x, operands, scalings, dropouts, seeds):
    """y of each projection of x; seeds [members], of which those with dropout are read."""
    each = enumerate(zip(operands, scalings, dropouts))
    return [linear(lora_fused, x, of, scaling, p, seeds[i : i + 1]) for i, (of, scaling, p) in each]


def gated(lora_fused, x, operands, scalings, dropouts, seeds, gate_half=None):
    """down(silu(gate(x))·up(x)), down last; gate and up are the halves of one projection where `gate_half` is given."""
    outputs = group(lora_fused, x, operands[:-1], scalings[:-1], dropouts[:-1], seeds[:-1])
    if gate_half is not None:
        halves = outputs[0].chunk(2, dim=-1)
        outputs = [halves[gate_half], halves[1 - gate_half]]
    h = torch.nn.functional.silu(outputs[0]) * outputs[1]
    return group(lora_fused, h, operands[-1:], scalings[-1:], dropouts[-1:], seeds[-1:])[0]
