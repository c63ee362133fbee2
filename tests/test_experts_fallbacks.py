"""Experts that are PEFT's to compute, with the reason; what other tools do to them; where PEFT itself is wrong."""

import copy
import functools
import types
import warnings

import pytest
import torch
import transformers
import transformers.integrations.moe as transformers_moe
from helpers.cases import DEVICE
from helpers.experts import (
    Block,
    adapt,
    assert_fused,
    assert_peft_runs,
    base_of,
    block_of,
    error,
    example,
    explain,
    is_experts,
    kernelized,
    mixture_of,
    names_of,
    pair,
)  # fmt: skip
from peft import LoraConfig, get_peft_model
from torch import nn

pytestmark = pytest.mark.usefixtures("on_device")


# --- what the module is ---


def test_on_a_gpu_where_they_have_not_been_tried(lora_fused, monkeypatch):
    experts = lora_fused.peft.experts
    weight = types.SimpleNamespace(is_cpu=False)  # of any vendor
    adapted = types.SimpleNamespace(up=types.SimpleNamespace(weight=weight))
    monkeypatch.setattr(lora_fused.backends.native, "available", False)
    assert experts.read_call(adapted, None, (None, None), {}).reason == experts.UNTRIED


def test_a_trained_weight(lora_fused):
    ours, theirs = pair(lora_fused)
    for each in (ours, theirs):
        base_of(each).down_proj.requires_grad_(True)
    assert_peft_runs(lora_fused, ours, theirs, "down_proj: the base weight is trained")
    for each in (ours, theirs):
        base_of(each).down_proj.requires_grad_(False)
    assert_fused(lora_fused, ours, theirs)


def test_hooks_on_the_experts(lora_fused):
    ours, theirs = pair(lora_fused)
    handles = [base_of(each).register_forward_hook(lambda module, args, output: 2 * output) for each in (ours, theirs)]
    assert_peft_runs(lora_fused, ours, theirs, "the experts module has hooks")
    for handle in handles:
        handle.remove()
    assert_fused(lora_fused, ours, theirs)
    for each in (ours, theirs):
        inner = mixture_of(each).experts.base_layer
        inner.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
    assert_peft_runs(lora_fused, ours, theirs, "the inner wrapper has hooks")


def test_a_forward_on_the_instance(lora_fused):
    ours, theirs = pair(lora_fused)

    def twice(module, *args):
        return 2 * type(module).forward(module, *args)

    for each in (ours, theirs):
        base_of(each).forward = types.MethodType(twice, base_of(each))
    assert_peft_runs(lora_fused, ours, theirs, "the experts module has a forward of its own")


def test_a_forward_that_is_replaced_in_the_class(lora_fused, monkeypatch):
    ours, theirs = pair(lora_fused)
    assert_fused(lora_fused, ours, theirs)  # what was found genuine is remembered
    cls = type(base_of(ours))
    own = cls.forward

    @functools.wraps(own)
    def twice(self, *args):
        return 2 * own(self, *args)

    monkeypatch.setattr(cls, "forward", twice)
    assert_peft_runs(lora_fused, ours, theirs, "has no forward of transformers' use_experts_implementation")
    monkeypatch.undo()
    assert_fused(lora_fused, ours, theirs)


def test_what_makes_the_parameter_is_replaced(lora_fused, monkeypatch):
    import peft.tuners.lora.layer as peft_layer

    if not hasattr(peft_layer, "_LoraFactorsProxy"):
        pytest.skip("this PEFT adds deltas")
    ours, theirs = pair(lora_fused)
    own = peft_layer._LoraFactorsProxy.forward
    monkeypatch.setattr(peft_layer._LoraFactorsProxy, "forward", lambda self, weight: 2 * own(self, weight))
    assert_peft_runs(lora_fused, ours, theirs, "_LoraFactorsProxy.forward is replaced by")
    monkeypatch.undo()
    assert_fused(lora_fused, ours, theirs)


def test_an_implementation_that_is_replaced_or_unknown(lora_fused, monkeypatch):
    ours, theirs = pair(lora_fused, implementation="batched_mm")
    assert_fused(lora_fused, ours, theirs)
    interface = transformers_moe.ALL_EXPERTS_FUNCTIONS
    own = interface["batched_mm"]
    monkeypatch.setitem(interface, "batched_mm", lambda module, *args: 2 * own(module, *args))
    assert_peft_runs(lora_fused, ours, theirs, "experts implementation 'batched_mm' is replaced by")
    monkeypatch.undo()
    assert_fused(lora_fused, ours, theirs)
    monkeypatch.setitem(interface, "mine", lambda module, *args: 3 * own(module, *args))
    for each in (ours, theirs):
        base_of(each).config._experts_implementation = "mine"
    assert_peft_runs(lora_fused, ours, theirs, "experts implementation 'mine'")


