"""Adding a thing as CONTRIBUTING.md says: a made-up one at the place named there is served, one that is not there is
PEFT's or refused by name, and the places exist."""

import dataclasses
import re
import types

import pytest
import torch
from conftest import ROOT
from helpers.cases import DEVICE, Case, peft_linear, randomise_adapters
from helpers.kernelizing import assert_peft_runs, explain, fused_functions, kernelized
from helpers.mlps import ACTIVATIONS, is_one_function
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("on_device")
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PLACES = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", TEXT, re.MULTILINE)
N, K, R = 8, 16, 2


def test_there_are_places_for_each_of_the_five():
    for title, least in (
        ("### A quantized format", 4),
        ("### An activation of gated MLPs", 4),
        ("### A PEFT variant", 4),
        ("### A GPU architecture", 4),
        ("### A gated-MLP class", 2),
    ):
        section = TEXT.partition(title)[2].partition("\n#")[0]
        assert sum(f"| `{path}` | `{name}` |" in section for path, name in PLACES) >= least, title
    assert len(PLACES) >= 20


@pytest.mark.parametrize("path,name", PLACES, ids=str)
def test_a_place_is_there(path, name):
    assert name in (ROOT / path).read_text()


def test_every_file_that_is_mentioned_is_there():
    paths = set(re.findall(r"`((?:docs|tests|scripts|benchmarks|kernel-src|torch-ext)/[^` ]+)`", TEXT))
    assert len(paths) > 30
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


# ---- a quantized format


@dataclasses.dataclass(frozen=True)
class Halved:
    """Weights stored as twice their value."""

    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32


def rows(operands, quantized, dtype, first, count):
    return (operands.weight[first : first + count].float() / 2).to(dtype)


@pytest.fixture
def halved(lora_fused, monkeypatch):
    monkeypatch.setitem(lora_fused.quantization.FORMATS, Halved, types.SimpleNamespace(rows=rows))


def projections(lora_fused, magnitude):
    """(stored in the made-up format, the same in floating point)"""
    weight, a, b = torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
    spec = lora_fused.ProjectionSpec(quantized=Halved((N, K)))
    stored = lora_fused.Operands((2 * weight).half().float(), None, a, b, None, magnitude)
    dense = stored._replace(weight=stored.weight / 2)
    return lora_fused.Projection(stored, 0.7, spec), lora_fused.Projection(dense, 0.7)


