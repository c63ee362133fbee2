"""transformers' own kernels and ours in one model: `from_pretrained(use_kernels=True)`, in either order, and what
`train()` and `eval()` do afterwards, at which transformers kernelizes again.

No hub is reached: what transformers maps to CUDA alone is not asked for on a CPU, and the norm that is mapped to the
CPU here stands for theirs.
"""

import copy
import types

import pytest
import torch
from helpers.cases import LINEARS, peft_llama, tiny_llama
from helpers.kernelizing import Loaded, explain
from helpers.llamas import passed, tokens
from kernels import Mode, kernelize, register_kernel_mapping, use_kernel_mapping
from kernels.layer.globals import _KERNEL_MAPPING
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.utils.import_utils import is_kernels_available

pytestmark = [
    pytest.mark.skipif(not is_kernels_available(), reason="transformers does not accept these kernels"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="transformers would ask the Hub for its CUDA kernels"),
]


MARKED = (BaseTuner, PreTrainedModel, lora.Linear, LlamaMLP)  # by what registers our layers


class TheirRMSNorm(nn.Module):
    """A hundredth more than the model's own, so that it shows."""

    def forward(self, hidden_states):
        return 1.01 * type(self).forward(self, hidden_states)


@pytest.fixture(autouse=True)
def theirs(monkeypatch):
    """Mapped for the CPU beside what transformers maps, in a process that has registered nothing of ours."""
    for cls in MARKED:
        for name in ("kernel_layer_name", "kernel_condition"):
            monkeypatch.delattr(cls, name, raising=False)
    token = _KERNEL_MAPPING.set({})
    register_kernel_mapping({"RMSNorm": {"cpu": Loaded(TheirRMSNorm)}})
    yield
    _KERNEL_MAPPING.reset(token)


def adapted(base):
    model = get_peft_model(base, LoraConfig(r=4, target_modules=LINEARS, task_type="CAUSAL_LM"))
    model.load_state_dict(peft_llama().state_dict())  # B is not zero
    return model


@pytest.fixture
def with_theirs(tmp_path):
    """A PEFT model whose base was loaded with transformers' kernels."""
    tiny_llama().save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path, use_kernels=True)
    assert base.use_kernels and norms(base) == {TheirRMSNorm.forward}
    return adapted(base)


def norms(model):
    return {vars(m).get("forward").__func__ for m in model.modules() if isinstance(m, LlamaRMSNorm)}


def all_fused(lora_fused, model):
    rows = explain(lora_fused, model)
    return (
        len(rows) == 14
        and all(row.fused for row in rows)
        and {row.layer for row in rows} == {"LoraLinear", "LoraGatedMLP"}
    )


def assert_both(lora_fused, ours, peft):
    """Theirs and ours run, through changes of the mode, and results are PEFT's with their norm."""
    for training in (True, False, True):
        for each in (ours, peft):
            each.train(training)
        assert norms(ours) == {TheirRMSNorm.forward} and all_fused(lora_fused, ours)
        torch.testing.assert_close(passed(ours, tokens()), passed(peft, tokens()), rtol=1e-5, atol=1e-6)


def register(lora_fused, model):
    lora_fused.register_peft_layers()
    kernelize(model, mode=Mode.TRAINING)


def use(lora_fused, model):
    with lora_fused.use_peft_layers():
        kernelize(model, mode=Mode.TRAINING)


@pytest.mark.parametrize("kernelized", (register, use))
def test_theirs_first(lora_fused, with_theirs, kernelized):
    peft = copy.deepcopy(with_theirs)
    kernelized(lora_fused, with_theirs)
    assert_both(lora_fused, with_theirs, peft)


@pytest.mark.parametrize("kernelized", (register, use))
def test_ours_first(lora_fused, kernelized):
    peft, ours = adapted(tiny_llama()), adapted(tiny_llama())
    kernelized(lora_fused, ours)
    for each in (peft, ours):
        each.get_base_model().set_use_kernels(True)
    assert_both(lora_fused, ours, peft)


@pytest.mark.parametrize("first", (True, False), ids=("theirs first", "ours first"))
def test_our_modules_alone(lora_fused, kernelize_adapted, first):
    peft, ours = adapted(tiny_llama()), adapted(tiny_llama())
    for each in (peft, ours) if first else (peft,):
        each.get_base_model().set_use_kernels(True)
    kernelize_adapted(ours, mode=Mode.TRAINING)
    if not first:
        ours.get_base_model().set_use_kernels(True)
    assert_both(lora_fused, ours, peft)


def test_a_mapping_of_theirs_that_leaves_ours_out(lora_fused, kernelize_adapted):
    """As `KernelConfig(use_local_kernel=True)` gives the model: at train() and eval() nothing else is mapped, so what
    is registered goes back to PEFT's forward, which `explain` says; what was kernelized in a scope or alone stays."""
    config = types.SimpleNamespace(kernel_mapping={"RMSNorm": {"cpu": Loaded(TheirRMSNorm)}}, use_local_kernel=True)
    peft, alone, scoped, registered = (adapted(tiny_llama()) for _ in range(4))
    for each in (peft, alone, scoped, registered):
        each.get_base_model().kernel_config = config
        each.get_base_model().set_use_kernels(True)
    use(lora_fused, scoped)
    assert_both(lora_fused, scoped, peft)
    kernelize_adapted(alone, mode=Mode.TRAINING)
    assert_both(lora_fused, alone, peft)
    register(lora_fused, registered)
    assert all_fused(lora_fused, registered)
    for each in (registered.eval().train(), peft.eval().train()):
        assert norms(each) == {TheirRMSNorm.forward}
    reasons = {row.reason for row in explain(lora_fused, registered)}
    assert len(reasons) == 1 and "its class's own forward" in reasons.pop()
    assert all(map(torch.equal, passed(registered, tokens()), passed(peft, tokens())))


def test_without_their_norm(lora_fused, tmp_path):
    """On this device transformers maps nothing: its layers keep their own forward, and ours are fused."""
    tiny_llama().save_pretrained(tmp_path)
    with use_kernel_mapping({}, inherit_mapping=False):
        base = LlamaForCausalLM.from_pretrained(tmp_path, use_kernels=True)
        assert norms(base) == {LlamaRMSNorm.forward}
        ours, peft = adapted(base), adapted(tiny_llama())
        register(lora_fused, ours)
        for training in (True, False, True):
            assert all_fused(lora_fused, ours.train(training))
            torch.testing.assert_close(passed(ours, tokens()), passed(peft, tokens()), rtol=1e-5, atol=1e-6)
