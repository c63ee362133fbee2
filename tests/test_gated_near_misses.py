"""Forwards that look like a gated MLP's and are not: each is refused with its reason."""

import re

import pytest
import torch
from helpers.mlp_forwards import mlp_with
from torch.nn import functional as F


class ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def without_gradient(module, x):
    with torch.no_grad():
        return module(x)


def without_autocast(module, x):
    with torch.autocast("cpu", dtype=torch.float16):
        return module(x)


MISSES = {
    "sum": (lambda self, x: self.w2(self.act(self.w1(x)) + self.w3(x)), "not a product"),
    "no gate": (lambda self, x: self.w2(self.act(self.w1(x))), "not a product"),
    "no activation": (lambda self, x: self.w2(self.w1(x) * self.w3(x)), "no activation"),
    "no projection": (lambda self, x: self.square(self.act(x) * self.square(x)), "no activation"),
    "x itself": (lambda self, x: self.square(self.act(self.square(x)) * x), "x is no activation"),
    "two activations": (lambda self, x: self.w2(self.act(self.w1(x)) * self.act(self.w3(x))), "both factors"),
    "another input": (lambda self, x, y: self.w2(self.act(self.w1(x)) * self.w3(y)), "more than one input: y"),
    "a changed input": (lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(self.norm(x))), "both factors"),
    "x plus one": (lambda self, x: self.w2(self.act(self.w1(x + 1)) * self.w3(x)), "add"),
    "dropout of x": (lambda self, x: self.w2(self.act(self.w1(self.dropout(x))) * self.w3(x)), "has parameters"),
    "dropout of up": (lambda self, x: self.w2(self.act(self.w1(x)) * self.dropout(self.w3(x))), "both factors"),
    "unused dropout": (lambda self, x: (self.dropout(x), self.w2(self.act(self.w1(x)) * self.w3(x)))[1], "more than"),
    "dropout of two": (
        lambda self, x: self.w2(self.dropout(self.act(self.w1(x)) * self.w3(x), x)),
        "a dropout's result",
    ),
    "channel dropout": (lambda self, x: self.w2(self.channels(self.act(self.w1(x)) * self.w3(x))), "not a product"),
    "dropout inside": (lambda self, x: self.w2(self.dropout(self.act(self.w1(x))) * self.w3(x)), "random"),
    "functional dropout": (
        lambda self, x: self.w2(F.dropout(self.act(self.w1(x)), 0.5, self.training) * self.w3(x)),
        "dropout is no activation",
    ),
    "norm": (lambda self, x: self.w2(self.act(self.w1(self.norm(x))) * self.w3(x)), "has parameters"),
    "factor two": (lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x) * 2), "mul is no activation"),
    "scaled gate": (lambda self, x: self.w2(self.act(2 * self.w1(x)) * self.w3(x)), "mul is no activation"),
    "scaled result": (lambda self, x: 2 * self.w2(self.act(self.w1(x)) * self.w3(x)), "not a child module's"),
    "own parameter": (lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x) * self.scale), "mul is no activation"),
    "residual": (lambda self, x: x + self.w2(self.act(self.w1(x)) * self.w3(x)), "not a child module's: add"),
    "tuple": (lambda self, x: (self.w2(self.act(self.w1(x)) * self.w3(x)), None), "a tuple"),
    "cast": (lambda self, x: self.w2((self.act(self.w1(x)) * self.w3(x)).to(torch.float32)), "product of two: to"),
    "clamp": (lambda self, x: self.w2(self.act(self.w1(x)).clamp(max=7) * self.w3(x)), "clamp"),
    "detached": (lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x).detach()), "detach"),
    "gate used twice": (lambda self, x: self.w2(self.act(self.w1(x)) * self.w1(x)), "used twice"),
    "gate and both halves": (lambda self, x: self.w2(self.act(self.w1(x)) * self.both(x).chunk(2, -1)[0]), "neither"),
    "one half twice": (
        lambda self, x: self.w2(self.act(self.both(x).chunk(2, -1)[0]) * self.both(x).chunk(2, -1)[0]),
        "neither",
    ),
    "two chunks": (
        lambda self, x: self.w2(self.act(self.both(x).chunk(2, -1)[0]) * self.both(x).chunk(2, -1)[1]),
        "more than a gated MLP",
    ),
    "halves of tokens": (
        lambda self, x: self.w2(self.act(self.w1(x).chunk(2, 0)[0]) * self.w1(x).chunk(2, 0)[1]),
        "__getitem__ is no activation",
    ),
    "unused call": (lambda self, x: (self.norm(x), self.w2(self.act(self.w1(x)) * self.w3(x)))[1], "more than"),
    "hook": (lambda self, x: (x.register_hook(print), self.w2(self.act(self.w1(x)) * self.w3(x)))[1], "more than"),
    "on data": (lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x)) if x.sum() > 0 else x, "reads __bool__"),
    "on device": (lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x)) if x.is_cuda else x, "reads __get__"),
    "on another dtype": (
        lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x)) if x.dtype == torch.float16 else x,
        "not a child module's: x",
    ),
    "on the dtype of a parameter": (
        lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x)) if self.scale.dtype == torch.float32 else x,
        "something else than its input",
    ),
    "on weight": (
        lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x)) if self.scale > 0 else x,
        "something else than its input",
    ),
    "on training": (
        lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x)) if self.training else x,
        "not a child module's: x",
    ),
    "on gradients": (
        lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x)) if torch.is_grad_enabled() else x,
        "not a child module's: x",
    ),
    "roles by training": (
        lambda self, x: self.w2(
            self.act(self.w1(x)) * self.w3(x) if self.training else self.act(self.w3(x)) * self.w1(x)
        ),
        "otherwise in training",
    ),
    "random": (lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x)) + torch.rand(4), "calls rand"),
    "no gradient": (
        lambda self, x: self.w2(self.act(self.w1(x)) * without_gradient(self.w3, x)),
        "calls _set_grad_enabled",
    ),
    "autocast": (lambda self, x: self.w2(self.act(self.w1(x)) * without_autocast(self.w3, x)), "autocast"),
    "custom backward": (lambda self, x: self.w2(self.act(self.w1(ScaleGradient.apply(x))) * self.w3(x)), "autograd"),
    "decorated": (torch.no_grad()(lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x))), "decorator"),
    "inner forward": (lambda self, x: self.w2.forward(self.act(self.w1(x)) * self.w3(x)), "linear"),
    "attribute": (lambda self, x: [setattr(self, "extra", x), self.w2(self.act(self.w1(x)) * self.w3(x))][1], "attr"),
    "list": (lambda self, x: [self.log.append(x), self.w2(self.act(self.w1(x)) * self.w3(x))][1], "attr"),
    "cube": (lambda self, x: self.w2(F.relu(self.w1(x)) ** 3 * self.w3(x)), "relu, pow is an unknown activation"),
    "fails": (lambda self, x: self.nothing(x), "AttributeError"),
    "no input": (lambda self: None, "no positional input"),
}


