"""PEFT itself is the truth: layer by layer in float64, and a training run step by step."""

import contextlib
import copy

import pytest
import torch
from helpers.cases import (
    CASES,
    DEVICE,
    DTYPES,
    VARIANTS,
    Case,
    DrawnDropout,
    OwnForwards,
    assert_as_good,
    peft_linear,
    peft_llama,
    take_exactly,
)  # fmt: skip
from kernels import Mode, kernelize

pytestmark = pytest.mark.usefixtures("on_device")

# PEFT makes a matrix of a vector under DoRA: its own forward, see test_fallbacks.
LAYER_CASES = [(v, case) for v in VARIANTS for case in CASES if case.lead or not VARIANTS[v].get("use_dora")]

# On a GPU every case runs with the backend its size chooses, and once more with Triton for all.
BACKENDS = ("chosen", "triton") if torch.cuda.is_available() else ("chosen",)


def fused(lora_fused, model, device=DEVICE):
    lora_fused.register_peft_layers()
    model = kernelize(model, mode=Mode.TRAINING, device=device)
    rows = lora_fused.explain(model)
    assert len(rows) > 0 and all(row.fused for row in rows), str(rows)
    return model


def run(model, x, dy, autocast=None):
    """Output and every gradient of one forward and backward, by name."""
    x = x.detach().clone().requires_grad_()
    scope = torch.autocast(x.device.type, dtype=autocast) if autocast else contextlib.nullcontext()
    with scope:
        y = model(x)
    y.backward(dy.to(y.dtype))
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values())
    return {"y": y, "dx": x.grad, **grads}


def run_fused(lora_fused, model, x, dy, autocast=None, device=DEVICE):
    """`run` of the kernelized model, in which PEFT's own forward has no part."""
    model = fused(lora_fused, model, device)
    with OwnForwards() as calls:
        results = run(model, x, dy, autocast)
    assert not calls
    return results


@pytest.mark.parametrize("base,adapter", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("variant,case", LAYER_CASES, ids=str)
@pytest.mark.parametrize("autocast", (None, torch.bfloat16), ids=("plain", "autocast"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_matches_peft(lora_fused, device, monkeypatch, case, base, adapter, variant, autocast, backend):
    if backend == "triton":
        monkeypatch.setattr(
            lora_fused.backends.device_config,
            "of",
            lambda device: lora_fused.backends.device_config.DeviceConfig(linear_expand_from=0),
        )
        monkeypatch.setattr(lora_fused.backends.select, "is_hopper", lambda device: False)
    model, _ = peft_linear(case, base, adapter, device, **VARIANTS[variant])
    compare_with_peft(lora_fused, device, model, case, base, autocast)


def compare_with_peft(lora_fused, device, model, case, base, autocast=None):
    """Output and every gradient of the kernelized model against PEFT's, both with one mask."""
    x = torch.randn(*case.lead, case.k, device=device).to(base)
    dy = torch.randn(*case.lead, case.n, device=device).to(base)
    plain = copy.deepcopy(model)
    drop = plain.base_model.model.proj.lora_dropout
    if isinstance(drop["default"], torch.nn.Dropout):
        drop["default"] = DrawnDropout(lora_fused, drop["default"].p, x.shape, device)
    truth = run(copy.deepcopy(plain).double(), x.double(), dy.double())
    theirs = run(plain, x, dy, autocast)
    ours = run_fused(lora_fused, model, x, dy, autocast, device)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert_as_good(name, value, theirs[name], truth[name], autocast or base)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU takes them so unasked")
@pytest.mark.parametrize("variant,case", LAYER_CASES, ids=str)
def test_float32_adapters_as_on_a_gpu(lora_fused, monkeypatch, case, variant):
    """In two parts, by the native op, which a GPU takes in `test_layer_matches_peft`; not DoRA under dropout."""
    calls = take_exactly(lora_fused, monkeypatch)
    model, _ = peft_linear(case, torch.bfloat16, torch.float32, "cpu", **VARIANTS[variant])
    compare_with_peft(lora_fused, "cpu", model, case, torch.bfloat16)
    masked_dora = {"lora_dropout", "use_dora"} <= VARIANTS[variant].keys()
    assert calls and all(bf16x3 != masked_dora for bf16x3 in calls)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", (Case((9,), 64, 48, 8, bias=True), Case((3, 5), 24, 20, 4, conv1d=True)), ids=str)
def test_trainable_base(lora_fused, device, variant, case):
    """As under bias="all", and with the base weight trained as well."""
    model, layer = peft_linear(case, torch.float32, torch.float32, device, **VARIANTS[variant])
    layer.base_layer.bias.requires_grad_(True)
    detaches = case.conv1d and VARIANTS[variant].get(
        "use_dora"
    )  # a part of the gradient: PEFT's own, see test_fallbacks
    layer.base_layer.weight.requires_grad_(not detaches)
    compare_with_peft(lora_fused, device, model, case, torch.float32)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "lora_dropout" not in VARIANTS[v]])
def test_non_contiguous_x_and_dy(lora_fused, device, variant):
    model, _ = peft_linear(Case((6, 10), 40, 24, 5), torch.float32, torch.float32, device, **VARIANTS[variant])
    x = torch.randn(10, 6, 80, device=device).transpose(0, 1)[..., ::2]
    dy = torch.randn(24, 6, 10, device=device).permute(1, 2, 0)
    before = x.clone()
    truth = run(copy.deepcopy(model).double(), x.double(), dy.double())
    theirs = run(copy.deepcopy(model), x, dy)
    ours = run_fused(lora_fused, model, x, dy, device=device)
    assert torch.equal(x, before)
    for name, value in ours.items():
        assert_as_good(name, value, theirs[name], truth[name], torch.float32)


@pytest.mark.parametrize("lead", ((6,), (2, 3)), ids=str)
def test_result_may_change_in_place(lora_fused, lead):
    """As an in-place activation or `hidden += ...` after the layer does."""

    class InPlace(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).add_(1).relu_()

    model, _ = peft_linear(Case(lead, 32, 16, 4), torch.float32, torch.float32)
    x, dy = torch.randn(*lead, 32), torch.randn(*lead, 16)
    theirs = run(InPlace(copy.deepcopy(model)), x, dy)
    with OwnForwards() as calls:
        ours = run(InPlace(fused(lora_fused, model)), x, dy)
    assert not calls and ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])


