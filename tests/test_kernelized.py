"""The adapted modules of a model kernelized alone: fused as by `kernelize(model)`, and nothing else touched."""

import copy
import logging
import types

import accelerate
import pytest
import torch
from helpers.cases import DEVICE, LINEARS, peft_llama, tiny_llama
from helpers.heads import assert_same, heads, inner, step
from helpers.kernelizing import Loaded, explain, forwards
from helpers.llamas import passed, tokens
from kernels import Mode, kernelize as kernelize_all, use_kernel_forward_from_hub, use_kernel_mapping
from kernels.layer.globals import _KERNEL_MAPPING
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

pytestmark = pytest.mark.usefixtures("on_device")
TARGETS = [*LINEARS, "embed_tokens"]
MARKED = (BaseTuner, PreTrainedModel, lora.Linear, lora.Embedding, LlamaMLP, LlamaRMSNorm)


def test_fused_as_by_kernelize(lora_fused, kernelize_adapted):
    model = peft_llama(torch.float64, target_modules=TARGETS)
    ours, all_of_it = copy.deepcopy(model), copy.deepcopy(model)
    lora_fused.register_peft_layers()
    kernelize_all(all_of_it, mode=Mode.TRAINING, device=DEVICE)
    assert kernelize_adapted(ours, mode=Mode.TRAINING) is ours
    for _ in range(3):
        torch.testing.assert_close(passed(ours, tokens()), passed(model, tokens()), rtol=1e-11, atol=1e-11)
        passed(all_of_it, tokens())
    rows = list(explain(lora_fused, ours))
    assert len(rows) == 15 and all(row.fused for row in rows)
    assert rows == list(explain(lora_fused, all_of_it))
    assert {row.layer for row in rows} == {"LoraLinear", "LoraGatedMLP", "LoraEmbedding"}
    adapted = {
        name: function
        for name, function in forwards(all_of_it).items()
        if function.__module__.startswith(lora_fused.__name__)
    }
    assert forwards(ours) == adapted and len(adapted) == 17  # two MLPs


def test_without_registering(lora_fused, kernelize_adapted):
    """The mapping and the marks are as they were."""
    token = _KERNEL_MAPPING.set({"theirs": {}})
    before = [(vars(cls).get("kernel_layer_name"), vars(cls).get("kernel_condition")) for cls in MARKED]
    ours = kernelize_adapted(peft_llama(), mode=Mode.INFERENCE)
    assert all(row.fused for row in explain(lora_fused, ours))
    assert _KERNEL_MAPPING.get() == {"theirs": {}}
    assert [(vars(cls).get("kernel_layer_name"), vars(cls).get("kernel_condition")) for cls in MARKED] == before
    _KERNEL_MAPPING.reset(token)


@use_kernel_forward_from_hub("TheirNorm")
class Norm(nn.Module):
    def forward(self, x):
        return x / (1 + x.abs().mean())


class TheirNorm(nn.Module):
    def forward(self, x):
        return x * 0.5


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.proj = Norm(), nn.Linear(32, 16)

    def forward(self, x):
        return self.proj(self.norm(x))


def normed():
    torch.manual_seed(0)
    return get_peft_model(Normed(), LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False))


@pytest.mark.parametrize("make", (normed, peft_llama))
def test_no_word_of_the_models_own_layers(kernelize_adapted, make, caplog):
    """`kernelize(model)` warns of every norm and activation that the mapping does not have."""
    with caplog.at_level(logging.WARNING, logger="kernels"):
        kernelize_adapted(make(), mode=Mode.TRAINING)
    assert caplog.records == []


def test_kernelize_warns_of_them(lora_fused, caplog):
    """So that the absence of a warning says something."""
    with caplog.at_level(logging.WARNING, logger="kernels"), lora_fused.use_peft_layers():
        kernelize_all(normed(), mode=Mode.TRAINING)
    assert "No kernel mapping found for layer `TheirNorm`" in caplog.text


def test_layers_of_other_mappings_stay(lora_fused, kernelize_adapted):
    model = normed()
    with use_kernel_mapping({"TheirNorm": {DEVICE: Loaded(TheirNorm)}}):
        kernelize_all(model, mode=Mode.TRAINING, device=DEVICE)
    x = torch.randn(40, 32)
    expected = model(x)
    kernelize_adapted(model, mode=Mode.TRAINING)
    assert inner(model).norm.forward.__func__ is TheirNorm.forward
    assert all(row.fused for row in explain(lora_fused, model))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", ("input_layernorm", "mlp.act_fn", "self_attn.q_proj.base_layer"))
def test_forwards_of_other_tools_stay(kernelize_adapted, name):
    """Also inside of what is kernelized."""
    model = peft_llama()
    (module,) = [each for path, each in model.named_modules() if path.endswith(f"layers.0.{name}")]
    theirs = types.MethodType(type(module).forward, module)
    module.forward = theirs
    kernelize_adapted(model, mode=Mode.TRAINING)
    assert module.__dict__["forward"] is theirs


