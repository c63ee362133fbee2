"""Few rows on a device that waits for its host: which calls are PEFT's own forward then, and which stay fused."""

import copy

import pytest
import torch
from helpers.cases import DEVICE, LINEARS, Case, peft_linear, peft_llama, randomise_adapters
from helpers.kernelizing import explain, kernelize_in_place
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("on_device")
CASE = Case((6,), 32, 16, 4, bias=True)


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x, alone=False):
        return self.q(x) if alone else self.q(x) + self.k(x)


@pytest.fixture
def computed(lora_fused, monkeypatch):
    """Names of the fused computations that run; this device is taken to wait for the host as a GPU does."""
    monkeypatch.setattr(lora_fused.peft.small_batch, "_SMALL_ANYWHERE", True)
    monkeypatch.setattr(lora_fused.peft.small_batch, "SMALL_ROWS", 512)
    names = []

    def spy(name):
        own = getattr(lora_fused.functional.dispatch, name)

        def call(*args, **kwargs):
            names.append(name)
            return own(*args, **kwargs)

        monkeypatch.setattr(lora_fused.functional.dispatch, name, call)

    spy("compute_group")
    spy("compute_gated")
    return names


@pytest.mark.parametrize(
    "rows,adapter,config,mode,own",
    [
        (512, torch.bfloat16, {}, "", True),
        (0, torch.bfloat16, {"lora_dropout": 0.1}, "", True),
        (513, torch.bfloat16, {}, "", False),
        (512, torch.bfloat16, {}, "grad", False),
        (512, torch.bfloat16, {}, "autocast", False),
        (1, torch.bfloat16, {}, "training", False),
        (1, torch.bfloat16, {"use_dora": True}, "", False),
        (4, torch.float32, {}, "", True),
        (5, torch.float32, {}, "", False),
    ],
)
def test_small_work_without_a_gradient(lora_fused, computed, rows, adapter, config, mode, own):
    model, layer = peft_linear(CASE, torch.bfloat16, adapter, **config)
    ours, x = kernelize_in_place(lora_fused, model).train(mode == "training"), torch.randn(rows, 32).bfloat16()
    grad, autocast = mode == "grad", mode == "autocast"
    with torch.set_grad_enabled(grad), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        torch.manual_seed(3)
        expected = type(layer).forward(layer, x)
        (row,) = explain(lora_fused, ours, rows)
        torch.manual_seed(3)
        result = ours(x)
    assert computed == ([] if own else ["compute_group"])
    assert row.fused != own and (row.reason == lora_fused.peft.small_batch.SMALL) == own, row
    if own:
        assert torch.equal(result, expected)


@pytest.mark.parametrize(
    "rows,config,adapter,own",
    [
        (512, {}, torch.bfloat16, True),
        (513, {}, torch.bfloat16, False),
        (1, {}, torch.float32, False),
        (1, {"lora_dropout": 0.1}, torch.bfloat16, False),
        (1, {"use_dora": True}, torch.bfloat16, False),
    ],
)
def test_small_training_of_a_linear_alone(lora_fused, computed, rows, config, adapter, own):
    """From the second call on, since the first one was alone, with PEFT's own results."""
    model, layer = peft_linear(CASE, torch.bfloat16, adapter, **config)
    ours, x = kernelize_in_place(lora_fused, model), torch.randn(rows, 32).bfloat16().requires_grad_()
    ours(x.detach().clone().requires_grad_()).sum().backward()
    assert computed == ["compute_group"]
    (row,) = explain(lora_fused, ours, rows)
    result = ours(x)
    assert len(computed) == (1 if own else 2)
    assert row.fused != own and (row.reason == lora_fused.peft.small_batch.SMALL_ALONE) == own, row
    if own:
        assert torch.equal(result, type(layer).forward(layer, x))
    ours(torch.randn(513, 32).bfloat16())
    assert len(computed) == (2 if own else 3)


@pytest.mark.parametrize("names", (LINEARS, ["o_proj"], ["q_proj", "k_proj", "o_proj"]), ids=str)
def test_explain_is_true_before_every_pass(lora_fused, computed, names):
    """Of the model's last linears, too, which no other one is called after."""
    ours, ids = kernelize_in_place(lora_fused, peft_llama(target_modules=names)), torch.arange(8)[None]
    own = set()
    for _ in range(4):
        said = {row.module: "fused" if row.fused else row.reason for row in explain(lora_fused, ours, ids.numel())}
        with lora_fused.record() as calls:
            loss = ours(ids).logits.sum()
        ran = {row.module: [what for what, _ in row.calls] for row in lora_fused.explain(ours, calls=calls)}
        loss.backward()
        assert ran == {name: [what] for name, what in said.items()}
        own.add(frozenset(name.rpartition(".")[2] for name, what in said.items() if what != "fused"))
    assert own == {frozenset(), frozenset(["o_proj"])}


