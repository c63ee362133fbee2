"""Bases of other classes than nn.Linear: which are the same product, which are called, and whose weight others read."""

import copy

import pytest
import torch
from helpers.cases import Case, assert_as_good, randomise_adapters, tiny_llama
from helpers.kernelizing import explain, kernelized
from helpers.llamas import gradients, tied_llama
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.models.esm.modeling_esmfold import EsmFoldLinear
from transformers.models.falcon.modeling_falcon import FalconLinear

SAME_PRODUCT = (FalconLinear, NonDynamicallyQuantizableLinear, EsmFoldLinear)
CASE = Case((5, 3), 32, 16, 4)
VARIANTS = (
    {},
    dict(use_dora=True),
    dict(lora_bias=True),
    dict(bias="all", use_dora=True),
)


class Network(nn.Module):
    """Three linears of one input, and a gated MLP."""

    def __init__(self, cls, bias):
        super().__init__()
        for name, k, n in (
            ("q", 32, 16),
            ("k", 32, 8),
            ("v", 32, 12),
            ("gate", 32, 24),
            ("up", 32, 24),
            ("down", 24, 32),
        ):
            self.add_module(name, cls(k, n, bias=bias))
            if bias:
                nn.init.normal_(self._modules[name].bias)

    def forward(self, x):
        y = torch.cat([self.q(x), self.k(x), self.v(x)], -1)
        return torch.cat([y, self.down(nn.functional.silu(self.gate(x)) * self.up(x))], -1)


def adapted(cls, has_bias, dtype=torch.float64, **config):
    names = ["q", "k", "v", "gate", "up", "down"]
    config = LoraConfig(**{**dict(r=4, lora_alpha=6, target_modules=names), **config})
    model = get_peft_model(Network(cls, has_bias).to(dtype), config, autocast_adapter_dtype=False)
    randomise_adapters(model, dtype)
    return model.train()


@pytest.mark.parametrize("config", VARIANTS, ids=str)
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("cls", SAME_PRODUCT)
def test_same_product(lora_fused, cls, bias, config):
    model = adapted(cls, bias, **config)
    ours = kernelized(lora_fused, model, "cpu")
    x = torch.randn(5, 3, 32, dtype=torch.float64)
    for _ in range(2):  # groups form in the second
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        y, expected = ours(leaves[0]), model(leaves[1])
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        mine, theirs = gradients(ours, y, leaves[0]), gradients(model, expected, leaves[1])
        assert len(mine) > 12
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    rows = explain(lora_fused, ours)
    assert len(rows) == 6 and all(row.fused and row.reason is None for row in rows), str(rows)
    assert {row.group for row in rows} >= {"q+k+v+gate+up", "single"}


@pytest.mark.parametrize("cls", SAME_PRODUCT)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("autocast", (False, True))
def test_other_dtypes(lora_fused, cls, dtype, autocast):
    """Results and their dtypes, FalconLinear's with a bias under autocast included, where the bias is added last."""
    for bias in (False, True):
        for config in VARIANTS[:2]:
            torch.manual_seed(0)
            model = adapted(cls, bias, torch.float64, **config)
            truth, plain = model, copy.deepcopy(model).to(dtype)
            ours = kernelized(lora_fused, plain, "cpu")
            x = torch.randn(5, 3, 32).to(dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                results = [each(x) for each in (ours, plain)]
                rows = explain(lora_fused, ours)
            assert_as_good("y", *results, truth(x.double()), torch.bfloat16 if autocast else dtype)
            called = autocast and bias and dtype == torch.float32 and cls is FalconLinear
            for row in rows:
                assert row.fused == (not called or not config), row
                assert (row.backend == "fused delta") == (called and row.fused), row
                assert not called or "FalconLinear adds its bias of torch.float32" in row.reason, row


def test_a_class_of_the_same_name_is_another(lora_fused):
    """So is a subclass: neither need compute what the class of that name does."""

    def forward(self, x):
        return 2 * nn.functional.linear(x, self.weight, self.bias)

    for base in SAME_PRODUCT:
        for name in (base.__name__, "Doubling"):
            cls = type(name, (base,), dict(forward=forward, __module__=base.__module__))
            model = adapted(cls, True)
            ours = kernelized(lora_fused, model, "cpu")
            x = torch.randn(4, 32, dtype=torch.float64)
            assert torch.equal(ours(x), model(x))
            rows = explain(lora_fused, ours)
            assert len(rows) == 6, str(rows)
            assert {row.reason for row in rows} == {f"unknown base layer {name} of {cls.__module__}"}


# ---- torch's attention reads the weight of its output projection ----


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 8)

    def forward(self, x):
        return self.fc(self.attention(x, x, x)[0])


