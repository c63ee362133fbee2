"""What PEFT's forward would call may be replaced by another tool, on its class or in its module, before or after
`kernelize`: then PEFT's forward runs, and `explain` says what is replaced and by whom. Put back, the model is fused
again."""

import contextlib
import copy
import functools
import importlib.util
import sys

import peft.tuners.lora.dora
import peft.tuners.lora.layer
import peft.tuners.lora.variants
import pytest
import torch
import transformers
from helpers.cases import DEVICE, randomise_adapters
from helpers.kernelizing import explain, kernelize_in_place
from helpers.replaceable import (
    MLP,
    EmbeddingOperands,
    FunctionalMLP,
    Linear,
    Transposed,
    adapted,
    assert_close,
    linear,
    values,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("on_device")


def scaled(own):
    """A replacement as tools write them: it looks like what it wraps, and computes something else."""

    @functools.wraps(own)
    def forward(*args, **kwargs):
        result = own(*args, **kwargs)
        return tuple(1.5 * each for each in result) if isinstance(result, tuple) else 1.5 * result

    return forward


def added(own):
    """One that wraps nothing, of a function of two operands."""

    def forward(x, weight, bias=None):
        return 0.5 + own(x, weight, bias)

    return forward


def of_peft(own):
    """PEFT's LoRA with something between A and B."""

    def forward(self, x, *args, **kwargs):
        y = self.base_layer(x)
        for name in self.active_adapters:
            y = y + self.lora_B[name](torch.tanh(self.lora_A[name](x))) * self.scaling[name]
        return y

    return forward


def renamed(own):
    """A genuine function in another's place."""
    return nn.Tanh.forward


class Replacement:
    """`name` of `owner` becomes what `make` gives for it. A function that a class inherits is put on that class."""

    def __init__(self, model, owner, name, make=scaled):
        self.model, self.owner, self.name, self.make = model, owner, name, make

    def __str__(self):
        return f"{getattr(self.owner, '__name__', self.owner)}.{self.name}-{self.make.__name__}"

    @contextlib.contextmanager
    def active(self):
        mine, own = vars(self.owner).get(self.name), getattr(self.owner, self.name)
        new = self.make(own)
        setattr(self.owner, self.name, staticmethod(new) if isinstance(mine, staticmethod) else new)
        try:
            yield
        finally:
            delattr(self.owner, self.name) if mine is None else setattr(self.owner, self.name, mine)


layer, variants, dora = peft.tuners.lora.layer, peft.tuners.lora.variants, peft.tuners.lora.dora
gemma3 = transformers.models.gemma3.modeling_gemma3
DORA = functools.partial(linear, use_dora=True)
DROPPING = functools.partial(linear, lora_dropout=0.5)
REPLACEMENTS = (
    Replacement(linear, layer.Linear, "forward"),
    Replacement(linear, layer.Linear, "forward", of_peft),
    Replacement(linear, nn.Linear, "forward"),
    Replacement(linear, nn.Linear, "__call__"),
    Replacement(linear, nn.Module, "__call__"),
    Replacement(linear, F, "linear"),
    Replacement(linear, F, "linear", added),
    Replacement(linear, nn.Identity, "forward"),
    Replacement(linear, nn.Identity, "forward", renamed),
    Replacement(DROPPING, nn.Dropout, "forward"),
    Replacement(DROPPING, nn.Dropout, "__call__"),
    Replacement(linear, nn.Identity, "__call__"),
    Replacement(DROPPING, F, "dropout"),
    Replacement(DORA, variants.DoraLinearVariant, "forward"),
    Replacement(DORA, dora.DoraLinearLayer, "forward"),
    Replacement(lambda: adapted(Transposed(), fan_in_fan_out=True), Transposed.layer, "forward"),
    Replacement(lambda: adapted(Transposed(), fan_in_fan_out=True), Transposed.layer, "__call__"),
    Replacement(lambda: adapted(EmbeddingOperands(scaled=True)), gemma3.Gemma3TextScaledWordEmbedding, "__call__"),
    Replacement(lambda: adapted(EmbeddingOperands()), layer.Embedding, "forward"),
    Replacement(lambda: adapted(EmbeddingOperands()), nn.Embedding, "forward"),
    Replacement(lambda: adapted(EmbeddingOperands()), nn.Module, "__call__"),
    Replacement(lambda: adapted(EmbeddingOperands()), F, "embedding"),
    Replacement(lambda: adapted(EmbeddingOperands(), use_dora=True), variants.DoraEmbeddingVariant, "forward"),
    Replacement(lambda: adapted(EmbeddingOperands(), use_dora=True), dora.DoraEmbeddingLayer, "forward"),
    Replacement(lambda: adapted(EmbeddingOperands(scaled=True)), gemma3.Gemma3TextScaledWordEmbedding, "forward"),
    Replacement(lambda: adapted(MLP()), MLP, "forward"),
    Replacement(lambda: adapted(MLP()), nn.SiLU, "forward"),
    Replacement(lambda: adapted(MLP()), nn.SiLU, "__call__"),
    Replacement(lambda: adapted(MLP()), F, "silu"),
    Replacement(lambda: adapted(FunctionalMLP()), F, "silu"),
    Replacement(lambda: adapted(MLP()), F, "linear"),
)
OF_MLPS = ("MLP.", "SiLU.", ".silu")  # the projections are still fused, each alone


@pytest.mark.parametrize("late", (False, True), ids=("before", "after"))
@pytest.mark.parametrize("replacement", REPLACEMENTS, ids=str)
def test_a_replaced_function_is_called(lora_fused, replacement, late):
    theirs = replacement.model()
    evaluate = theirs.peft_config["default"].lora_dropout > 0  # whose masks are others than PEFT's where it is fused
    ours = copy.deepcopy(theirs)
    if late:
        kernelize_in_place(lora_fused, ours)
        for _ in range(2):
            plain = values(ours, evaluate)
    with replacement.active():
        kernelize_in_place(lora_fused, ours)
        expected = values(theirs, evaluate)
        for _ in range(2):
            assert_close(values(ours, evaluate), expected)
        rows = explain(lora_fused, ours)
        if any(part in str(replacement) for part in OF_MLPS):
            assert all(row.mlp and f"is replaced by {__name__}." in row.mlp for row in rows), str(rows)
        else:
            assert not any(row.fused for row in rows)
            for row in rows:
                assert row.reason == row.last and " is replaced by " in row.reason
                assert replacement.name in row.reason and row.reason.partition(" by ")[2].startswith(
                    (__name__, "torch.nn")
                )
    kernelize_in_place(lora_fused, ours)  # what was no gated MLP may be one
    assert_close(values(ours, evaluate), values(theirs, evaluate))
    rows = explain(lora_fused, ours)
    assert all(row.fused and row.last == "fused" and row.mlp is None for row in rows), rows
    if late:  # and the replacement did something
        assert not torch.equal(expected[0], plain[0])


@pytest.mark.parametrize("dora", (False, True))
@pytest.mark.parametrize("which", ("class", "function", "PEFT's class"))
def test_replaced_under_four_bit_weights(lora_fused, which, dora):
    bnb = pytest.importorskip("bitsandbytes")
    import peft.tuners.lora.bnb as peft_bnb
    from helpers.quantized import four_bit

    base = Linear().float()
    base.proj, base.is_loaded_in_4bit = four_bit(nn.Linear(64, 64), torch.float32, DEVICE), True
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["proj"], use_dora=dora))
    randomise_adapters(model, torch.float32)
    ours = kernelize_in_place(lora_fused, copy.deepcopy(model))
    x = torch.randn(9, 64)
    assert explain(lora_fused, ours)[0].fused
    owner = {"class": bnb.nn.Linear4bit, "function": bnb, "PEFT's class": peft_bnb.Linear4bit}[which]
    name = "matmul_4bit" if which == "function" else "forward"
    before = ours(x)
    with Replacement(None, owner, name).active():
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours(x), before, rtol=0.1)
        assert f"{name} is replaced by {__name__}" in explain(lora_fused, ours)[0].reason
    torch.testing.assert_close(ours(x), before)