def test_an_own_forward_that_computes_otherwise(lora_fused):
    """What the decorator says and what the class does differ; transformers' batched forward goes by the decorator."""
    from transformers.models.mixtral import modeling_mixtral

    class Reversed(modeling_mixtral.MixtralExperts):
        def _apply_gate(self, z):
            up, gate = z.chunk(2, -1)
            return self.act_fn(gate) * up

    block = block_of("mixtral")
    base = block.mixture.experts
    base.__class__ = Reversed
    theirs = adapt(block)
    ours = kernelized(lora_fused, theirs)
    assert_peft_runs(lora_fused, ours, theirs, "Reversed.forward computes something else")
    for each in (ours, theirs):
        base_of(each).config._experts_implementation = "batched_mm"
    assert_fused(lora_fused, ours, theirs)


class Slow(nn.Module):
    """An activation that no table has."""

    def __init__(self, trained=False):
        super().__init__()
        if trained:
            self.slope = nn.Parameter(torch.tensor(0.7).double())
        else:
            self.slope = 0.7

    def forward(self, x):
        return torch.tanh(x * self.slope)


@pytest.mark.parametrize("name", ("mixtral", "nemotron_h"))
def test_a_gate_that_is_not_known(lora_fused, name):
    """Autograd differentiates it; with parameters of its own it is PEFT's."""
    implementation = "batched_mm" if name == "nemotron_h" else "eager"
    block = block_of(name, implementation=implementation)
    (base,) = filter(is_experts, block.modules())
    base.act_fn = Slow()
    theirs = adapt(block)
    ours = kernelized(lora_fused, theirs)
    assert_fused(lora_fused, ours, theirs)
    for each in (ours, theirs):  # seen at once
        base_of(each).act_fn.slope = 1.3
    assert_fused(lora_fused, ours, theirs)
    trained = Slow(trained=True)
    for each in (ours, theirs):
        base_of(each).act_fn = copy.deepcopy(trained)
    assert_peft_runs(lora_fused, ours, theirs, "the activation has trained parameters")


def test_a_changed_limit_is_seen(lora_fused):
    ours, theirs = pair(lora_fused, "gpt_oss")
    assert_fused(lora_fused, ours, theirs)
    for each in (ours, theirs):
        base_of(each).limit = 0.3
        base_of(each).alpha = 2.5
    assert_fused(lora_fused, ours, theirs)


def test_hooks_on_the_activation(lora_fused):
    ours, theirs = pair(lora_fused)
    for each in (ours, theirs):
        base_of(each).act_fn.register_forward_hook(lambda module, args, output: 2 * output)
    assert_peft_runs(lora_fused, ours, theirs, "the activation has hooks")


