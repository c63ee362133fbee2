"""Which modules are gated MLPs: custom classes and near misses.

A description is believed only as far as down(f(gate(x))·up(x)), computed from it in float64,
equals what the module computes.
"""

import threading

import pytest
import torch
from helpers.cases import assert_computes_gated_mlp
from helpers.mlp_forwards import GATED, Mlp, in_steps, mlp_with
from torch import nn
from torch.nn import functional as F


class Cube(nn.Module):
    def forward(self, x):
        return F.relu(x) ** 3


class SiluInTraining(nn.Module):
    def forward(self, x):
        return F.silu(x) if self.training else F.relu(x)


class Clamped(nn.Module):
    def forward(self, x):
        return F.silu(x).clamp(max=6e4)


class TanhInSteps(nn.Module):
    """The tanh GELU in its eager formula."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class Noisy(nn.Module):
    def forward(self, x):
        return F.silu(x) + 1e-300 * torch.rand_like(x)


class InPlace(nn.Module):
    def forward(self, x):
        return F.silu(x, inplace=True)


def cast_to_weight(self, x):
    """As T5 does, some of whose weights may be of another dtype."""
    h = self.dropout(self.act(self.w1(x)) * self.w3(x))
    if isinstance(self.w2.weight, torch.Tensor) and h.dtype != self.w2.weight.dtype:
        h = h.to(self.w2.weight.dtype)
    return self.w2(h)


# With the dropouts on the way, and whether the forward asks for dtypes.
CONDITIONAL = {
    "dropout before down": (
        lambda self, x: self.w2(self.dropout(self.act(self.w1(x)) * self.w3(x))),
        ("dropout",),
        False,
    ),
    "dropout after down": (
        lambda self, x: self.dropout(self.w2(self.act(self.w1(x)) * self.w3(x))),
        ("dropout",),
        False,
    ),
    "the same one twice": (
        lambda self, x: self.dropout(self.w2(self.dropout(self.dropout(self.act(self.w1(x)) * self.w3(x))))),
        ("dropout",),
        False,
    ),
    "cast to weight": (cast_to_weight, ("dropout",), True),
    "on dtype": (
        lambda self, x: x if x.dtype.is_complex else self.w2(self.act(self.w1(x)) * self.w3(x)),
        (),
        True,
    ),
}


@pytest.mark.parametrize("name", CONDITIONAL)
def test_what_holds_under_a_condition(mlp_tracer, activation_formulas, name):
    forward, dropouts, asks = CONDITIONAL[name]
    module = mlp_with(forward)
    found = mlp_tracer.recognise(module)
    assert (found.gate, found.up, found.down, found.activation) == ("w1", "w3", "w2", "silu")
    assert found.dropouts == dropouts and found.dtype == (torch.float32 if asks else None)
    module.dropout.p = 0.0
    assert_computes_gated_mlp(module, found, activation_formulas, 4)
    assert mlp_tracer.recognise(module).dtype == (torch.float64 if asks else None)
    module.w3.half()  # no dtype that all have
    found = mlp_tracer.recognise(module)
    assert isinstance(found, mlp_tracer.Fallback) == asks, found


class Unreadable(nn.Module):
    """Its weight is elsewhere now."""

    @property
    def weight(self):
        raise RuntimeError("not here")


def test_a_weight_that_cannot_be_read(mlp_tracer):
    for name, found in (("module", "silu"), ("dropout before down", "silu"), ("cast to weight", None)):
        module = mlp_with((GATED | CONDITIONAL)[name][0])
        module.extra = Unreadable()
        assert getattr(mlp_tracer.recognise(module), "activation", None) == found


WITH_MODULE = {"module", "swapped factors", "roles by computation"}


@pytest.mark.parametrize("name", GATED)
def test_custom_classes(mlp_tracer, activation_formulas, name):
    forward, (gate, up, activation) = GATED[name]
    module = mlp_with(forward)
    found = mlp_tracer.recognise(module)
    assert (found.gate, found.up, found.down, found.activation) == (gate, up, "w2", activation)
    assert found.fused == (gate == up) and found.gate_half == (name == "second half")
    assert found.activation_modules == (("act",) if name in WITH_MODULE else ())
    assert found.input == "x" and found.optional == (("mask", "*args", "**kwargs") if forward is in_steps else ())
    assert_computes_gated_mlp(module, found, activation_formulas, 4)


ACTIVATIONS = (
    (nn.SiLU(), "silu"),
    (nn.GELU(), "gelu"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (TanhInSteps(), "gelu_tanh"),
    (nn.ReLU(), "relu"),
    (nn.Hardtanh(0.0, 1e40), "relu"),
    (nn.Mish(), None),
    (nn.Identity(), None),
    (nn.ReLU6(), None),
    (nn.LeakyReLU(1e-9), None),
    (nn.PReLU(init=0.0), None),
    (nn.RReLU(0.0, 0.0), None),
    (nn.Softmax(dim=-1), None),
    (nn.GLU(), None),
    (nn.Sequential(nn.SiLU()), None),
    (Cube(), None),
    (SiluInTraining(), None),
    (Clamped(), None),
    (Noisy(), None),
    (InPlace(), None),
)


@pytest.mark.parametrize("activation,expected", ACTIVATIONS, ids=lambda v: str(v).splitlines()[0])
def test_activations_by_what_they_compute(mlp_tracer, activation, expected):
    module = mlp_with(GATED["module"][0])
    module.act = activation
    random = torch.get_rng_state()
    found = mlp_tracer.recognise(module)
    assert torch.equal(torch.get_rng_state(), random)
    assert isinstance(found, mlp_tracer.Fallback) if expected is None else found.activation == expected


def test_transformers_activations(mlp_tracer):
    from transformers.activations import ACT2FN

    expected = {"silu": "silu", "swish": "silu", "relu": "relu", "relu2": "relu2"}
    expected |= dict.fromkeys(("gelu", "gelu_python"), "gelu")
    expected |= dict.fromkeys(("gelu_new", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh")
    seen = {}
    for name in ACT2FN:
        module = mlp_with(GATED["module"][0])
        module.act = ACT2FN[name]
        found = mlp_tracer.recognise(module)
        if not isinstance(found, mlp_tracer.Fallback):
            seen[name] = found.activation
    assert seen == expected


def test_a_replaced_forward_does_not_count(mlp_tracer):
    """The class is read, not the instance; neither hooks nor replaced forwards of children run."""
    module = mlp_with(GATED["module"][0])
    module.forward = lambda x: pytest.fail("the instance's forward ran")
    for child in (module, *module.children()):
        child.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    module.w1.forward = module.act.forward = lambda x: pytest.fail("a child's forward ran")
    assert mlp_tracer.recognise(module).gate == "w1"


def test_an_overridden_helper_does_count(mlp_tracer):
    """A method that the class's forward calls and the instance replaces is what would run."""

    class WithHelper(Mlp):
        def combine(self, gate, up):
            return self.act(gate) * up

        def forward(self, x):
            return self.w2(self.combine(self.w1(x), self.w3(x)))

    module = WithHelper()
    assert mlp_tracer.recognise(module).gate == "w1"
    module.combine = (lambda self, gate, up: self.act(up) * gate).__get__(module)
    module.act.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    found = mlp_tracer.recognise(module)
    assert found.gate == "w3" and found.activation_modules == ("act",)


