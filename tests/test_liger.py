"""Beside Liger's kernels: in either order, but for its MLP. Liger replaces names of transformers' module for the whole
process, which are put back here; on a GPU its kernels run."""

import copy

import pytest
import torch
from helpers.cases import DEVICE, peft_llama
from helpers.kernelizing import explain
from helpers.llamas import keep_names, passed, tokens

monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
pytestmark = pytest.mark.usefixtures("on_device")


@pytest.fixture
def liger(monkeypatch):
    """Patches the base of a PEFT model, as Trainer's `use_liger_kernel` does."""
    keep_names(monkeypatch)

    def patch(model, **options):
        monkey_patch.apply_liger_kernel_to_llama(model=model.get_base_model(), **options)
        return model

    return patch


def norms(model):
    return {type(module).forward if "forward" not in vars(module) else vars(module)["forward"].__func__
            for name, module in model.named_modules() if name.endswith("norm")}  # fmt: skip


@pytest.mark.parametrize("first", (True, False), ids=("Liger first", "ours first"))
def test_its_norms_and_loss(lora_fused, liger, first):
    model = peft_llama()
    ours = copy.deepcopy(model)
    steps = [lambda: liger(ours, swiglu=False), lambda: lora_fused.apply(ours)]
    for step in steps if first else reversed(steps):
        step()
    rows = explain(lora_fused, ours)
    assert all(row.fused for row in rows) and {row.layer for row in rows} == {"LoraLinear", "LoraGatedMLP"}
    assert norms(ours) == {monkey_patch.LigerRMSNorm.forward}
    if DEVICE == "cuda":
        torch.testing.assert_close(passed(ours, tokens()), passed(model, tokens()), rtol=1e-3, atol=1e-4)
        assert all(row.last == "fused" for row in explain(lora_fused, ours))


@pytest.mark.parametrize("first", (True, False), ids=("Liger first", "ours first"))
def test_its_mlp_hides_that_it_is_gated(lora_fused, liger, first):
    """Its linears are fused one by one, and `explain` names who set the MLP's forward."""
    model = peft_llama()
    ours = copy.deepcopy(model)
    steps = [lambda: liger(ours, swiglu=True), lambda: lora_fused.apply(ours)]
    for step in steps if first else reversed(steps):
        step()
    rows = explain(lora_fused, ours)
    assert all(row.fused for row in rows) and {row.layer for row in rows} == {"LoraLinear"}
    assert "liger_kernel.transformers.swiglu.LigerSwiGLUMLP" in str(rows)
    if DEVICE == "cuda":
        torch.testing.assert_close(passed(ours, tokens()), passed(model, tokens()), rtol=1e-3, atol=1e-4)


def test_it_is_gone_for_the_next_test():
    from transformers.models.llama import modeling_llama as llama

    replaced = ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb")
    assert not any("liger" in getattr(llama, name).__module__ for name in replaced)
