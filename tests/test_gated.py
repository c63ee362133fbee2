"""The gated MLP as one Function: the models it is found in, against PEFT, and what keeps it out."""

import contextlib
import copy
import functools
import warnings

import pytest
import torch
import transformers
from helpers.cases import DEVICE, DrawnDropout, OwnForwards, assert_as_good, randomise_adapters, take_exactly
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

pytestmark = pytest.mark.usefixtures("on_device")
SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
)
CONFIGS = {
    "Llama": transformers.LlamaConfig(**SMALL),
    "Mistral": transformers.MistralConfig(**SMALL),
    "Qwen2": transformers.Qwen2Config(**SMALL),
    "Qwen3": transformers.Qwen3Config(**SMALL),
    "Gemma": transformers.GemmaConfig(**SMALL),
    "Gemma2": transformers.Gemma2Config(**SMALL),
    "Gemma3": transformers.Gemma3TextConfig(**SMALL),
    "Phi3": transformers.Phi3Config(**SMALL),
    "Olmo2": transformers.Olmo2Config(**SMALL),
    "Llama, exact GELU": transformers.LlamaConfig(**SMALL, hidden_act="gelu"),
    "Llama, ReLU": transformers.LlamaConfig(**SMALL, hidden_act="relu"),
    "Llama, ReLU squared": transformers.LlamaConfig(**SMALL, hidden_act="relu2"),
    "Llama, bias": transformers.LlamaConfig(**SMALL, mlp_bias=True),
}
MLP = r".*\.mlp\..*proj"


class GLU(nn.Module):
    """A gated MLP of nobody's library, with names of its own."""

    def __init__(self, k=32, i=48, n=24, bias=True):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(k, i, bias), nn.Linear(i, n, bias), nn.Linear(k, i, bias)

    def forward(self, hidden_states):
        return self.w2(self.w3(hidden_states) * nn.functional.silu(self.w1(hidden_states)))


def glu(dtype=torch.float64, targets=("w1", "w2", "w3"), **config):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("mlp", GLU())
    options = dict(r=4, lora_alpha=6, target_modules=list(targets))
    model = get_peft_model(model.to(dtype), LoraConfig(**{**options, **config}), autocast_adapter_dtype=False)
    randomise_adapters(model, dtype)
    return model.train()


def mlp_of(model):
    return model.base_model.model.mlp


def kernelized(lora_fused, model, device=DEVICE):
    lora_fused.register_peft_layers()
    return kernelize(copy.deepcopy(model), mode=Mode.TRAINING, device=device)