@pytest.mark.parametrize("frozen", ("lora_A", "lora_B"))
def test_one_frozen_adapter_matrix(lora_fused, frozen):
    model, layer = peft_linear(Case((5,), 32, 16, 4), torch.float32, torch.float32)
    getattr(layer, frozen)["default"].weight.requires_grad_(False)
    x, dy = torch.randn(5, 32), torch.randn(5, 16)
    theirs = run(copy.deepcopy(model), x, dy)
    ours = run_fused(lora_fused, model, x, dy)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])


@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=("lora", "dora"))
def test_a_bias_of_another_dtype_under_autocast(lora_fused, device, config):
    """Which casts it; without autocast PEFT refuses it, see test_bad_input."""
    case = Case((9,), 64, 48, 8, bias=True)
    model, layer = peft_linear(case, torch.bfloat16, torch.float32, device, **config)
    layer.base_layer.bias.data = torch.randn(48)
    layer.base_layer.bias.requires_grad_(True)
    x, dy = torch.randn(9, 64, device=device).bfloat16(), torch.randn(9, 48, device=device).bfloat16()
    truth = run(copy.deepcopy(model).double(), x.double(), dy.double())
    theirs = run(copy.deepcopy(model), x, dy, torch.bfloat16)
    lora_fused.register_peft_layers()
    kernelize(model, mode=Mode.TRAINING, device=device)
    with OwnForwards() as calls:
        ours = run(model, x, dy, torch.bfloat16)
    assert not calls and ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert_as_good(name, value, theirs[name], truth[name], torch.bfloat16)


def test_no_gradient_wanted(lora_fused):
    model, _ = peft_linear(Case((5,), 32, 16, 4), torch.float32, torch.float32)
    x = torch.randn(5, 32)
    expected = copy.deepcopy(model)(x)
    model = fused(lora_fused, model)
    for scope in (torch.no_grad, torch.inference_mode):
        with scope(), OwnForwards() as calls:
            torch.testing.assert_close(model(x), expected)
        assert not calls


def test_double_backward_raises(lora_fused):
    model, _ = peft_linear(Case((5,), 32, 16, 4), torch.float32, torch.float32)
    x = torch.randn(5, 32, requires_grad=True)
    (dx,) = torch.autograd.grad(fused(lora_fused, model)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="^lora_fused: gradients of gradients .*without kernelize"):
        dx.sum().backward()


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


GRADCHECK = {
    "lora": {},
    "lora_bias": dict(lora_bias=(7,)),
    "dora": dict(magnitude=(7,)),
    "dropout": dict(dropout=0.4),
    "dora-dropout": dict(magnitude=(7,), dropout=0.4),
}


