"""float16: whatever PEFT's order of operations keeps in range is finite here, and as good, on every path: t =
dropout(x) Aᵀ near the limit under a large scaling, B zero, sums before DoRA's mag_norm_scale beyond the limit,
gradients."""

import contextlib
import copy
import itertools
import types

import pytest
import torch
from helpers.cases import DEVICE, VARIANTS, Case, DrawnDropout, assert_as_good, peft_linear
from helpers.embeddings import Case as EmbeddingCase, draw_ids, peft_embedding
from helpers.heads import heads, inner
from helpers.kernelizing import kernelized
from helpers.mlps import glu

pytestmark = pytest.mark.usefixtures("on_device")
HALF, LIMIT = torch.float16, 65504.0
CASE = Case((12,), 64, 48, 8, bias=True)
SCALINGS = (0.01, 1.0, 2.0, 3.0, 16.0, 128.0, -1024.0)
BACKENDS = ("native", "reference", "triton")


@contextlib.contextmanager
def no_scope():
    yield


def run(model, x, dy, autocast=False):
    x = x.detach().clone().requires_grad_()
    with torch.autocast(DEVICE, dtype=HALF) if autocast else no_scope():
        y = model(x)
    y.backward(dy.to(y.dtype))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def assert_in_range(ours, theirs, truth, must_be=True):
    """Finite wherever PEFT's is, and where all of it is as good as PEFT's. PEFT's is finite where it `must_be`."""
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, value in ours.items():
        there = theirs[name].isfinite()
        assert not must_be or there.all(), f"{name}: the case is none"
        assert value.isfinite()[there].all(), f"{name}: {value.isfinite().logical_not().sum()} not finite"
        if there.all():
            assert_as_good(name, value, theirs[name], truth[name], HALF)


def set_magnitude(layer, scaling, size=1.0):
    """About `size` times the norm, where there is a magnitude."""
    if "default" in layer.lora_magnitude_vector:
        weights = [
            part.weight.double() for part in (layer.base_layer, layer.lora_B["default"], layer.lora_A["default"])
        ]
        norm = (weights[0] + scaling * weights[1] @ weights[2]).norm(dim=1)
        layer.lora_magnitude_vector["default"].weight.copy_(norm * size * (0.7 + 0.6 * torch.rand_like(norm)))


def large_down(model, scaling, t, delta=100.0):
    """x that makes t = x Aᵀ about as large as given, the delta and the base product about `delta`, and a dy whose
    gradients are in range."""
    k, r = CASE.k, CASE.r
    x = (t / k**0.5) * torch.randn(*CASE.lead, k)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.normal_().clamp_(-2, 2)
            elif "lora_B" in name and name.endswith("weight"):
                p.normal_().mul_(delta / (abs(scaling) * t * r**0.5))
            elif "base_layer.weight" in name:
                p.normal_().mul_(delta / t)
        set_magnitude(model.base_model.model.proj, scaling)
        worst = max(
            (x.to(HALF).double() @ p.double().t()).abs().max()
            for name, p in model.named_parameters() if "lora_A" in name
        )  # fmt: skip
        x = x * (t / worst)  # dropout still doubles a sum at most
    return x.to(HALF), (0.02 / max(1.0, abs(scaling)) * torch.randn(*CASE.lead, CASE.n)).to(HALF)


