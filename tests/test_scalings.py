"""Scalings that are tensors, as PEFT's compiled hot swap makes them and fills them anew: read on a CPU, multiplied into
B where a GPU would have to be waited for."""

import copy
import importlib

import pytest
import torch
from helpers.cases import assert_as_good, peft_llama, randomise_adapters
from helpers.heads import NAMES, assert_same, heads, inner, step
from helpers.kernelizing import explain, kernelized
from helpers.llamas import gradients, tied_llama
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn

VARIANTS = ({}, dict(use_dora=True), dict(lora_bias=True), dict(bias="all", use_dora=True))
WAYS = ("read", "folded")


@pytest.fixture
def way(lora_fused, request, monkeypatch):
    """Whether a tensor's value counts as costing nothing, as on a CPU, or not, as on a GPU."""
    scaling = importlib.import_module(f"{lora_fused.__name__}.peft.scaling")
    if request.param == "folded":
        monkeypatch.setattr(scaling, "_is_at_hand", lambda scaling: False)
    return request.param


def scalings(model):
    return [module.scaling for module in model.modules() if hasattr(module, "lora_A")]


def tensors(model, dtype=torch.float32):
    """The model with scalings that are tensors; of several values, as alpha and rank patterns have them."""
    for i, scaling in enumerate(scalings(model)):
        scaling["default"] = torch.tensor(scaling["default"] + 0.3 * i, dtype=dtype)
    return model


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_groups(lora_fused, way, config):
    plain = tensors(heads(**config))
    ours, x = kernelized(lora_fused, plain, "cpu"), torch.randn(6, 32, dtype=torch.float64)
    for factor in (1.0, 0.5, -2.0):
        for model in (plain, ours):
            for scaling in scalings(model):
                scaling["default"].mul_(factor)
        for _ in range(2):  # in the second there is a group
            assert_same(step(ours, x), step(plain, x))
        rows = explain(lora_fused, ours)
        assert len(rows) == 3 and all(row.fused and row.group == "q+k+v" for row in rows), str(rows)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_group_computes_once(lora_fused, way, monkeypatch):
    ours, x = kernelized(lora_fused, tensors(heads()), "cpu"), torch.randn(6, 32, dtype=torch.float64)
    step(ours, x)
    calls, own = [], lora_fused.functional.dispatch.compute_group
    monkeypatch.setattr(
        lora_fused.functional.dispatch,
        "compute_group",
        lambda *args, **kwargs: calls.append(args) or own(*args, **kwargs),
    )
    step(ours, x)
    assert [len(projections) for _, projections, *_ in calls] == [3]


def changed(scaling):
    scaling["default"].fill_(3.5)


def replaced(scaling):
    scaling["default"] = torch.tensor(3.5)


