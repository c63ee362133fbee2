"""Children of an MLP that compute what can't be told from their forward."""

import importlib

import pytest
import torch
from test_gated_structure import GATED, mlp
from torch import nn
from torch.nn import functional as F


@pytest.fixture(scope="module")
def recognise(lora_fused):
    return importlib.import_module(f"{lora_fused.__name__}.peft.mlp_tracer").recognise


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


def test_a_child_that_defines_how_it_is_called(recognise):
    module = mlp(GATED["module"][0])
    assert recognise(module).gate == "w1"
    module.w3 = CalledTwice(4, 6)
    assert recognise(module) == "w3 is a CalledTwice, which defines how it is called"


def test_an_activation_with_a_buffer(recognise):
    module = mlp(GATED["module"][0])
    module.act = SiluTimesBuffer()
    assert recognise(module) == "act (SiluTimesBuffer) has parameters, buffers or parts of its own"