@pytest.mark.parametrize("owner", (layer.Linear, nn.Linear))
def test_code_that_is_exchanged_in_place(lora_fused, owner):
    """As tools do that reload sources: the function stays the same object."""
    theirs = linear()
    ours = kernelize_in_place(lora_fused, copy.deepcopy(theirs))
    values(ours, False)

    def forward(self, x, *args, **kwargs):
        return x * 3.0

    function, own = owner.forward, owner.forward.__code__
    try:
        function.__code__ = forward.__code__
        assert torch.equal(ours(torch.ones(2, 16).double()), theirs(torch.ones(2, 16).double()))
        assert "forward is replaced" in explain(lora_fused, ours)[0].reason
    finally:
        function.__code__ = own
    assert explain(lora_fused, ours)[0].fused


def test_the_linear_of_deepspeed_is_the_same_mathematics(lora_fused, tmp_path, monkeypatch):
    """ZeRO-3 leaves its own function in the place of F.linear for good. Anybody else's of that name is a
    replacement."""
    source = tmp_path / "linear.py"
    source.write_text(
        "import torch\n\n"
        "def zero3_linear_wrap(x, weight, bias=None):\n"
        "    return torch._C._nn.linear(x, weight, bias)\n"
    )
    name = "deepspeed.runtime.zero.linear"
    spec = importlib.util.spec_from_file_location(name, source)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    theirs = linear()
    ours = kernelize_in_place(lora_fused, copy.deepcopy(theirs))
    monkeypatch.setattr(F, "linear", module.zero3_linear_wrap)
    assert_close(values(ours, False), values(theirs, False))
    assert explain(lora_fused, ours)[0].last == "fused"

    def zero3_linear_wrap(x, weight, bias=None):
        return 2 * torch._C._nn.linear(x, weight, bias)

    zero3_linear_wrap.__module__ = name
    monkeypatch.setattr(F, "linear", zero3_linear_wrap)
    assert_close(values(ours, False), values(theirs, False))
    assert explain(lora_fused, ours)[0].last.startswith("torch.nn.functional.linear is replaced")