@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
def test_a_format(lora_fused, halved, dora):
    results = []
    for projection in projections(lora_fused, torch.rand(N) + 1.0 if dora else None):
        leaves = [t for t in (projection.operands.lora_a, projection.operands.lora_b) if t is not None]
        trained = [leaf.clone().requires_grad_() for leaf in leaves]
        operands = projection.operands._replace(lora_a=trained[0], lora_b=trained[1])
        x = torch.randn(5, K, generator=torch.Generator(DEVICE).manual_seed(1)).requires_grad_()
        (y,) = lora_fused.functional.dispatch.compute_group(x, (projection._replace(operands=operands),))
        y.square().sum().backward()
        results.append((y.detach(), x.grad, *(leaf.grad for leaf in trained)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class HalvedLinear(nn.Module):
    """A layer of it, as a library of quantized layers would have it."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.stored = nn.Parameter(2 * linear.weight.detach(), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.stored / 2)


def read_halved(lora_fused, layer):
    shape = (layer.out_features, layer.in_features)
    return lora_fused.peft.base_layer.Base(layer.stored, None, shape, Halved(shape, torch.float64))


def on_halved():
    """PEFT's model on that layer. PEFT has no LoRA for it, so its linear is put under one of nn.Linear's."""
    model, layer = peft_linear(Case((6,), 32, 16, 4), torch.float64, torch.float64)
    layer.base_layer = HalvedLinear(layer.base_layer)
    return model


def test_a_layer_of_a_format(lora_fused, halved, monkeypatch):
    model, x = on_halved(), torch.randn(6, 32, dtype=torch.float64)
    base_layer = lora_fused.peft.base_layer
    monkeypatch.setitem(
        base_layer.READERS, (HalvedLinear.__module__, "HalvedLinear"), lambda layer: read_halved(lora_fused, layer)
    )
    monkeypatch.setattr(lora_fused.peft.replaced, "module_reason", lambda cls: None)  # it is in no library
    results = []
    for each in (model, kernelized(lora_fused, model)):
        leaf = x.clone().requires_grad_()
        y = each(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, *(p.grad for p in each.parameters() if p.requires_grad)))
    assert fused_functions(y) == 1
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_layer_without_its_reader_is_peft_s(lora_fused):
    assert_peft_runs(lora_fused, on_halved(), "unknown base layer HalvedLinear", torch.randn(6, 32).double())


def test_a_format_in_a_graph(lora_fused):
    """As numbers and back, or PEFT's own forward by name."""
    ops, specs = lora_fused.compiled.ops, lora_fused.specs
    spec = specs.ProjectionSpec(0.0, False, Halved((16, 32), torch.float64))
    assert ops.unknown_reason(spec) == "torch.compile: weights of format Halved"
    known = specs.FourBit((16, 64), 64, 256, True, torch.bfloat16), specs.EightBit((16, 64))
    assert {type(each) for each in known} == set(lora_fused.quantization.FORMATS)
    for quantized in (None, *known):
        spec = specs.ProjectionSpec(0.25, quantized is None, quantized)
        assert ops.unknown_reason(spec) is None and ops.spec_of(ops.packed(spec), 0.25) == spec


def test_a_format_without_its_row(lora_fused):
    stored, _ = projections(lora_fused, None)
    with pytest.raises(TypeError, match="^weight: format Halved is unknown, expected FourBit or EightBit"):
        lora_fused.functional.dispatch.compute_group(torch.randn(5, K), (stored,))


def test_the_formats_that_native_ops_read_are_the_library_s(lora_fused):
    specs, native = lora_fused.specs, lora_fused.backends.native
    known = [
        specs.FourBit((N, K), 64, 0, False, torch.float32),
        specs.FourBit((N, K), 64, 0, True, torch.float32),
        specs.EightBit((N, K)),
    ]
    assert {type(each) for each in known} == set(lora_fused.quantization.FORMATS)
    names = {each.native_format for each in known} - {None}
    assert names == set(native.FORMATS) - {"floating"}
    for each in known:
        form = lora_fused.quantization.FORMATS[type(each)]
        assert (each.native_format is not None) == hasattr(form, "record")
        if each.native_format is not None:
            record = form.record(each, first_scale=3)
            assert native.FORMATS[record.format] == each.native_format
            assert record[1:] == (N, K, 64, 0, 3, native.QUANTIZED_DTYPES.index(torch.float32))


# ---- an activation


class Softplus(nn.Module):
    """A gated MLP of an activation that nobody knows."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act = nn.Softplus()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


def adapted(mlp):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("mlp", mlp.double())
    names = [name for name, part in mlp.named_modules() if isinstance(part, nn.Linear)]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=names), autocast_adapter_dtype=False)
    randomise_adapters(model, torch.float64)
    return model.train()


def test_an_activation(mlp_tracer, activation_formulas, monkeypatch, lora_fused):
    """A row makes modules be recognised and the chain of operations compute it."""
    mlp = Softplus().double()
    assert "unknown activation" in mlp_tracer.recognise(mlp).reason
    slope = lambda g: torch.where(g > 20.0, 1.0, torch.sigmoid(g))  # noqa: E731, as torch's is
    row = activation_formulas.Activation(F.softplus, slope)
    monkeypatch.setitem(activation_formulas.TABLE, "softplus", row)
    assert mlp_tracer.recognise(mlp).activation == "softplus"
    g, u, dh = (torch.randn(5, 24, dtype=torch.float64, requires_grad=i < 2) for i in range(3))
    expected = F.softplus(g) * u
    torch.testing.assert_close(activation_formulas.gated(g.detach(), u.detach(), "softplus"), expected.detach())
    h, dg, du = activation_formulas.gated_backward(dh, g.detach(), u.detach(), "softplus")
    for ours, theirs in zip((h, dg, du), (expected, *torch.autograd.grad(expected, (g, u), dh)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_activation_without_its_row_is_the_module_s(lora_fused):
    model, x = adapted(Softplus()), torch.randn(5, 16, dtype=torch.float64)
    ours = kernelized(lora_fused, model)
    torch.testing.assert_close(ours(x), model(x))
    assert not is_one_function(ours(x))
    reasons = [row.mlp for row in explain(lora_fused, ours)]
    assert len(reasons) == 3 and all("unknown activation" in reason for reason in reasons)


def test_an_activation_is_one_in_all_three_languages(lora_fused, activation_formulas):
    names = set(activation_formulas.TABLE)
    assert names == set(lora_fused.backends.native.ACTIVATIONS) == set(ACTIVATIONS)
    assert list(activation_formulas.INDEX) == list(activation_formulas.TABLE)
    kernel = ROOT / "torch-ext" / "lora_fused" / "backends" / "triton" / "gated_act.py"
    assert names == set(re.findall(r'ACTIVATION == "(\w+)"', kernel.read_text()))


# ---- a PEFT variant


def test_a_variant_that_is_not_there_is_peft_s(lora_fused):
    from peft.tuners.lora.variants import DoraLinearVariant

    class MadeUp(DoraLinearVariant):
        """DoRA, as far as anybody knows."""

    model, layer = peft_linear(Case((6,), 32, 16, 4, bias=True), torch.float32, torch.float32, use_dora=True)
    assert explain(lora_fused, kernelized(lora_fused, model))[0].fused
    layer.lora_variant["default"] = MadeUp()
    assert_peft_runs(lora_fused, model, "LoRA variant MadeUp")


# ---- a gated-MLP class


class Fluent(nn.Module):
    """A gated MLP of nobody's library; its input is called as no other's."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 24)

    def forward(self, words):
        return self.second(F.gelu(self.third(words)) * self.first(words))


def test_a_gated_mlp_class(lora_fused, monkeypatch):
    """It has no row of its own: the name of its input is all that is missing."""
    layers, model, x = lora_fused.layers, adapted(Fluent()), torch.randn(5, 16, dtype=torch.float64)
    ours = kernelized(lora_fused, model)
    assert {row.mlp for row in explain(lora_fused, ours)} == {"its input is called words"}
    assert not is_one_function(ours(x))

    class OfWords(nn.Module):
        can_torch_compile = True
        has_backward = True

        def forward(self, words):
            return layers._gated_mlp(self, words)

    monkeypatch.setitem(layers.GATED_MLP_BY_INPUT, "words", OfWords)
    named = kernelized(lora_fused, model)
    rows = explain(lora_fused, named)
    assert len(rows) == 3 and all(row.fused and row.group == "base_model.model.mlp" for row in rows), str(rows)
    y = named(x)
    assert is_one_function(y)
    torch.testing.assert_close(y, model(x))
