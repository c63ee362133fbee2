"""Scalings that are tensors, as PEFT's compiled hot swap makes them and fills them anew: read on a CPU, multiplied into B where
a GPU would have to be waited for."""

import copy
import importlib
import warnings

import pytest
import torch
from cases import peft_llama, randomise_adapters
from heads import NAMES, assert_same, heads, inner, kernelized, step
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn

VARIANTS = ({}, dict(use_dora=True), dict(lora_bias=True), dict(bias="all", use_dora=True))
WAYS = ("read", "folded")


@pytest.fixture
def way(lora_fused, request, monkeypatch):
    """Whether a tensor's value counts as costing nothing, as on a CPU, or not, as on a GPU."""
    scaling = importlib.import_module(f"{lora_fused.__name__}.peft_scaling")
    if request.param == "folded":
        monkeypatch.setattr(scaling, "_is_at_hand", lambda scaling: False)
    return request.param


def explained(lora_fused, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lora_fused.explain(model)


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
    ours, x = kernelized(lora_fused, plain), torch.randn(6, 32, dtype=torch.float64)
    for factor in (1.0, 0.5, -2.0):
        for model in (plain, ours):
            for scaling in scalings(model):
                scaling["default"].mul_(factor)
        for _ in range(2):  # in the second there is a group
            assert_same(step(ours, x), step(plain, x))
        rows = explained(lora_fused, ours)
        assert len(rows) == 3 and all(row.fused and row.group == "q+k+v" for row in rows), str(rows)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_group_computes_once(lora_fused, way, monkeypatch):
    ours, x = kernelized(lora_fused, tensors(heads())), torch.randn(6, 32, dtype=torch.float64)
    step(ours, x)
    calls, own = [], lora_fused.functional.compute_group
    monkeypatch.setattr(
        lora_fused.functional, "compute_group", lambda *args, **kwargs: calls.append(args) or own(*args, **kwargs)
    )
    step(ours, x)
    assert [len(projections) for _, projections in calls] == [3]


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
    ours, x = kernelized(lora_fused, plain), torch.randn(6, 32, dtype=torch.float64)
    step(ours, x)

    def between(root, name, x):
        if name == "q":
            change(root.k.scaling)

    assert_same(step(ours, x, between=between), step(plain, x, between=between))
    assert [model.k.scaling["default"] for model in map(inner, (ours, plain))] == [3.5, 3.5]


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=str)
def test_hot_swap(lora_fused, way, config):
    """PEFT's own preparation, with ranks padded, and another adapter's scaling filled in; an embedding and gated MLPs among
    the layers."""
    targets = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    plain = peft_llama(torch.float64, target_modules=targets, **config)
    prepare_model_for_compiled_hotswap(plain, target_rank=6)
    randomise_adapters(plain, torch.float64)
    lora_fused.register_peft_layers()
    ours = kernelize(copy.deepcopy(plain), mode=Mode.TRAINING, device="cpu")
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
    rows = explained(lora_fused, ours)
    assert len(rows) == 15 and all(row.fused for row in rows), str(rows)
    assert sum(row.layer == "LoraGatedMLP" for row in rows) == 6


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_base_that_is_called(lora_fused, way):
    from test_known_bases import gradients, tied_llama

    plain = tensors(tied_llama(lora_bias=True, bias="all"))
    lora_fused.register_peft_layers()
    ours = kernelize(copy.deepcopy(plain), mode=Mode.TRAINING, device="cpu")
    assert [row.backend for row in explained(lora_fused, ours)][-1] == "base called"
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
    lora_fused.register_peft_layers()
    ours = kernelize(model, mode=Mode.TRAINING, device="cpu").base_model.model.model
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
    ours, x = kernelized(lora_fused, plain), torch.randn(6, 32, dtype=torch.float64)
    assert all(row.fused for row in explained(lora_fused, ours))
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
    ours, x = kernelized(lora_fused, plain), torch.randn(6, 32, dtype=torch.float64)
    rows = explained(lora_fused, ours)
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
    ours, x = kernelized(lora_fused, plain), torch.randn(6, 32, dtype=torch.float16)
    rows = explained(lora_fused, ours)
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
        lora_fused.register_peft_layers()
        ours = kernelize(copy.deepcopy(plain), mode=Mode.TRAINING, device="cpu")
        assert explained(lora_fused, ours)[0].fused == (scaling.dim() == 0)
        ids, gradients = torch.randint(0, 12, (3, 5)), []
        for each in (ours, plain):
            y = each(ids)
            y.square().sum().backward()
            gradients.append([y.detach(), *(p.grad for p in each.parameters() if p.requires_grad)])
        assert len(gradients[0]) == 3
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