def explained(lora_fused, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {row.module.rpartition(".")[2]: row for row in lora_fused.explain(model)}


def is_one_function(y):
    return y.grad_fn.name() in ("GatedMLPFunctionBackward", "NativeGatedFunctionBackward")


def step(model, x, **scope):
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, **scope) if scope else torch.enable_grad():
        y = model(x)
    y.float().square().sum().backward()
    return {"y": y, "x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if theirs[name] is None:
            assert value is None, name
        else:
            torch.testing.assert_close(value, theirs[name], rtol=1e-10, atol=1e-10, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("config", ({}, dict(use_dora=True), dict(bias="all")), ids=str)
def test_models(lora_fused, name, config):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).double()
    options = dict(r=4, target_modules=MLP, task_type="CAUSAL_LM")
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
    assert explained(lora_fused, ours)["w1"].layer == "LoraGatedMLP"
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


def hook(module, args, output):
    return output * 2


def hook_on(part):
    return lambda mlp: getattr(mlp, part).register_forward_hook(hook)


def disabled(mlp):
    mlp.w1.enable_adapters(False)


def other_forward(mlp):
    before = mlp.w3.forward
    mlp.w3.forward = lambda x: 2 * before(x)


def second_adapter(mlp):
    mlp.w2.lora_B["default"].register_forward_hook(hook)


@pytest.mark.parametrize(
    "change,alone",
    (
        (hook_on("w1"), {"w1": True, "w2": True, "w3": True}),
        (hook_on("w2"), {"w1": True, "w2": True, "w3": True}),
        (disabled, {"w1": False, "w2": True, "w3": True}),
        (lambda mlp: mlp.w2.merge(), {"w1": True, "w2": False, "w3": True}),
        (other_forward, {"w1": True, "w2": True, "w3": False}),
        (second_adapter, {"w1": True, "w2": False, "w3": True}),
    ),
    ids=("hook", "hook on down", "disabled", "merged", "another tool's forward", "hook inside"),
)
def test_a_projection_falls_back_alone(lora_fused, change, alone):
    model, x = glu(), torch.randn(5, 32, dtype=torch.float64)
    ours = kernelized(lora_fused, model)
    change(mlp_of(model)), change(mlp_of(ours))
    result = step(ours, x)
    assert not is_one_function(result["y"])
    assert_same(result, step(model, x))
    rows = explained(lora_fused, ours)
    assert {name: row.fused for name, row in rows.items()} == alone
    assert all(row.layer != "LoraGatedMLP" for row in rows.values())


class WithOption(GLU):
    def forward(self, hidden_states, scale=None):
        y = super().forward(hidden_states)
        return y if scale is None else scale * y


def test_an_option_of_the_forward_stays(lora_fused):
    """Its projections are fused alone, with the option and without."""
    model, x = nn.Sequential(), torch.randn(5, 32, dtype=torch.float64)
    model.add_module("mlp", WithOption())
    model = get_peft_model(
        model.double(), LoraConfig(r=4, target_modules=["w1", "w2", "w3"]), autocast_adapter_dtype=False
    )
    randomise_adapters(model, torch.float64)
    ours = kernelized(lora_fused, model)
    for given in ((x,), (x, 3.0)):
        with OwnForwards() as calls:
            y = mlp_of(ours)(*given)
        assert not calls
        torch.testing.assert_close(y, mlp_of(model)(*given))


def test_a_product_that_broadcasts(lora_fused):
    """Up gives one number a token: the module's own forward multiplies, the projections are fused alone."""
    model, x = nn.Sequential(), torch.randn(5, 32, dtype=torch.float64)
    model.add_module("mlp", GLU())
    model.mlp.w3 = nn.Linear(32, 1)
    model = get_peft_model(
        model.double(), LoraConfig(r=4, target_modules=["w1", "w2", "w3"]), autocast_adapter_dtype=False
    )
    randomise_adapters(model, torch.float64)
    ours = kernelized(lora_fused, model.train())
    with OwnForwards() as calls:
        result = step(ours, x)
    assert not calls and not is_one_function(result["y"])
    assert_same(result, step(model, x))


def llama():
    base = transformers.AutoModelForCausalLM.from_config(CONFIGS["Llama"]).double()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=MLP), autocast_adapter_dtype=False)
    randomise_adapters(model, torch.float64)
    return model


def set_activation(model, act):
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = act


@contextlib.contextmanager
def count_gated(lora_fused):
    """A list that grows with every gated MLP that is computed as one."""
    own, calls = lora_fused.functional.dispatch.compute_gated, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            lora_fused.functional.dispatch,
            "compute_gated",
            lambda *args, **options: calls.append(0) or own(*args, **options),
        )
        yield calls


def test_another_activation_later(lora_fused):
    plain = llama()
    ours = kernelized(lora_fused, plain)
    tokens = torch.randint(1, 64, (2, 9))
    for act, known in ((nn.GELU(), True), (nn.SiLU(), True), (nn.Softplus(), False)):
        set_activation(plain, act), set_activation(ours, act)
        with count_gated(lora_fused) as calls:
            logits = ours(input_ids=tokens).logits
        assert len(calls) == (2 if known else 0)
        torch.testing.assert_close(logits, plain(input_ids=tokens).logits)


def test_explain_after_an_activation_that_is_not_known(lora_fused):
    ours = kernelized(lora_fused, llama())
    set_activation(ours, nn.Softplus())
    rows = lora_fused.explain(ours)
    assert len(rows) == 6 and all(row.fused and row.layer == "LoraLinear" for row in rows), str(rows)


def test_a_known_activation_after_one_that_is_not(lora_fused):
    ours, tokens = kernelized(lora_fused, llama()), torch.randint(1, 64, (2, 9))
    for act in (nn.Softplus(), nn.SiLU()):
        set_activation(ours, act)
        with count_gated(lora_fused) as calls:
            ours(input_ids=tokens)
    assert len(calls) == 2


def test_an_mlp_without_adapters_is_left_alone(lora_fused):
    model = get_peft_model(
        transformers.AutoModelForCausalLM.from_config(CONFIGS["Llama"]), LoraConfig(r=2, target_modules=["q_proj"])
    )
    ours = kernelized(lora_fused, model)
    assert not any("forward" in module.__dict__ for name, module in ours.named_modules() if name.endswith("mlp"))


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
