"""Tensors whose memory does not hold their values: views with the negative bit, as z.conj().imag is, and zeros without
memory. Every operand in turn and the incoming gradient give what the same values give without the bit."""

import copy

import pytest
import torch
from helpers.cases import DEVICE, peft_llama
from helpers.embeddings import Case as EmbeddingCase, draw_ids, peft_embedding
from helpers.heads import assert_same, heads, inner, learned, step
from helpers.kernelizing import fused_functions, kernelized
from helpers.mlps import glu

pytestmark = pytest.mark.usefixtures("on_device")

SHAPES = dict(x=(5, 32), weight=(16, 32), lora_a=(4, 32), lora_b=(16, 4), bias=(16,), lora_bias=(16,), magnitude=(16,))
REQUIRED = ("x", "weight", "lora_a", "lora_b")
VARIANTS = {"lora": ("bias",), "lora_bias": ("bias", "lora_bias"), "dora": ("bias", "magnitude")}


def negated(t):
    """t's values as a view of memory that holds -t."""
    return torch._neg_view(t.neg())


def imaginary(t):
    """The same of complex numbers: rows are not contiguous either."""
    return torch.complex(torch.zeros_like(t), t.neg()).conj().imag


FORMS = {"negated": negated, "imaginary": imaginary}


def draw(variant, dtype):
    given = {name: torch.randn(SHAPES[name]) * SHAPES[name][-1] ** -0.5 for name in (*REQUIRED, *VARIANTS[variant])}
    if "magnitude" in given:
        given["magnitude"] = 1.0 + torch.rand(16)
    return {name: t.to(dtype) for name, t in given.items()}


def results(lora_fused, given, dy, dropout, backend):
    """y and every gradient, of leaves that are as given and a frozen weight, as the native op has it."""
    leaves = {name: t.detach().requires_grad_(name != "weight") for name, t in given.items()}
    torch.manual_seed(2)
    y = lora_fused.lora_linear(**leaves, scaling=0.7, dropout=dropout, backend=backend)
    assert ("NativeGroupFunction" in y.grad_fn.name()) == (backend == "native")
    grads = torch.autograd.grad(y, [t for t in leaves.values() if t.requires_grad], dy)
    return [y.detach(), *grads]


@pytest.mark.parametrize("backend", ("native", "reference", "triton"))
@pytest.mark.parametrize("dropout", (0.0, 0.3))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", FORMS)
def test_every_operand(lora_fused, form, variant, dropout, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    given, dy = draw(variant, torch.float32), torch.randn(5, 16)
    right = results(lora_fused, given, dy, dropout, backend)
    for name in (*given, "dy"):
        changed = dict(given, dy=dy)
        changed[name] = FORMS[form](changed[name])
        assert changed[name].is_neg()
        found = results(lora_fused, changed, changed.pop("dy"), dropout, backend)
        for mine, theirs in zip(found, right):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}")


def test_an_input_without_a_gradient(lora_fused):
    """The op alone, with no Function around it."""
    given = draw("dora", torch.float32)
    with torch.no_grad():
        right = lora_fused.lora_linear(**given, scaling=0.7)
        for name, t in given.items():
            torch.testing.assert_close(lora_fused.lora_linear(**given | {name: negated(t)}, scaling=0.7), right)


def test_zeros_without_memory(lora_fused):
    given = draw("dora", torch.float32)
    dy = torch._efficientzerotensor((5, 16), device=DEVICE)
    for backend in ("native", "reference"):
        y, *grads = results(lora_fused, given, dy, 0.3, backend)
        assert y.abs().max() > 0 and all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    x = torch._efficientzerotensor((5, 32), device=DEVICE)
    with torch.no_grad():
        y = lora_fused.lora_linear(**given | {"x": x}, scaling=0.7)
    torch.testing.assert_close(y, given["bias"].expand(5, 16))


@pytest.mark.parametrize("form", FORMS)
def test_row_norm(lora_fused, form):
    given = [torch.randn(16, 32), torch.randn(4, 32), torch.randn(16, 4)]
    right = lora_fused.row_norm(*given, 0.7)
    for i in range(3):
        torch.testing.assert_close(
            lora_fused.row_norm(*[FORMS[form](t) if i == j else t for j, t in enumerate(given)], 0.7), right
        )


def test_gain_and_dropout(lora_fused):
    magnitude, norm, x = torch.rand(16) + 1.0, torch.rand(16) + 1.0, torch.randn(5, 32)
    mag_norm_scale, mask = (
        lora_fused.backends.native.mag_norm_scale(magnitude, norm),
        lora_fused.specs.Mask(torch.tensor([7]), 0.3),
    )
    assert torch.equal(lora_fused.backends.native.mag_norm_scale(negated(magnitude), norm), mag_norm_scale)
    assert torch.equal(lora_fused.backends.native.mag_norm_scale(magnitude, negated(norm)), mag_norm_scale)
    dropped = lora_fused.backends.native.dropout(x, mask, torch.float32)
    assert torch.equal(lora_fused.backends.native.dropout(negated(x), mask, torch.float32), dropped)


