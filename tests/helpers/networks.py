"""Small models of random structure for the property tests: what a plan says, built with PEFT."""

from __future__ import annotations

import itertools

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from helpers.cases import randomise_adapters


def pair(left, right):
    """Outputs joined by their features; PEFT's DoRA makes a matrix of a vector."""
    lead = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
    return torch.cat((left.expand(*lead, -1), right.expand(*lead, -1)), -1)


class Stack(nn.Module):
    """One to three layers, one after another."""

    def __init__(self, sizes, bias, layer):
        super().__init__()
        make = (lambda k, n: Conv1D(n, k)) if layer == "conv1d" else (lambda k, n: nn.Linear(k, n, bias=bias))
        for i, (k, n) in enumerate(itertools.pairwise(sizes)):
            self.add_module(f"l{i}", make(k, n))

    def forward(self, x):
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


class Siblings(nn.Module):
    """Two projections of one input, and one of what they give."""

    def __init__(self, sizes, bias):
        super().__init__()
        k, n, m = (*sizes, sizes[-1], sizes[-1])[:3]
        self.l0, self.l1 = nn.Linear(k, n, bias=bias), nn.Linear(k, m, bias=not bias)
        self.l2 = nn.Linear(n + m, sizes[-1], bias=bias)

    def forward(self, x):
        return self.l2(torch.tanh(pair(self.l0(x), self.l1(x))))


class Gated(nn.Module):
    """A gated MLP: l0 the gate, l1 up, l2 down."""

    def __init__(self, sizes, bias):
        super().__init__()
        k, i = sizes[0], sizes[1]
        self.l0, self.l1 = nn.Linear(k, i, bias=bias), nn.Linear(k, i, bias=not bias)
        self.l2 = nn.Linear(i, sizes[-1], bias=bias)

    def forward(self, x):
        return self.l2(F.silu(self.l0(x)) * self.l1(x))


class Network(nn.Module):
    """A body that LoRA adapts, and a head that `modules_to_save` may train."""

    def __init__(self, body, width):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.body(x))


LAYERS = ("l0", "l1", "l2")


def body_of(kind, sizes, bias):
    if kind == "siblings":
        return Siblings(sizes, bias)
    if kind == "gated":
        return Gated(sizes, bias)
    return Stack(sizes, bias, kind)


def names_in(body):
    return [name for name, _ in body.named_children()]


def adapter_config(options, body, kind):
    """LoraConfig of the drawn options; targets and patterns name layers by position."""
    names = names_in(body)
    options = dict(options)
    positions = options.pop("targets")
    targets = sorted({names[i % len(names)] for i in positions})
    rank = options.pop("first_rank")
    if rank is not None:
        options["rank_pattern"] = {targets[0]: rank}
    alpha = options.pop("last_alpha")
    if alpha is not None:
        options["alpha_pattern"] = {targets[-1]: alpha}
    return LoraConfig(target_modules=targets, fan_in_fan_out=kind == "conv1d", **options)


def build(plan):
    """PEFT's model of a plan, in float64, with adapters that are not at their initial values."""
    torch.manual_seed(plan.seed)
    body = body_of(plan.kind, plan.sizes, plan.bias)
    network = Network(body, plan.sizes[-1])
    first, *others = (adapter_config(options, body, plan.kind) for options in plan.adapters)
    model = get_peft_model(network, first)
    for i, config in enumerate(others):
        model.add_adapter(f"a{i + 1}", config)
    model = model.double()
    if plan.randomise:
        randomise_adapters(model, torch.float64)
    model.base_model.set_adapter(list(plan.active))
    for i, name in enumerate(sorted(name for name, _ in model.named_parameters())):
        parameter = model.get_parameter(name)
        if plan.toggles and i % 7 in plan.toggles:
            parameter.requires_grad_(not parameter.requires_grad)
    return model.train(plan.training)
