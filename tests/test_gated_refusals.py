"""Children of an MLP that compute what can't be told from their forward."""

import torch
from helpers.mlp_forwards import GATED, mlp_with
from torch import nn
from torch.nn import functional as F


class CalledTwice(nn.Linear):
    def __call__(self, x):
        return super().__call__(super().__call__(x)[..., :4])


class SiluTimesBuffer(nn.Module):
    """A buffer of one, which may be another number later."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return F.silu(x) * self.scale


def test_a_child_that_defines_how_it_is_called(mlp_tracer):
    module = mlp_with(GATED["module"][0])
    assert mlp_tracer.recognise(module).gate == "w1"
    module.w3 = CalledTwice(4, 6)
    assert mlp_tracer.recognise(module).reason == "w3 is a CalledTwice, which defines how it is called"


def test_an_activation_with_a_buffer(mlp_tracer):
    module = mlp_with(GATED["module"][0])
    module.act = SiluTimesBuffer()
    assert mlp_tracer.recognise(module).reason == "act (SiluTimesBuffer) has parameters, buffers or parts of its own"