@pytest.mark.parametrize("name", ("absmax", "nested_absmax", "nested_code", "offset"))
@pytest.mark.parametrize("kernel", ("native", "triton"))
def test_the_scales_of_four_bits(lora_fused, name, kernel):
    pytest.importorskip("bitsandbytes")
    from helpers.quantized import random_four_bit

    if kernel == "triton":
        pytest.importorskip("triton")
    nested = name != "absmax"
    operands, spec, *_ = random_four_bit(lora_fused, (16, 64), 64, "nf4", nested, torch.float32, DEVICE)
    changed = operands._replace(**{name: negated(getattr(operands, name))})
    dequantize = (
        lora_fused.backends.select if kernel == "native" else lora_fused.backends.select.get("triton")
    ).dequantize_4bit
    right, found = (dequantize(each, spec, 0, torch.empty(16, 64)) for each in (operands, changed))
    assert torch.equal(found, right)
    # In a group, of whose ops the scales are a list.
    a, b, x = torch.randn(4, 64), torch.randn(16, 4), torch.randn(5, 64)
    projections = [
        lora_fused.Projection(
            each._replace(lora_a=a, lora_b=b, magnitude=torch.ones(16)), 0.7,
            lora_fused.specs.ProjectionSpec(quantized=spec),
        )
        for each in (operands, changed)
    ]  # fmt: skip
    right, found = lora_fused.functional.dispatch.compute_group(x, projections)
    torch.testing.assert_close(found, right)


def with_negative_parameters(model):
    """Every parameter as a view with the bit, by the same values."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module._parameters[name] = torch.nn.Parameter(negated(parameter.data), parameter.requires_grad)
    assert all(parameter.is_neg() for parameter in model.parameters())
    return model


@pytest.mark.parametrize(
    "config", ({}, dict(use_dora=True), dict(lora_bias=True, bias="all")), ids=("lora", "dora", "biases")
)
def test_layers_of_a_group(lora_fused, config):
    model, x = heads(**config), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, with_negative_parameters(copy.deepcopy(model)), x)
    result = step(ours, x)
    assert fused_functions(result[0]) == 1
    assert_same(result, step(model, x))


@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=("lora", "dora"))
def test_a_gated_mlp(lora_fused, config):
    model, x = glu(**config), torch.randn(5, 32, dtype=torch.float64)
    ours = kernelized(lora_fused, with_negative_parameters(copy.deepcopy(model)))
    results = []
    for each in (ours, model):
        leaf = negated(x).requires_grad_()
        y = inner(each)(leaf)
        y.backward(negated(torch.ones_like(y)))
        results.append((y, {"x": leaf.grad, **{n: p.grad for n, p in each.named_parameters() if p.requires_grad}}))
    assert "NativeGatedFunction" in results[0][0].grad_fn.name()
    assert_same(*results)


@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
def test_an_embedding(lora_fused, dora):
    case = EmbeddingCase((2, 9), 33, 24, 5, padding=3)
    model = peft_embedding(case, torch.float32, torch.float32, DEVICE, dora)
    ids = draw_ids(case, DEVICE)
    ours = kernelized(lora_fused, with_negative_parameters(copy.deepcopy(model)))
    results = []
    for each in (ours, model):
        y = each(ids)
        assert ("LoraEmbeddingFunction" in y.grad_fn.name()) == (each is ours)
        y.backward(negated(torch.linspace(-1, 1, y.numel()).view_as(y)))
        results.append({"y": y.detach(), **{n: p.grad for n, p in each.named_parameters() if p.requires_grad}})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_whole_model(lora_fused):
    model = peft_llama(torch.float64, use_dora=True)
    ours = kernelized(lora_fused, with_negative_parameters(copy.deepcopy(model)))
    ids = torch.randint(0, 64, (2, 7))
    losses = [each(input_ids=ids, labels=ids).loss for each in (ours, ours, model)]
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-12, atol=0)
    torch.testing.assert_close(losses[1], losses[2], rtol=1e-12, atol=0)


def test_a_base_that_is_called(lora_fused):
    """The delta on a base product of the base module's own."""
    base, x = torch.randn(5, 16), torch.randn(5, 32)
    a, b = torch.randn(4, 32), torch.randn(16, 4)

    def run(base, x, a, b):
        operands = lora_fused.Operands(None, lora_a=a, lora_b=b)
        spec = lora_fused.specs.ProjectionSpec(dropout=0.3)
        torch.manual_seed(2)
        return lora_fused.functional.delta.add_delta(base, x, lora_fused.Projection(operands, 0.7, spec), False)

    right = run(base, x, a, b)
    for i in range(4):
        found = run(*[negated(t) if i == j else t for j, t in enumerate((base, x, a, b))])
        torch.testing.assert_close(found, right)