def test_an_activation_that_is_exchanged(lora_fused):
    """A module, a function on the module, a forward on the activation itself."""
    theirs = adapted(MLP())
    ours = kernelize_in_place(lora_fused, copy.deepcopy(theirs))
    values(ours, False)
    for change in (
        lambda mlp: setattr(mlp, "act_fn", nn.Tanh()),
        lambda mlp: setattr(mlp, "act_fn", nn.GELU()),
        lambda mlp: setattr(mlp.act_fn, "forward", lambda x: x),
    ):
        for model in (ours, theirs):
            change(model.base_model.model)
        assert_close(values(ours, False), values(theirs, False))


class WithFunction(MLP):
    def __init__(self):
        super().__init__()
        del self.act_fn
        self.act_fn = F.silu


def test_a_function_on_the_module_that_is_exchanged(lora_fused):
    theirs = adapted(WithFunction())
    ours = kernelize_in_place(lora_fused, copy.deepcopy(theirs))
    values(ours, False)
    assert {row.layer for row in explain(lora_fused, ours)} == {"LoraGatedMLP"}
    for function in (torch.tanh, F.gelu, lambda x: F.silu(2 * x)):
        for model in (ours, theirs):
            model.base_model.model.act_fn = function
        assert_close(values(ours, False), values(theirs, False))


def test_between_siblings(lora_fused):
    """The first computes for both; what is replaced before the second is called is called."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.between = nn.Linear(16, 16), nn.Linear(16, 16), contextlib.ExitStack()

        def forward(self, x):
            q = self.q(x)
            self.between.enter_context(replacement.active()) if self.replace else None
            return q * self.k(x)

    replacement = Replacement(None, F, "linear", added)
    base = Two()
    base.between.__deepcopy__ = lambda memo: contextlib.ExitStack()
    base.replace = False
    torch.manual_seed(0)
    theirs = get_peft_model(base.double(), LoraConfig(r=4, target_modules=["q", "k"]), autocast_adapter_dtype=False)
    randomise_adapters(theirs, torch.float64)
    ours = kernelize_in_place(lora_fused, copy.deepcopy(theirs))
    for _ in range(3):
        values(ours, False)
    assert [row.group for row in explain(lora_fused, ours)] == ["q+k", "q+k"]
    found = []
    for model in (ours, theirs):
        inner = model.base_model.model
        inner.replace = True
        with inner.between:
            found.append(values(model, False))
    assert_close(*found)