def made_a_number(scaling):
    scaling["default"] = 3.5


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("change", (changed, replaced, made_a_number))
def test_changes_between_siblings(lora_fused, way, change):
    """What was computed ahead is not given out."""
    plain = tensors(heads())
    ours, x = kernelized(lora_fused, plain, "cpu"), torch.randn(6, 32, dtype=torch.float64)
    step(ours, x)

    def between(root, name, x):
        if name == "q":
            change(root.k.scaling)

    assert_same(step(ours, x, between=between), step(plain, x, between=between))
    assert [model.k.scaling["default"] for model in map(inner, (ours, plain))] == [3.5, 3.5]


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=str)
def test_hot_swap(lora_fused, way, config):
    """PEFT's own preparation, with ranks padded, and another adapter's scaling filled in; an embedding and gated MLPs
    among the layers."""
    targets = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    plain = peft_llama(torch.float64, target_modules=targets, **config)
    prepare_model_for_compiled_hotswap(plain, target_rank=6)
    randomise_adapters(plain, torch.float64)
    ours = kernelized(lora_fused, plain, "cpu")
    assert all(type(scaling["default"]) is torch.Tensor for scaling in scalings(ours))
    for value in (2.0, 0.75):
        for model in (plain, ours):
            for scaling in scalings(model):
                scaling["default"].fill_(value)
        for seed in range(2):
            ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(seed))
            found = []
            for model in (ours, plain):
                model.zero_grad()
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
            assert len(found[0]) > 28
            torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    rows = explain(lora_fused, ours)
    assert len(rows) == 15 and all(row.fused for row in rows), str(rows)
    assert sum(row.layer == "LoraGatedMLP" for row in rows) == 6


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_base_that_is_called(lora_fused, way):
    plain = tensors(tied_llama(lora_bias=True, bias="all"))
    ours = kernelized(lora_fused, plain, "cpu")
    assert [row.backend for row in explain(lora_fused, ours)][-1] == "fused delta"
    ids = torch.randint(0, 64, (2, 7))
    y, expected = ours(ids).logits, plain(ids).logits
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(gradients(ours, y), gradients(plain, expected), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("way", ["folded"], indirect=True)
def test_nothing_waits_for_a_value(lora_fused, way):
    """Neither a group, nor a gated MLP, nor an embedding reads what is on a GPU."""
    model = tensors(peft_llama(target_modules=["embed_tokens", "q_proj", "k_proj", "gate_proj", "down_proj"]))
    ours = kernelized(lora_fused, model, "cpu").base_model.model.model
    ids, x = torch.arange(6).view(1, 6), torch.randn(2, 3, 64)
    layer = ours.layers[0]

    def run():
        y = layer.self_attn.q_proj(x).sum() + layer.self_attn.k_proj(x).sum() + layer.mlp(x).sum()
        (y + ours.embed_tokens(ids).sum()).backward()

    run()
    with torch.profiler.profile() as profile:
        run()
    names = {event.name for event in profile.events()}
    assert any("mm" in name for name in names) and "aten::_local_scalar_dense" not in names
    with torch.profiler.profile() as profile:
        float(torch.ones(()))
    assert "aten::_local_scalar_dense" in {event.name for event in profile.events()}


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.int64), ids=str)
def test_other_dtypes_of_scalings(lora_fused, way, dtype):
    plain = tensors(heads(), dtype)
    ours, x = kernelized(lora_fused, plain, "cpu"), torch.randn(6, 32, dtype=torch.float64)
    assert all(row.fused for row in explain(lora_fused, ours))
    assert_same(step(ours, x), step(plain, x))


class Own(torch.Tensor):
    def __deepcopy__(self, memo):
        return self