def test_a_norm_after_each_expert(lora_fused):
    from transformers.models.muse_spark import modeling_muse_spark as modeling

    config = transformers.MuseSparkTextConfig(
        hidden_size=32,
        moe_hidden_size=32,
        moe_intermediate_size=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    config._experts_implementation = "eager"

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(32, 4)
            self.experts = modeling.MuseSparkExperts(config)

        def forward(self, x):
            x = x.reshape(-1, 32)
            weights, index = self.gate(x).softmax(-1).topk(2, -1)
            return self.experts(x, index, weights).view(2, 9, 32)

    mixture = Mixture().double()
    for parameter in mixture.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs = adapt(Block(mixture))
    assert_peft_runs(lora_fused, kernelized(lora_fused, theirs), theirs, "a norm after each expert")


def test_a_bias_that_is_adapted(lora_fused):
    theirs = adapt(block_of("gpt_oss"), ["gate_up_proj", "down_proj", "down_proj_bias"])
    ours = kernelized(lora_fused, theirs)
    assert_peft_runs(lora_fused, ours, theirs, "down_proj_bias of GptOssExperts is no weight of experts", rows=3)


def test_a_router_that_is_adapted(lora_fused):
    """Its wrapper is PEFT's, the experts beside it are fused."""
    block = block_of("qwen3_moe")
    config = LoraConfig(
        r=3, target_modules=[], target_parameters=["gate.weight", "experts.gate_up_proj", "experts.down_proj"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(block, config, autocast_adapter_dtype=False)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    ours = kernelized(lora_fused, theirs)
    assert_fused(lora_fused, ours, theirs)
    router, *experts = sorted(explain(lora_fused, ours), key=lambda row: "experts" in row.module)
    assert "no weight of experts" in router.reason and len(experts) == 2 and all(row.fused for row in experts)
    assert {row.group for row in experts} == {"gate_up_proj+down_proj"}


def test_weights_of_two_dtypes(lora_fused):
    ours, theirs = pair(lora_fused)
    for each in (ours, theirs):
        base_of(each).down_proj.data = base_of(each).down_proj.data.float()
    (first, _) = explain(lora_fused, ours)
    assert "weights of several dtypes (torch.float32, torch.float64)" in first.reason
    with pytest.raises(RuntimeError):
        ours(example()[0])


def test_weights_of_another_shape(lora_fused):
    ours, _ = pair(lora_fused)
    base_of(ours).down_proj.data = torch.randn(3, 32, 16).double()
    assert "on a parameter of (3, 32, 16)" in explain(lora_fused, ours)[0].reason


def test_something_between_the_wrappers(lora_fused):
    class Between(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            return self.inner(*args)

    ours, _ = pair(lora_fused)
    outer = mixture_of(ours).experts
    outer.base_layer = Between(outer.base_layer)
    (row, *_) = explain(lora_fused, ours)
    assert not row.fused and "Between has no parameter down_proj" in row.reason


@pytest.mark.parametrize("merged", (False, True))
def test_calls_of_both_wrappers_are_recorded(lora_fused, merged):
    """The outermost one computes the other's, too; PEFT's forward calls it."""
    ours, _ = pair(lora_fused)
    wrapper = mixture_of(ours).experts
    for each in (wrapper, wrapper.base_layer) if merged else ():
        each.merge()
    with lora_fused.record() as calls:
        ours(example()[0])
    rows = lora_fused.explain(ours, calls=calls)
    assert len(rows) == 2 and {row.fused for row in rows} == {not merged}
    assert {row.calls for row in rows} == {((rows[0].reason or "fused", 1),)}, str(rows)


def test_not_kernelized(lora_fused):
    model = adapt(block_of("qwen3_moe"))
    rows = explain(lora_fused, model)
    assert len(rows) == 2 and all("not kernelized" in row.reason and row.last is None for row in rows)


# --- where PEFT is wrong ---


def test_four_bit_experts_are_warned_of(lora_fused):
    """PEFT adds one more delta at every call: that is its result, which nobody should take for right."""
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    block = block_of("qwen3_moe", torch.float32)
    for name in names_of(block):
        parametrize.replace_parameter_4bit(block.mixture.experts, name, quant_type="nf4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = dict(
            r=3, target_modules=[], target_parameters=[f"mixture.experts.{name}" for name in names_of(block)]
        )
        model = get_peft_model(block, LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    with lora_fused.use_peft_layers():
        from kernels import Mode, kernelize

        ours = kernelize(model, mode=Mode.TRAINING, device=DEVICE)
    x = torch.randn(2, 9, 32)
    with pytest.warns(
        UserWarning, match=r"lora_fused: \S*mixture\.experts: \w+ is parametrised \(Bnb4bit.*one more delta"
    ):
        with torch.no_grad():
            first = ours(x)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message="lora_fused.*")  # once is enough
        second = ours(x)
    assert error(second, first) > 1e-3
    assert all("wrong" in row.reason and not row.fused for row in explain(lora_fused, ours))


def test_fp8_experts_are_warned_of(lora_fused):
    """PEFT adds the delta to the codes."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = transformers.Qwen3MoeConfig(
        hidden_size=128, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    decorated = transformers_moe.use_experts_implementation(
        fp8.FP8Experts, experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS, has_bias=False, has_gate=True
    )

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = decorated(config=config, block_size=(128, 128))

    block = Mixture()
    for name in ("gate_up_proj", "down_proj"):
        parameter = getattr(block.experts, name)
        parameter.data = torch.randn(parameter.shape).to(torch.float8_e4m3fn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(block, LoraConfig(r=3, target_modules=[], target_parameters=["experts.gate_up_proj"]))
    ours = kernelized(lora_fused, model)
    (row,) = explain(lora_fused, ours)
    assert not row.fused and "PEFT adds the delta to the codes" in row.reason
    with pytest.warns(UserWarning, match=r"lora_fused: \S*experts: gate_up_proj has dtype torch.float8_e4m3fn"):
        with pytest.raises(Exception):  # noqa: B017 (no kernel for it on a CPU, which is PEFT's own error)
            ours.base_model.model.experts(torch.randn(5, 128), torch.zeros(5, 2).long(), torch.rand(5, 2), no_such=1)