def choose(lora_fused, monkeypatch, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(lora_fused.functional.dispatch, "_choose", lambda *_: backend)


def compare(lora_fused, model, x, dy, autocast=False, must_be=True):
    plain = copy.deepcopy(model)
    drop = plain.base_model.model.proj.lora_dropout
    if isinstance(drop["default"], torch.nn.Dropout):
        drop["default"] = DrawnDropout(lora_fused, drop["default"].p, x.shape, DEVICE)
    truth = run(copy.deepcopy(plain).double(), x.double(), dy.double())
    ours = kernelized(lora_fused, model)
    theirs, mine = run(plain, x, dy, autocast), run(ours, x, dy, autocast)
    assert_in_range(mine, theirs, truth, must_be)
    return mine


def adapted(variant, scaling, base=HALF, adapter=HALF, **config):
    case = Case(CASE.lead, CASE.k, CASE.n, CASE.r, CASE.bias, scaling)
    return peft_linear(case, base, adapter, DEVICE, **{**VARIANTS[variant], **config})[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_large_t(lora_fused, monkeypatch, variant, scaling, backend):
    choose(lora_fused, monkeypatch, backend)
    model = adapted(variant, scaling)
    t = 20000.0 if "dropout" in variant else 60000.0
    x, dy = large_down(model, scaling, t)
    compare(lora_fused, model, x, dy)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("variant", ("lora", "dora", "dropout"))
def test_a_large_t_under_autocast(lora_fused, variant, scaling):
    model = adapted(variant, scaling, torch.float32, torch.float32)
    x, dy = large_down(model, scaling, 20000.0)
    compare(lora_fused, model, x, dy, autocast=True)


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize("variant", ("lora", "dora", "dora-dropout", "lora_bias"))
def test_adapters_in_float32(lora_fused, monkeypatch, variant, backend):
    """PEFT's own default for a base in float16, without autocast: t is beyond float16 even without its scaling."""
    choose(lora_fused, monkeypatch, backend)
    model = adapted(variant, 128.0, HALF, torch.float32)
    x, dy = large_down(model, 128.0, 50000.0)
    with torch.no_grad():
        model.base_model.model.proj.lora_A["default"].weight.mul_(50.0)
        model.base_model.model.proj.lora_B["default"].weight.div_(50.0)
    compare(lora_fused, model, x, dy)


def test_triton_is_not_chosen_for_adapters_in_float32(lora_fused, monkeypatch):
    """It stores t and dt in float16."""
    asked = []
    monkeypatch.setattr(lora_fused.backends.select, "choose", lambda *_: asked.append(True) or "native")
    x = types.SimpleNamespace(is_cuda=True, dtype=HALF, device=torch.device("cuda"), shape=(3, 8))
    for adapter, lora_dtype, chosen in ((torch.float32, None, False), (HALF, None, True), (torch.float32, HALF, True)):
        asked.clear()
        lora_a, lora_b = torch.empty(2, 8, dtype=adapter), torch.empty(4, 2, dtype=adapter)
        projection = lora_fused.Projection(lora_fused.Operands(torch.empty(4, 8), lora_a=lora_a, lora_b=lora_b), 2.0)
        path = lora_fused.specs.NativePath(True)
        assert lora_fused.functional.dispatch._choose(x, (projection,), path, lora_dtype) == "native"
        assert bool(asked) == chosen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ("lora", "dropout", "dora"))
def test_at_initialisation(lora_fused, monkeypatch, variant, backend):
    """B is zero: inf·0 is not a number."""
    choose(lora_fused, monkeypatch, backend)
    model = adapted(variant, 512.0)
    x, dy = large_down(model, 512.0, 20000.0)
    with torch.no_grad():
        model.base_model.model.proj.lora_B["default"].weight.zero_()
    mine = compare(lora_fused, model, x, dy)
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in mine.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", (1.0, 1024.0))
@pytest.mark.parametrize("variant", ("dora", "dora-dropout"))
def test_before_the_gain(lora_fused, monkeypatch, variant, scaling, backend):
    """x Wᵀ + s·t Bᵀ is beyond the limit, and the mag_norm_scale brings it back: of two terms below the limit, or of a
    delta whose scaling takes it there."""
    choose(lora_fused, monkeypatch, backend)
    model = adapted(variant, scaling)
    layer, k, r = model.base_model.model.proj, CASE.k, CASE.r
    base, delta = (25000.0, 30000.0) if scaling == 1.0 else (1000.0, 150000.0)
    parts = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        for part, size in zip(parts, (base / k, 10.0, delta / (10.0 * k * r * scaling))):
            part.uniform_(0.9, 1.0).mul_(size)
        set_magnitude(layer, scaling, 3e-3)
        x = torch.empty(*CASE.lead, k).uniform_(0.9, 1.0).to(HALF)
        w, a, b = (part.double() for part in parts)
        assert (x.double() @ w.t() + scaling * (x.double() @ a.t()) @ b.t()).min() > 0.7 * (base + delta)
    compare(lora_fused, model, x, 1e-2 * torch.randn(*CASE.lead, CASE.n).to(HALF))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_b_that_cancels(lora_fused, monkeypatch, backend):
    """s·b_B alone is beyond the limit; PEFT adds b_B to t Bᵀ first."""
    choose(lora_fused, monkeypatch, backend)
    model = adapted("lora_bias", 1024.0)
    layer, x = model.base_model.model.proj, torch.ones(*CASE.lead, CASE.k, dtype=HALF)
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(1.0)
        layer.lora_B["default"].weight.fill_(0.25)  # t Bᵀ is 128
        layer.lora_B["default"].bias.fill_(-127.0)
    compare(lora_fused, model, x, 1e-3 * torch.randn(*CASE.lead, CASE.n).to(HALF))


def test_a_small_scaling_of_what_peft_cannot_hold(lora_fused):
    """t Bᵀ is beyond the limit before the scaling: PEFT's result is not finite, and ours is."""
    model = adapted("lora", 0.01)
    x, dy = large_down(model, 0.01, 30000.0, 3000.0)
    mine = compare(lora_fused, model, x, dy, must_be=False)
    assert all(value.isfinite().all() for value in mine.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=("lora", "dora"))
def test_a_group_of_several_scalings(lora_fused, monkeypatch, config, backend):
    choose(lora_fused, monkeypatch, backend)
    model = heads(HALF, lora_alpha=512, rank_pattern={"k": 8}, alpha_pattern={"v": 2.0, "k": 24.0}, **config)
    scalings = [getattr(inner(model), name).scaling["default"] for name in "qkv"]
    assert scalings == [128.0, 3.0, 0.5]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.normal_().clamp_(-2, 2)
            elif "lora_B" in name:
                p.mul_(1e-4)
    x = 1000 * torch.randn(9, 32)
    truth_model, dy = copy.deepcopy(model).double(), 1e-3 * torch.randn(9, 36)

    def run_all(each, x, dy):
        each.zero_grad()
        return run(inner(each), x, dy)

    ours = kernelized(lora_fused, model)
    run_all(ours, x.to(HALF), dy.to(HALF))  # siblings are seen
    theirs = run_all(model, x.to(HALF), dy.to(HALF))
    truth = run_all(truth_model, x.to(HALF).double(), dy.to(HALF).double())
    assert_in_range(run_all(ours, x.to(HALF), dy.to(HALF)), theirs, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=("lora", "dora"))
def test_a_gated_mlp(lora_fused, monkeypatch, config, backend):
    choose(lora_fused, monkeypatch, backend)
    model = glu(HALF, lora_alpha=2048, **config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.mul_(100.0)
            elif "lora_B" in name:
                p.mul_(2e-6)
            elif "magnitude" not in name:
                p.mul_(0.1)
        for layer in inner(model).mlp.children():
            set_magnitude(layer, 512.0)
    x, dy = 50 * torch.randn(9, 32), 1e-3 * torch.randn(9, 24)
    truth = run(inner(copy.deepcopy(model).double()), x.to(HALF).double(), dy.to(HALF).double())
    theirs = run(inner(copy.deepcopy(model)), x.to(HALF), dy.to(HALF))
    ours = inner(kernelized(lora_fused, model))
    assert "Gated" in ours(x.to(HALF)).grad_fn.name()
    mine = run(ours, x.to(HALF), dy.to(HALF))
    for name, value in mine.items():  # of values that are rounded between three products
        assert theirs[name].isfinite().all() and value.isfinite().all(), name
        assert_as_good(name, value, theirs[name], truth[name], HALF, stored=4)


@pytest.mark.parametrize("scaling", (0.01, 2.0, 512.0))
@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
def test_an_embedding(lora_fused, dora, scaling):
    case = EmbeddingCase((40,), 33, 48, 8, scaling=scaling)
    model = peft_embedding(case, HALF, HALF, DEVICE, dora)
    small = scaling < 1.0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_embedding_A" in name:
                p.normal_().clamp_(-2, 2).mul_(2.0 if small else 300.0)
            elif "lora_embedding_B" in name:
                p.uniform_(0.5, 1.0).mul_(1.0 if small else 1.0 / scaling)
    ids = draw_ids(case, DEVICE)
    # s·dy is in range; where s is small dy B alone is not.
    dy = torch.empty(40, 48).uniform_(0.5, 1.0) * (8000.0 if small else 1.0 / scaling)
    results = []
    for each, cast in ((copy.deepcopy(model).double(), torch.float64), (model, HALF), (None, HALF)):
        each = each or kernelized(lora_fused, copy.deepcopy(model))
        each.zero_grad()
        y = each(ids)
        y.backward(dy.to(HALF).to(cast))
        results.append({"y": y.detach(), **{n: p.grad.clone() for n, p in each.named_parameters() if p.requires_grad}})
    truth, theirs, ours = results
    assert all(value.isfinite().all() for name, value in theirs.items() if "magnitude" not in name)
    assert_in_range(ours, theirs, truth, must_be=not dora)


def called(base, x, dy, a, b, magnitude, bias, norm, scaling):
    """PEFT's order of operations on a base product of the base layer's own."""
    lora = (x @ a.t()) @ b.t()
    if magnitude is None:
        return base + lora * scaling
    mag_norm_scale = (magnitude / norm).view(1, -1)
    return base + ((mag_norm_scale - 1) * (base - bias) + mag_norm_scale * lora * scaling)


@pytest.mark.parametrize("scaling", (0.5, 3.0, 1024.0))
@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
def test_a_base_that_is_called(lora_fused, dora, scaling):
    n, k, r, m = 24, 32, 4, 7
    codes, scale = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) + 0.5
    t, up = 30000.0, min(1e5, 1e4 * scaling) if dora else 20.0
    x, a = (t / k / 2 * torch.randn(m, k).clamp(-2, 2)).to(HALF), torch.randn(r, k).clamp(-2, 2).to(HALF)
    b = (torch.randn(n, r) * up / (t * scaling)).to(HALF)
    base, dy = (10 * torch.randn(m, n)).to(HALF), ((1e-2 if dora else 1e-4) * torch.randn(m, n)).to(HALF)
    bias = torch.randn(n).to(HALF)
    weight = codes.double() * scale.double()[:, None] / 127
    norm = (weight + scaling * b.double() @ a.double()).norm(dim=1)
    magnitude = (norm * 3e-3).to(HALF) if dora else None
    spec = lora_fused.specs.ProjectionSpec(quantized=lora_fused.specs.EightBit((n, k)))

    def results(of, cast):
        given = [None if v is None else v.to(cast).requires_grad_() for v in (base, x, a, b, magnitude)]
        y = of(*given)
        grads = torch.autograd.grad(y, [v for v in given if v is not None], dy.to(cast))
        names = ("base", "x", "A", "B", "magnitude")
        return {"y": y.detach(), **dict(zip(names, grads))}

    def ours(base, x, a, b, magnitude):
        operands = lora_fused.Operands(codes, bias, a, b, None, magnitude, scale)
        return lora_fused.functional.delta.add_delta(base, x, lora_fused.Projection(operands, scaling, spec), False)

    def peft(base, x, a, b, magnitude):
        return called(base, x, dy, a, b, magnitude, bias.to(x.dtype), norm.to(x.dtype), scaling)

    theirs, truth = results(peft, HALF), results(peft, torch.float64)
    assert_in_range(results(ours, HALF), theirs, truth)


@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
def test_a_base_in_four_bits(lora_fused, quant_type):
    pytest.importorskip("bitsandbytes")
    from helpers.quantized import random_four_bit

    operands, spec, *_ = random_four_bit(lora_fused, (48, 64), 64, quant_type, True, HALF, DEVICE)
    dense = lora_fused.quantization.dequantize(operands, spec, HALF)
    a, b = torch.randn(8, 64).to(HALF), (1e-6 * torch.randn(48, 8)).to(HALF)
    x = (2000 * torch.randn(9, 64)).to(HALF)
    packed = lora_fused.Projection(
        operands._replace(lora_a=a, lora_b=b), 1024.0, lora_fused.specs.ProjectionSpec(quantized=spec)
    )
    (y,) = lora_fused.functional.dispatch.compute_group(x, (packed,))
    truth = x.double() @ dense.double().t() + 1024.0 * (x.double() @ a.double().t()) @ b.double().t()
    theirs = x @ dense.t() + 1024.0 * ((x @ a.t()) @ b.t())
    assert_in_range({"y": y}, {"y": theirs}, {"y": truth})


def test_the_rule_is_one(lora_fused):
    """t of the native op and of the operations is t without what is beyond 1, bit for bit the same rule."""
    split = lora_fused.specs.split_scaling
    values = [0.0, 0.5, 1.0, 2.0, 4.0, 1024.0, 1.0 + 2**-52, 3.0, 100.0, 2.0**40, 1e-30]
    x, a, b, w = (torch.randn(*shape, dtype=HALF) for shape in ((5, 16), (4, 16), (8, 4), (8, 16)))
    for scaling, sign in itertools.product(values, (1, -1)):
        down, up = split(sign * scaling, HALF)
        assert (
            down * up == sign * scaling
            and (abs(down) <= 1.0)
            and up >= 1.0
            and up == 2.0 ** round(torch.tensor(up).log2().item())
        )
        assert up == 1.0 if scaling <= 1.0 else 0.5 < abs(down) <= 1.0
        assert split(sign * scaling, torch.bfloat16, torch.float32) == (sign * scaling, 1.0)
        operands = [w, None, a, b, None, None]
        _, t = lora_fused.backends.native.lora_forward(x, operands, [sign * scaling], None, None, None, False)
        torch.testing.assert_close(t, lora_fused.backends.reference.shrink(x, a, down), rtol=2e-3, atol=1e-7)