@pytest.mark.parametrize("backend", ("reference", "native"))
@pytest.mark.parametrize("variant", GRADCHECK)
def test_gradcheck(lora_fused, variant, backend):
    """Against finite differences, with one mask for all calls. DoRA's norm is detached, so only what the
    norm does not depend on can be compared there; the rest is in test_layer_matches_peft."""
    options = dict(GRADCHECK[variant], scaling=0.3, backend=backend)
    tensors = dict(x=draw(2, 3, 9), weight=draw(7, 9), lora_a=draw(4, 9), lora_b=draw(7, 4), bias=draw(7))
    tensors |= {name: draw(*options.pop(name)) for name in ("lora_bias", "magnitude") if name in options}
    if "magnitude" in tensors:
        tensors |= {name: tensors[name].detach() for name in ("weight", "lora_a", "lora_b")}

    def call(*values):
        torch.manual_seed(7)
        return lora_fused.lora_linear(**dict(zip(tensors, values)), **options)

    assert torch.autograd.gradcheck(call, tuple(tensors.values()))


@pytest.mark.parametrize("dropout", (0.0, 0.4))
def test_gradcheck_of_a_group(lora_fused, dropout):
    """Three members in one node, of two ranks, the last without an adapter."""
    first = draw(7, 9), draw(4, 9), draw(7, 4)
    second = draw(6, 9), draw(6), draw(2, 9), draw(6, 2)

    def call(x, w1, a1, b1, w2, c2, a2, b2, w3):
        torch.manual_seed(7)
        members = ((w1, None, a1, b1), (w2, c2, a2, b2), (w3,))
        projections = [
            lora_fused.Projection(
                lora_fused.Operands(*member), 0.5 + i, lora_fused.ProjectionSpec(dropout if len(member) > 1 else 0.0)
            )
            for i, member in enumerate(members)
        ]
        return lora_fused.lora_linear_group(x, projections)

    assert torch.autograd.gradcheck(call, (draw(5, 9), *first, *second, draw(3, 9)))


def train(model, device, steps=20, autocast=None):
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    tokens = torch.randint(0, 64, (2, 17), generator=generator, device="cpu").to(device)
    for _ in range(steps):
        scope = torch.autocast(device, dtype=autocast) if autocast else contextlib.nullcontext()
        with scope:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.double().item())
    return losses


@pytest.mark.sm80_kernels
def test_choice_of_backend(lora_fused, monkeypatch):
    gpu, large = torch.device("cuda"), 2**20
    monkeypatch.setattr(
        lora_fused.backends.device_config,
        "of",
        lambda device: lora_fused.backends.device_config.DeviceConfig(linear_expand_from=large),
    )

    def choose(device, dtype, work, native=True, bf16x3=False):
        taken = lora_fused.specs.NativePath(native, bf16x3)
        return lora_fused.backends.select.choose(device, dtype, taken, lambda: work)

    monkeypatch.setattr(lora_fused.backends.select, "is_hopper", lambda device: True)
    assert choose(gpu, torch.bfloat16, large) == "native"
    assert choose(gpu, torch.bfloat16, large, native=False) == "triton"  # float32 adapters and dropout, no autocast
    monkeypatch.setattr(lora_fused.backends.select, "is_hopper", lambda device: False)
    assert choose(gpu, torch.bfloat16, large) == choose(gpu, torch.float16, large) == "triton"
    assert choose(gpu, torch.bfloat16, large, bf16x3=True) == "native"
    assert choose(gpu, torch.bfloat16, large - 1) == choose(gpu, torch.float32, large) == "native"
    assert choose(torch.device("cpu"), torch.bfloat16, large) == "native"


CURVES = {
    "lora": {},
    "lora, checkpointing": {},
    "lora_bias": dict(lora_bias=True),
    "bias": dict(bias="all"),
    "dora": dict(use_dora=True),
    "dora-bias": dict(use_dora=True, bias="lora_only"),
    "dora-bias, checkpointing": dict(use_dora=True, bias="lora_only"),
}


@pytest.mark.parametrize("dtype,tolerance", ((torch.float32, 1e-4), (torch.float64, 1e-9)), ids=str)
@pytest.mark.parametrize("variant", CURVES)
def test_twenty_steps_on_a_llama(lora_fused, device, variant, dtype, tolerance):
    """float64 shows that nothing but rounding separates the two runs."""
    plain = peft_llama(dtype, shape=dict(attention_bias=True, mlp_bias=True), **CURVES[variant]).to(device).train()
    assert {p.dtype for p in plain.parameters()} == {dtype}
    ours = fused(lora_fused, copy.deepcopy(plain), device)
    assert plain.state_dict().keys() == ours.state_dict().keys()
    if "checkpointing" in variant:
        for model in (plain, ours):
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
    theirs = train(plain, device)
    with OwnForwards() as calls:
        losses = train(ours, device)
    assert not calls and losses[-1] < losses[0]
    assert losses == pytest.approx(theirs, rel=tolerance, abs=0)