@pytest.mark.parametrize("name", MISSES)
def test_near_misses(mlp_tracer, name):
    forward, reason = MISSES[name]
    module = mlp_with(forward)
    before, random = dict(module.__dict__), torch.get_rng_state()
    found = mlp_tracer.recognise(module)
    assert isinstance(found, mlp_tracer.Fallback) and re.search(reason, found.reason), found
    assert module.__dict__ == before and module.log == [] and torch.equal(torch.get_rng_state(), random)


class Activation(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


# With the values of SiLU.
GRADIENTS = {
    "straight through": (lambda x: x + (F.silu(x) - x).detach(), "has the values of silu and another gradient"),
    "a function of its own": (lambda x: ScaleGradient.apply(F.silu(x)), "has the values of silu and another gradient"),
    "none": (lambda x: F.silu(x).detach(), "has no gradient"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_another_gradient(mlp_tracer, name):
    function, reason = GRADIENTS[name]
    module = mlp_with(lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x)))
    module.act = Activation(function)
    found = mlp_tracer.recognise(module)
    assert isinstance(found, mlp_tracer.Fallback) and reason in found.reason, found


def test_a_checkpoint_s_hooks_do_not_see_it(mlp_tracer):
    module, seen = mlp_with(lambda self, x: self.w2(self.act(self.w1(x)) * self.w3(x))), []
    with torch.autograd.graph.saved_tensors_hooks(seen.append, lambda packed: packed), torch.autocast("cpu"):
        found = mlp_tracer.recognise(module)
    assert not isinstance(found, mlp_tracer.Fallback) and not seen, found