def test_explain_decides_nothing(lora_fused, computed):
    """A linear that was alone in a large pass and was asked about few rows has siblings in the next one."""
    model = get_peft_model(Siblings(), LoraConfig(r=4, target_modules=["q", "k"]))
    randomise_adapters(model, torch.float32)
    ours, few, many = kernelize_in_place(lora_fused, model), torch.randn(8, 32), torch.randn(513, 32)
    ours(many.clone(), alone=True).sum().backward()
    assert [row.fused for row in explain(lora_fused, ours, 8)] == [False, True]
    for _ in range(2):
        ours(many.clone()).sum().backward()
    computed.clear()
    assert [row.group for row in explain(lora_fused, ours, 8)] == ["q+k", "q+k"]
    ours(few)
    assert computed == ["compute_group"]
    ours(many.clone(), alone=True).sum().backward()
    assert explain(lora_fused, ours)[0].group == "single"


@pytest.mark.parametrize("reentrant", (True, False))
def test_small_training_alone_is_computed_again_as_it_was(lora_fused, computed, reentrant):
    """Two graphs wait, the first of a call before the linear was known to be alone: each saves what it saved."""
    ours = kernelize_in_place(lora_fused, peft_linear(CASE, torch.bfloat16, torch.bfloat16)[0])
    layer = ours.base_model.model.proj
    ys, expected = [], []
    for i in range(5):
        x = torch.randn(6, 32).bfloat16().requires_grad_()
        ys.append((x, checkpoint(ours, x, use_reentrant=reentrant)))
        with torch.no_grad():
            expected.append(type(layer).forward(layer, x))
        if i == 2:
            ys[0][1].sum().backward()
            ys[1][1].sum().backward()
            ys[2][1].sum().backward()
    for _, y in ys[3:]:
        y.sum().backward()
    for (x, y), truth in zip(ys, expected):
        torch.testing.assert_close(y, truth, rtol=2**-6, atol=2**-6)
        assert x.grad.any()
    assert 0 < len(computed) < 10  # the last calls are PEFT's


def test_small_training_of_siblings_stays_a_group(lora_fused, computed):
    """Those that run alone in the model are PEFT's, q, k and v are not."""
    ours, ids = kernelize_in_place(lora_fused, peft_llama()), torch.arange(8)[None]
    for _ in range(3):
        ours(ids).logits.sum().backward()
    computed.clear()
    ours(ids)
    layers = ours.base_model.model.model.layers
    assert sorted(computed) == ["compute_gated"] * len(layers) + ["compute_group"] * len(layers)


def test_a_reentrant_checkpoint_keeps_its_masks(lora_fused, computed):
    """Its forward has no gradient, what it computes again has: y = J x + b and dx = Jᵀ dy with one mask in J."""
    ours = kernelize_in_place(lora_fused, peft_linear(CASE, torch.float32, torch.float32, lora_dropout=0.5)[0])
    x, dy = torch.randn(6, 32, requires_grad=True), torch.randn(6, 16)
    y = checkpoint(ours, x, use_reentrant=True)
    y.backward(dy)
    bias = ours.base_model.model.proj.base_layer.bias
    torch.testing.assert_close(((y - bias) * dy).sum(), (x * x.grad).sum())
    assert len(computed) == 2


@pytest.mark.parametrize("tokens,own", ((512, True), (513, False)))
def test_a_small_model_without_a_gradient(lora_fused, computed, tokens, own):
    model = peft_llama().eval()
    ours, ids = kernelize_in_place(lora_fused, copy.deepcopy(model)), torch.arange(tokens)[None] % 50
    with torch.no_grad():
        expected, result = model(ids).logits, ours(ids).logits
    assert bool(computed) != own and ("compute_gated" in computed) != own
    assert torch.equal(result, expected) == own
    torch.testing.assert_close(result, expected)
    computed.clear()
    ours(ids)
    assert {"compute_group", "compute_gated"} <= set(computed)


def test_a_sibling_that_peft_computes_is_not_computed_ahead(lora_fused, computed, monkeypatch):
    model = peft_llama()
    for name, parameter in model.named_parameters():
        if "q_proj.lora" in name:
            parameter.data = parameter.data.bfloat16()
    ours, ids = kernelize_in_place(lora_fused, model).eval(), torch.arange(8)[None]
    for _ in range(2):
        ours(ids)
    sizes, own = [], lora_fused.functional.dispatch.compute_group
    monkeypatch.setattr(
        lora_fused.functional.dispatch,
        "compute_group",
        lambda x, group, *args, **kwargs: sizes.append(len(group)) or own(x, group, *args, **kwargs),
    )
    ours(ids)
    assert max(sizes) == 3
    sizes.clear()
    with torch.no_grad():
        ours(ids)
    assert sizes == [1, 1]  # the queries of both layers
