"""The gated MLP as one Function: the models it is found in, against PEFT, and what keeps it out."""

import copy
import functools

import pytest
import torch
import transformers
from helpers.cases import DEVICE, DrawnDropout, OwnForwards, assert_as_good, randomise_adapters, take_exactly
from helpers.kernelizing import kernelized
from helpers.mlps import CONFIGS, GLU, MLP_TARGETS, assert_same, glu, is_one_function, mlp_of, rows_by_projection, step
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("config", ({}, dict(use_dora=True), dict(bias="all")), ids=str)
def test_models(lora_fused, name, config):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).double()
    options = dict(r=4, target_modules=MLP_TARGETS, task_type="CAUSAL_LM")
    plain = get_peft_model(base, LoraConfig(**options, **config), autocast_adapter_dtype=False).train()
    randomise_adapters(plain, torch.float64)
    ours = kernelized(lora_fused, plain)
    rows = lora_fused.explain(ours)
    assert len(rows) >= 4 and all(row.layer == "LoraGatedMLP" and row.fused for row in rows), str(rows)
    tokens = torch.randint(1, 64, (2, 9))
    results, counts = [], []
    for model in (plain, ours):
        with OwnForwards() as calls:
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        results.append({"loss": loss, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}})
        counts.append(calls.total())
    assert counts == [len(rows), 0]
    assert_same(results[1], results[0])


CONFIGURATIONS = (
    {},
    dict(targets=("w1",)),
    dict(targets=("w2",)),
    dict(targets=("w1", "w3"), use_dora=True),
    dict(use_dora=True),
    dict(lora_bias=True),
    dict(bias="all"),
    dict(bias="lora_only", use_dora=True),
    dict(rank_pattern={"w1": 9}, alpha_pattern={"w2": 1}, use_rslora=True),
)


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("lead", ((5,), (2, 3), (0, 4)), ids=str)
def test_configurations(lora_fused, config, lead):
    model, x = glu(**config), torch.randn(*lead, 32, dtype=torch.float64)
    ours = kernelized(lora_fused, model)
    result = step(ours, x)
    assert is_one_function(result["y"])
    assert_same(result, step(model, x))


@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=("lora", "dora"))
@pytest.mark.parametrize("part", ("w1", "w2", "w3"))
def test_a_trained_weight(lora_fused, part, config):
    """Of any of the three, which the native op leaves to the chain of operations."""
    model, x = glu(**config), torch.randn(5, 32, dtype=torch.float64)
    getattr(mlp_of(model), part).base_layer.weight.requires_grad_(True)
    ours = kernelized(lora_fused, model)
    result = step(ours, x)
    assert is_one_function(result["y"]) and any("base_layer.weight" in name for name in result)
    assert_same(result, step(model, x))


@pytest.mark.parametrize("config", (dict(lora_dropout=0.3), dict(lora_dropout=0.3, use_dora=True)), ids=str)
def test_dropout(lora_fused, config):
    """Every projection has a mask of its own, down's included."""
    model, x = glu(**config), torch.randn(5, 32, dtype=torch.float64)
    ours = kernelized(lora_fused, model)
    torch.manual_seed(4)
    for index, (name, features) in enumerate((("w1", 32), ("w3", 32), ("w2", 48))):
        drops = getattr(mlp_of(model), name).lora_dropout
        drops["default"] = DrawnDropout(lora_fused, 0.3, (5, features), DEVICE, index, 3)
    torch.manual_seed(4)
    result = step(ours, x)
    assert is_one_function(result["y"])
    assert_same(result, step(model, x))