def test_output_projection_that_is_never_called(lora_fused):
    """PEFT puts an adapter there that nobody calls; the results are its own, and `explain` says so."""
    model = get_peft_model(
        Pooled().double(), LoraConfig(r=4, target_modules=["out_proj", "fc"], init_lora_weights=False)
    )
    ours = kernelized(lora_fused, model, "cpu")
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    y, expected = ours(x), model(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(ours, y), gradients(model, expected), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    rows = {row.module.rpartition(".")[2]: row for row in explain(lora_fused, ours)}
    assert rows["fc"].fused and not rows["out_proj"].fused
    assert "never calls it" in rows["out_proj"].reason


def test_pefts_own_attention(lora_fused):
    model = get_peft_model(
        Pooled().double(), LoraConfig(r=4, target_modules=["attention", "fc"], init_lora_weights=False)
    )
    ours = kernelized(lora_fused, model, "cpu")
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    for _ in range(2):
        y, expected = ours(x), model(x)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        mine, theirs = gradients(ours, y), gradients(model, expected)
        assert len(mine) == 6 and all(grad is not None for grad in mine)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    rows = {row.module.rpartition(".")[2]: row for row in explain(lora_fused, ours)}
    assert rows["fc"].fused
    assert "no fused layer for peft.tuners.lora.layer.MultiheadAttention" in rows["attention"].reason
    assert "never calls it" in rows["out_proj"].reason


# ---- PEFT's trainable tokens ----


def losses(model):
    """Two steps, the tokens and the adapters changed in between."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for seed in range(3):
        ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return found


@pytest.mark.parametrize("config", ({}, dict(lora_bias=True, bias="all"), dict(modules_to_save=["norm"])), ids=str)
def test_trained_tokens_under_the_adapter(lora_fused, config):
    model = tied_llama(**config)
    ours = kernelized(lora_fused, model, "cpu")
    row = explain(lora_fused, ours)[-1]
    assert row.module.endswith("lm_head") and row.backend == "fused delta"
    assert row.reason == "base layer's own forward: TrainableTokensWrapper"
    mine, theirs = losses(ours), losses(model)
    assert len(mine) > 20
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    with ours.disable_adapter(), model.disable_adapter():
        ids = torch.arange(8).view(1, 8)
        torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-11, atol=1e-12)
    assert ours.state_dict().keys() == model.state_dict().keys()


def test_dora_on_trained_tokens_is_pefts(lora_fused):
    """PEFT itself computes it with dropout alone."""
    model = tied_llama(use_dora=True, lora_dropout=0.2)
    ours = kernelized(lora_fused, model, "cpu")
    row = explain(lora_fused, ours)[-1]
    assert not row.fused and row.reason.startswith("DoRA on a base that is called")
    results = []
    for each in (ours, model):
        head = each.base_model.model.lm_head
        torch.manual_seed(0)
        results.append(head(torch.linspace(-1, 1, 8 * 64, dtype=torch.float64).view(1, 8, 64)))
    assert torch.equal(*results)


@pytest.mark.parametrize("tied", (False, True))
def test_trained_tokens_beside_the_adapter(lora_fused, tied):
    """The wrapper around an embedding or a head that LoRA leaves alone has no row, and everything else is fused."""
    model = tiny_llama(torch.float64, tie_word_embeddings=tied)
    tokens = dict(embed_tokens=[1, 2], lm_head=[1, 2])
    config = LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=tokens, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    randomise_adapters(model, torch.float64)
    ours = kernelized(lora_fused, model, "cpu")
    for one, other in zip(losses(ours), losses(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    rows = explain(lora_fused, ours)
    assert len(rows) == 14 and all(row.fused for row in rows), str(rows)


def test_a_layer_of_trained_tokens_as_base(lora_fused):
    """As PEFT nests its methods: LoRA on a linear whose rows another method trains."""
    from peft.tuners.trainable_tokens import TrainableTokensConfig

    tokens = TrainableTokensLayer(nn.Linear(32, 16, bias=False), "default")
    tokens.update_layer("default", config=TrainableTokensConfig(token_indices=[0, 3]))
    model = nn.Module()
    model.proj = LoraLinear(tokens, "default", config=LoraConfig(r=4, lora_alpha=6), r=4, lora_alpha=6)
    model.forward = model.proj.forward
    model = model.double()
    randomise_adapters(model, torch.float64)
    plain, x = model.proj, torch.randn(6, 32, dtype=torch.float64)
    ours = kernelized(lora_fused, plain, "cpu")
    row = explain(lora_fused, ours)[0]
    assert row.fused and row.reason == "base layer's own forward: TrainableTokensLayer"
    y, expected = ours(x), plain(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    mine, theirs = gradients(ours, y), gradients(plain, expected)
    assert sum(grad is not None for grad in mine) == 4  # the linear's own weight, the tokens, A and B
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
