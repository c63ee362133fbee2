"""Which modules are gated MLPs: custom classes and near misses.

A description is believed only as far as down(f(gate(x))·up(x)), computed from it in float64,
equals what the module computes.
"""

import importlib
import re
import threading

import pytest
import torch
from helpers.cases import assert_computes_gated_mlp
from torch import nn
from torch.nn import functional as F


@pytest.fixture(scope="module")
def structure(lora_fused):
    return importlib.import_module(f"{lora_fused.__name__}.peft.mlp_tracer")


@pytest.fixture(scope="module")
def maths(lora_fused):
    return importlib.import_module(f"{lora_fused.__name__}.backends.reference.activations")


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


def mlp(forward):
    return type("CustomMlp", (Mlp,), {"forward": forward})()


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
def test_what_holds_under_a_condition(structure, maths, name):
    forward, dropouts, asks = CONDITIONAL[name]
    module = mlp(forward)
    found = structure.recognise(module)
    assert (found.gate, found.up, found.down, found.activation) == ("w1", "w3", "w2", "silu")
    assert found.dropouts == dropouts and found.dtype == (torch.float32 if asks else None)
    module.dropout.p = 0.0
    assert_computes_gated_mlp(module, found, maths, 4)
    assert structure.recognise(module).dtype == (torch.float64 if asks else None)
    module.w3.half()  # no dtype that all have
    found = structure.recognise(module)
    assert isinstance(found, str) == asks, found


class Unreadable(nn.Module):
    """Its weight is elsewhere now."""

    @property
    def weight(self):
        raise RuntimeError("not here")


def test_a_weight_that_cannot_be_read(structure):
    for name, found in (("module", "silu"), ("dropout before down", "silu"), ("cast to weight", None)):
        module = mlp((GATED | CONDITIONAL)[name][0])
        module.extra = Unreadable()
        assert getattr(structure.recognise(module), "activation", None) == found


WITH_MODULE = {"module", "swapped factors", "roles by computation"}


@pytest.mark.parametrize("name", GATED)
def test_custom_classes(structure, maths, name):
    forward, (gate, up, activation) = GATED[name]
    module = mlp(forward)
    found = structure.recognise(module)
    assert (found.gate, found.up, found.down, found.activation) == (gate, up, "w2", activation)
    assert found.fused == (gate == up) and found.gate_half == (name == "second half")
    assert found.activation_modules == (("act",) if name in WITH_MODULE else ())
    assert found.input == "x" and found.optional == (("mask", "*args", "**kwargs") if forward is in_steps else ())
    assert_computes_gated_mlp(module, found, maths, 4)


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
    "cube": (lambda self, x: self.w2(F.relu(self.w1(x)) ** 3 * self.w3(x)), "unknown activation relu, pow"),
    "fails": (lambda self, x: self.nothing(x), "AttributeError"),
    "no input": (lambda self: None, "no positional input"),
}


@pytest.mark.parametrize("name", MISSES)
def test_near_misses(structure, name):
    forward, reason = MISSES[name]
    module = mlp(forward)
    before, random = dict(module.__dict__), torch.get_rng_state()
    found = structure.recognise(module)
    assert isinstance(found, str) and re.search(reason, found), found
    assert module.__dict__ == before and module.log == [] and torch.equal(torch.get_rng_state(), random)


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
def test_activations_by_what_they_compute(structure, activation, expected):
    module = mlp(GATED["module"][0])
    module.act = activation
    random = torch.get_rng_state()
    found = structure.recognise(module)
    assert torch.equal(torch.get_rng_state(), random)
    assert isinstance(found, str) if expected is None else found.activation == expected


def test_transformers_activations(structure):
    from transformers.activations import ACT2FN

    expected = {"silu": "silu", "swish": "silu", "relu": "relu", "relu2": "relu2"}
    expected |= dict.fromkeys(("gelu", "gelu_python"), "gelu")
    expected |= dict.fromkeys(("gelu_new", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh")
    seen = {}
    for name in ACT2FN:
        module = mlp(GATED["module"][0])
        module.act = ACT2FN[name]
        found = structure.recognise(module)
        if not isinstance(found, str):
            seen[name] = found.activation
    assert seen == expected


def test_a_replaced_forward_does_not_count(structure):
    """The class is read, not the instance; neither hooks nor replaced forwards of children run."""
    module = mlp(GATED["module"][0])
    module.forward = lambda x: pytest.fail("the instance's forward ran")
    for child in (module, *module.children()):
        child.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    module.w1.forward = module.act.forward = lambda x: pytest.fail("a child's forward ran")
    assert structure.recognise(module).gate == "w1"


def test_an_overridden_helper_does_count(structure):
    """A method that the class's forward calls and the instance replaces is what would run."""

    class WithHelper(Mlp):
        def combine(self, gate, up):
            return self.act(gate) * up

        def forward(self, x):
            return self.w2(self.combine(self.w1(x), self.w3(x)))

    module = WithHelper()
    assert structure.recognise(module).gate == "w1"
    module.combine = (lambda self, gate, up: self.act(up) * gate).__get__(module)
    module.act.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    found = structure.recognise(module)
    assert found.gate == "w3" and found.activation_modules == ("act",)


def test_lora_projections(structure):
    """PEFT's layers are projections like any other, whatever is inside them."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(mlp(GATED["functional"][0]), LoraConfig(target_modules=["w1", "w2"], use_dora=True))
    assert structure.recognise(model.base_model.model).gate == "w1"


@pytest.mark.parametrize(
    "around",
    (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu"), lambda: torch.device("meta")),
    ids=("no_grad", "inference_mode", "autocast", "device"),
)
def test_whatever_is_on_around_it(structure, around):
    module = mlp(GATED["module"][0])
    with around():
        state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert structure.recognise(module).activation == "silu"
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == state


def test_other_threads_may_run_the_module(structure):
    """Nothing global is patched: while one thread traces, another computes and hooks fire."""
    module = mlp(GATED["module"][0])
    inside, computed = threading.Event(), threading.Event()

    def forward(self, x):
        inside.set()
        assert computed.wait(10)
        return self.w2(self.act(self.w1(x)) * self.w3(x))

    traced, found = mlp(forward), []
    thread = threading.Thread(target=lambda: found.append(structure.recognise(traced)))
    thread.start()
    assert inside.wait(10)
    y = module(torch.ones(2, 4))
    computed.set()
    thread.join()
    assert type(y) is torch.Tensor and y.requires_grad and found[0].gate == "w1"