REFUSED = {
    "one dimension": (lambda: torch.tensor([1.5]), "a tensor of shape (1,)"),
    "truth": (lambda: torch.tensor(True), "torch.bool"),
    "trained": (lambda: nn.Parameter(torch.tensor(1.5)), "scaling is trained"),
    "subclass": (lambda: torch.tensor(1.5).as_subclass(Own), "scaling is a Own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_scalings_that_are_pefts(lora_fused, name):
    make, reason = REFUSED[name]
    plain = heads()
    for scaling in scalings(plain):
        scaling["default"] = make()
    ours, x = kernelized(lora_fused, plain, "cpu"), torch.randn(6, 32, dtype=torch.float64)
    rows = explain(lora_fused, ours)
    assert len(rows) == 3 and all(not row.fused and reason in row.reason for row in rows), str(rows)
    results = [inner(model)(x) for model in (ours, plain)]
    assert torch.equal(*results)
    for y in results:
        y.double().square().sum().backward()
    for name in NAMES:
        one, other = (getattr(inner(model), name).scaling["default"].grad for model in (ours, plain))
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("way", ["folded"], indirect=True)
def test_float16_has_not_the_range(lora_fused, way):
    """s·B may overflow where B t and s·(B t) do not."""
    plain = tensors(heads(torch.float16))
    ours, x = kernelized(lora_fused, plain, "cpu"), torch.randn(6, 32, dtype=torch.float16)
    rows = explain(lora_fused, ours)
    assert all(not row.fused and "float16's range" in row.reason for row in rows), str(rows)
    assert torch.equal(inner(ours)(x), inner(plain)(x))


def test_embedding_alone(lora_fused):
    for scaling in (torch.tensor(1.7), torch.tensor([1.7])):
        model = nn.Sequential()
        model.add_module("embed", nn.Embedding(12, 8))
        config = LoraConfig(r=3, target_modules=["embed"])
        plain = get_peft_model(model.double(), config, autocast_adapter_dtype=False)
        randomise_adapters(plain, torch.float64)
        plain.base_model.model.embed.scaling["default"] = scaling
        ours = kernelized(lora_fused, plain, "cpu")
        assert explain(lora_fused, ours)[0].fused == (scaling.dim() == 0)
        ids, gradients = torch.randint(0, 12, (3, 5)), []
        for each in (ours, plain):
            y = each(ids)
            y.square().sum().backward()
            gradients.append([y.detach(), *(p.grad for p in each.parameters() if p.requires_grad)])
        assert len(gradients[0]) == 3
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


# ---- half precision, in which s·B is rounded once more ----

BF16, F32 = torch.bfloat16, torch.float32
DTYPES = ((BF16, BF16, False), (BF16, F32, True), (F32, F32, True))  # base, adapter, autocast


def half_precision(lora_fused, device, config, base, adapter, autocast):
    """(kernelized, PEFT's, truth) of a model with scalings that are tensors."""
    truth = heads(**config)
    plain = copy.deepcopy(truth).to(device=device, dtype=base)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    with torch.no_grad():  # what is in the model, in float64
        for one, other in zip(truth.parameters(), plain.parameters(), strict=True):
            one.copy_(other)
    for model in (truth, plain):
        for scaling in scalings(model):
            scaling["default"] = torch.tensor(1.3, device=device if model is plain else "cpu")
    lora_fused.register_peft_layers()
    return kernelize(copy.deepcopy(plain), mode=Mode.TRAINING, device=device), plain, truth


def passes(model, x, dy, autocast=False):
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, BF16, enabled=autocast):
        y = inner(model)(x)
    y.backward(dy.to(y.dtype))
    return {"y": y, "x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def assert_all_as_good(ours, theirs, truth, unit):
    assert ours.keys() == theirs.keys() == truth.keys() and len(ours) >= 8
    for name, value in ours.items():
        assert_as_good(name, value, theirs[name], truth[name], unit, stored=2)


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("config", VARIANTS[:3], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_half_precision(lora_fused, way, config, dtypes):
    ours, plain, truth = half_precision(lora_fused, "cpu", config, *dtypes)
    x, dy = torch.randn(64, 32).to(dtypes[0]), torch.randn(64, 36).bfloat16()
    for value in (1.3, 0.2):
        for model in (ours, plain, truth):
            for scaling in scalings(model):
                scaling["default"].fill_(value)
        found = [passes(model, x, dy, dtypes[2]) for model in (ours, plain)]
        assert_all_as_good(*found, passes(truth, x.double(), dy.double()), BF16)
    assert all(row.fused for row in explain(lora_fused, ours))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("config", VARIANTS[:3], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_on_a_gpu(lora_fused, config, dtypes):
    """The host waits for nothing, and a swap is seen."""
    ours, plain, truth = half_precision(lora_fused, "cuda", config, *dtypes)
    x, dy = torch.randn(64, 32).to(dtypes[0]), torch.randn(64, 36).bfloat16()
    on_gpu = x.cuda(), dy.cuda()
    for _ in range(2):  # groups, libraries' first calls
        passes(ours, *on_gpu, dtypes[2])
    for value in (1.3, 0.2):
        for model in (ours, plain, truth):
            for scaling in scalings(model):
                scaling["default"].fill_(value)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            mine = passes(ours, *on_gpu, dtypes[2])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_all_as_good(mine, passes(plain, *on_gpu, dtypes[2]), passes(truth, x.double(), dy.double()), BF16)
    rows = explain(lora_fused, ours)
    assert len(rows) == 3 and all(row.fused and row.group == "q+k+v" for row in rows), str(rows)