def test_a_forward_of_another_tool_on_a_lora_linear_stays(lora_fused, kernelize_adapted):
    model = heads()
    theirs = types.MethodType(lambda self, x: 3 * type(self).forward(self, x), inner(model).k)
    inner(model).k.forward = theirs
    kernelize_adapted(model, mode=Mode.TRAINING)
    assert vars(inner(model).k)["forward"] is theirs
    reasons = {row.module.rpartition(".")[2]: row.reason for row in explain(lora_fused, model)}
    assert reasons["k"].startswith("another tool set its forward") and reasons["q"] is reasons["v"] is None


def test_a_gated_mlp_that_another_mapping_names(lora_fused, kernelize_adapted, monkeypatch):
    """Its name is theirs, its forward is free."""
    monkeypatch.setattr(LlamaMLP, "kernel_layer_name", "SwiGLUMLP", raising=False)
    monkeypatch.setattr(LlamaMLP, "kernel_condition", None, raising=False)
    ours = kernelize_adapted(peft_llama(), mode=Mode.TRAINING)
    rows = {row.module.rpartition(".")[2]: row.layer for row in explain(lora_fused, ours)}
    assert rows["gate_proj"] == "LoraGatedMLP" and rows["q_proj"] == "LoraLinear"
    assert (LlamaMLP.kernel_layer_name, LlamaMLP.kernel_condition) == ("SwiGLUMLP", None)


class Linear(nn.Module):
    def forward(self, x, *args, **kwargs):
        raise AssertionError("theirs was called")


def test_what_was_mapped_to_the_names_before_is_not_asked(lora_fused, kernelize_adapted):
    """As another build of this kernel may have left it, for one mode."""
    with use_kernel_mapping({"LoraLinear": {DEVICE: {Mode.TRAINING: Loaded(Linear)}}}):
        ours = kernelize_adapted(heads(), mode=Mode.TRAINING)
    assert inner(ours).q.forward.__func__ is lora_fused.layers.LoraLinear.forward


def test_kernelized_again_and_anew(lora_fused, kernelize_adapted):
    """Beside a registration, and in either order."""
    model, x = heads(), torch.randn(40, 32, dtype=torch.float64)
    ours = copy.deepcopy(model)
    lora_fused.register_peft_layers()
    for mode in (Mode.TRAINING, Mode.INFERENCE):
        kernelize_adapted(ours, mode=mode)
        kernelize_all(ours, mode=mode, device=DEVICE)
        kernelize_adapted(ours, mode=mode)
        assert all(row.fused for row in explain(lora_fused, ours))
        assert_same(step(ours, x), step(model, x))


def test_modes(lora_fused, kernelize_adapted):
    """With torch.compile and without it the forwards are the same."""
    bound = [
        forwards(kernelize_adapted(heads(), mode=mode | more))
        for mode in (Mode.TRAINING, Mode.INFERENCE)
        for more in (Mode(0), Mode.TORCH_COMPILE)
    ]
    assert bound[0] and all(each == bound[0] for each in bound)
    with pytest.raises(ValueError, match="Mode"):
        kernelize_adapted(heads(), mode=Mode.FALLBACK)


def test_one_module_and_none(lora_fused, kernelize_adapted):
    layer = inner(heads()).q
    kernelize_adapted(layer, mode=Mode.TRAINING)
    assert explain(lora_fused, layer)[0].fused
    plain = nn.Sequential(nn.Linear(4, 4))
    assert kernelize_adapted(plain, mode=Mode.TRAINING) is plain and forwards(plain) == {}


def test_a_model_with_a_device_map_keeps_its_hooks(lora_fused, kernelize_adapted):
    base = tiny_llama()
    accelerate.hooks.attach_execution_device_hook(base.to(DEVICE), DEVICE)
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False)
    )
    hooked = [m for m in model.modules() if isinstance(m, LlamaRMSNorm)]
    theirs, before = passed(model, tokens()), [vars(m)["forward"] for m in hooked]
    kernelize_adapted(model, mode=Mode.TRAINING)
    for _ in range(2):
        torch.testing.assert_close(passed(model, tokens()), theirs, rtol=1e-4, atol=1e-6)
    assert len(hooked) == 5 and [vars(m)["forward"] for m in hooked] == before
    assert all(row.fused for row in explain(lora_fused, model))


def test_weights_that_are_all_on_meta(lora_fused, kernelize_adapted):
    """To be loaded later: what is bound asks at each call."""
    model = heads()
    ours = copy.deepcopy(model).to("meta")
    kernelize_adapted(ours, mode=Mode.TRAINING)
    ours.to_empty(device=DEVICE)
    ours.load_state_dict(model.state_dict())
    x = torch.randn(40, 32, dtype=torch.float64)
    assert_same(step(ours, x), step(model, x))
    assert all(row.fused for row in explain(lora_fused, ours))


def test_versions_come_first(lora_fused, kernelize_adapted, monkeypatch):
    import peft

    model = heads()
    monkeypatch.setattr(peft, "__version__", "0.17.0")
    with pytest.raises(ImportError, match="0.17.0 is installed"):
        kernelize_adapted(model, mode=Mode.TRAINING)
    assert forwards(model) == {}
