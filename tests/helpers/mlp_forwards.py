"""Forwards of gated MLPs for the recogniser, and MLPs of transformers in their smallest sizes."""

import importlib
import inspect

import torch
from torch import nn
from torch.nn import functional as F


class Mlp(nn.Module):
    """What the custom forwards below are written for."""

    def __init__(self):
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.both, self.square = nn.Linear(4, 12), nn.Linear(4, 4)
        self.act, self.norm, self.dropout = nn.SiLU(), nn.LayerNorm(4), nn.Dropout(0.5)
        self.channels = nn.Dropout1d(0.5)
        self.scale = nn.Parameter(torch.ones(()))
        self.extra, self.log = None, []


def mlp_with(forward):
    return type("CustomMlp", (Mlp,), {"forward": forward})()


def halves(self, x):
    gate, up = self.both(x).chunk(2, dim=-1)
    return self.w2(F.silu(gate) * up)


def second_half_is_the_gate(self, x):
    parts = torch.chunk(self.both(x), 2, -1)
    return self.w2(parts[0] * F.gelu(parts[1]))


def in_steps(self, x, mask=None, *args, **kwargs):
    gate = F.gelu(self.w1(x), approximate="tanh")
    return self.w2(torch.mul(self.w3(x), gate))


GATED = {
    "functional": (lambda self, x: self.w2(F.silu(self.w1(x)) * self.w3(x)), ("w1", "w3", "silu")),
    "module": (lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x)), ("w1", "w3", "silu")),
    "swapped factors": (lambda self, x: self.w2(self.w3(x) * self.act(self.w1(x))), ("w1", "w3", "silu")),
    "roles by computation": (lambda self, x: self.w2(self.act(self.w3(x)) * self.w1(x)), ("w3", "w1", "silu")),
    "method product": (lambda self, x: self.w2(self.w3(x).mul(F.gelu(self.w1(x)))), ("w1", "w3", "gelu")),
    "steps and options": (in_steps, ("w1", "w3", "gelu_tanh")),
    "relu": (lambda self, x: self.w2(torch.relu(self.w1(x)) * self.w3(x)), ("w1", "w3", "relu")),
    "squared": (lambda self, x: self.w2(self.w1(x).relu().square() * self.w3(x)), ("w1", "w3", "relu2")),
    "power": (lambda self, x: self.w2(F.relu(self.w1(x)) ** 2 * self.w3(x)), ("w1", "w3", "relu2")),
    "halves": (halves, ("both", "both", "silu")),
    "second half": (second_half_is_the_gate, ("both", "both", "gelu")),
}
SIZES = dict(hidden_size=16, intermediate_size=24, moe_intermediate_size=24, d_model=16, d_ff=24, ffn_dim=24)


def transformers_mlp(name):
    """A tiny module of a transformers class from the first of its package's configurations that fits."""
    package, _, class_name = name.partition(".")
    modeling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    configuration = importlib.import_module(f"transformers.models.{package}.configuration_{package}")
    cls, errors = getattr(modeling, class_name), []
    for _, config_class in inspect.getmembers(configuration, inspect.isclass):
        for extra in ((), (24,)):
            try:
                config = config_class()
                for key, value in SIZES.items():
                    if hasattr(config, key):
                        setattr(config, key, value)
                return cls(config, *extra)
            except Exception as error:
                errors.append(f"{config_class.__name__}: {error}")
    raise AssertionError(f"{name} cannot be built: {errors}")