def test_lora_projections(mlp_tracer):
    """PEFT's layers are projections like any other, whatever is inside them."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(mlp_with(GATED["functional"][0]), LoraConfig(target_modules=["w1", "w2"], use_dora=True))
    assert mlp_tracer.recognise(model.base_model.model).gate == "w1"


@pytest.mark.parametrize(
    "around",
    (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu"), lambda: torch.device("meta")),
    ids=("no_grad", "inference_mode", "autocast", "device"),
)
def test_whatever_is_on_around_it(mlp_tracer, around):
    module = mlp_with(GATED["module"][0])
    with around():
        state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert mlp_tracer.recognise(module).activation == "silu"
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == state


def test_other_threads_may_run_the_module(mlp_tracer):
    """Nothing global is patched: while one thread traces, another computes and hooks fire."""
    module = mlp_with(GATED["module"][0])
    inside, computed = threading.Event(), threading.Event()

    def forward(self, x):
        inside.set()
        assert computed.wait(10)
        return self.w2(self.act(self.w1(x)) * self.w3(x))

    traced, found = mlp_with(forward), []
    thread = threading.Thread(target=lambda: found.append(mlp_tracer.recognise(traced)))
    thread.start()
    assert inside.wait(10)
    y = module(torch.ones(2, 4))
    computed.set()
    thread.join()
    assert type(y) is torch.Tensor and y.requires_grad and found[0].gate == "w1"