@pytest.mark.parametrize("base", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("adapter", (torch.float32, None), ids=("fp32 adapter", "same"))
@pytest.mark.parametrize("autocast", (False, True), ids=("", "autocast"))
@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
def test_precision(lora_fused, device, base, adapter, autocast, dora):
    model = glu(torch.float32, use_dora=dora).to(base).to(device)
    randomise_adapters(model, adapter or base)
    x = torch.randn(70, 32, device=device).to(base)
    truth = step(copy.deepcopy(model).double(), x.double())
    scope = dict(dtype=torch.bfloat16) if autocast else {}
    theirs = step(copy.deepcopy(model), x, **scope)
    ours = kernelized(lora_fused, model, device)
    results = step(ours, x, **scope)
    assert rows_by_projection(lora_fused, ours)["w1"].layer == "LoraGatedMLP"
    unit = torch.bfloat16 if autocast else base
    for name, value in results.items():  # gate or up, the product, and what comes back through them
        assert_as_good(name, value, theirs[name], truth[name], unit, stored=3)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU takes them so unasked")
@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
def test_float32_adapters_as_on_a_gpu(lora_fused, monkeypatch, dora):
    """In two parts, by the native op."""
    calls = take_exactly(lora_fused, monkeypatch)
    test_precision(lora_fused, "cpu", torch.bfloat16, torch.float32, False, dora)
    assert calls and all(calls)


class Checkpointed(nn.Module):
    """An MLP and, where given, what comes after it, computed again in backward."""

    def __init__(self, ours, after, reentrant):
        super().__init__()
        self.ours, self.after, self.reentrant = ours, after, reentrant

    def forward(self, x):
        return checkpoint(lambda x: self.after(self.ours(x)), x * 1, use_reentrant=self.reentrant)


@pytest.mark.parametrize("config", (dict(lora_dropout=0.3), dict(use_dora=True)), ids=("lora", "dora"))
@pytest.mark.parametrize("after", (nn.Identity(), nn.Tanh()), ids=("last", "not last"))
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing(lora_fused, monkeypatch, reentrant, after, config):
    """What is not needed again is not computed again: LoRA's last product, where nothing that comes after it is
    saved. The reentrant kind asks for all of it."""
    native = lora_fused.autograd.gated_mlp_native
    made = []
    forward = native._Down.forward
    monkeypatch.setattr(native._Down, "forward", staticmethod(lambda *args: made.append(0) or forward(*args)))
    ours, x = kernelized(lora_fused, glu(**config)), torch.randn(5, 32, dtype=torch.float64)
    torch.manual_seed(8)
    expected = step(nn.Sequential(ours, after), x)
    assert not made
    torch.manual_seed(8)
    result = step(Checkpointed(ours, after, reentrant), x)
    assert_same({name.replace("ours.", "0."): value for name, value in result.items()}, expected)
    lora = "use_dora" not in config
    assert len(made) == (lora and (reentrant or isinstance(after, nn.Tanh)))


@pytest.mark.parametrize("policy", (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE), ids=str)
def test_selective_checkpointing(lora_fused, policy):
    """It keeps what ops gave and gives it out again in their order."""
    model, x = glu(), torch.randn(5, 32, dtype=torch.float64)
    ours = kernelized(lora_fused, model)
    contexts = functools.partial(create_selective_checkpoint_contexts, lambda *_, **__: policy)

    class Selective(nn.Module):
        def __init__(self):
            super().__init__()
            self.ours = ours

        def forward(self, x):
            return checkpoint(lambda x: self.ours(x).tanh(), x * 1, use_reentrant=False, context_fn=contexts)

    with OwnForwards() as calls:
        result = step(Selective(), x)
    assert not calls
    expected = step(nn.Sequential(model, nn.Tanh()), x)
    assert_same({name.replace("ours.", "0."): value for name, value in result.items()}, expected)


def test_no_gradient_wanted(lora_fused):
    model, x = glu(), torch.randn(5, 32, dtype=torch.float64)
    ours = kernelized(lora_fused, model)
    for scope in (torch.no_grad, torch.inference_mode):
        with scope():
            with OwnForwards() as calls:
                y = ours(x)
            assert not calls
            torch.testing.assert_close(y, model(x))


def test_frozen_adapters_still_pass_the_gradient_on(lora_fused):
    model, x = glu(), torch.randn(5, 32, dtype=torch.float64)
    model.requires_grad_(False)
    ours = kernelized(lora_fused, model)
    result = step(ours, x)
    assert is_one_function(result["y"])
    assert_same(result, step(model, x))


def test_use_peft_layers_restores_every_class(lora_fused):
    model = glu()
    before = GLU.__dict__.get("kernel_layer_name")
    if before:
        del GLU.kernel_layer_name, GLU.kernel_condition
    with lora_fused.use_peft_layers():
        ours = kernelize(copy.deepcopy(model), mode=Mode.TRAINING, device=DEVICE)
        assert "kernel_layer_name" in GLU.__dict__
    assert "kernel_layer_name" not in GLU.__dict__ and "kernel_condition" not in GLU.__dict__
    assert is_one_function(step(ours, torch.randn(5, 32, dtype=torch.float64))["y"])


def test_double_backward_raises(lora_fused):
    ours, x = kernelized(lora_fused, glu()), torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="^lora_fused: gradients of gradients .*without kernelize"):
        dx.sum().backward()
