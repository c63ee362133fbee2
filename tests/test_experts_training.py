"""Whole models with adapted experts, kernelized, against PEFT: training, checkpoints, what is saved and merged,
generation."""

import copy

import pytest
import torch
from helpers.experts import counted, error, explain, is_experts, kernelized, model_of, names_of
from helpers.llamas import losses_of
from torch import nn

pytestmark = pytest.mark.usefixtures("on_device")

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe", "llama4")


def whole(name, targets, dtype=torch.float64):
    from peft import LoraConfig, get_peft_model

    model = model_of(name, dtype)
    if targets == "parameters":
        (names,) = {tuple(names_of(m)) for m in model.modules() if is_experts(m)} or {("gate_up_proj", "down_proj")}
        options = dict(target_modules=["q_proj"], target_parameters=[f"experts.{each}" for each in names])
        if name == "deepseek_v3":
            options["target_modules"] = ["o_proj"]
    else:
        options = dict(target_modules=targets)
        if name == "llama4":
            options["exclude_modules"] = ["router"]  # a linear by its class, that gives a pair
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options), autocast_adapter_dtype=False
    )
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


@pytest.mark.parametrize("targets,steps", (("parameters", 20), ("all-linear", 4)))
@pytest.mark.parametrize("name", FAMILIES)
def test_training_with_every_module_accounted_for(lora_fused, name, targets, steps):
    theirs = whole(name, targets)
    ours = kernelized(lora_fused, theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with counted(lora_fused) as calls:
        losses = losses_of(ours, steps)
    torch.testing.assert_close(losses, losses_of(theirs, steps), rtol=1e-8, atol=0)
    assert losses[-1] < losses[0]
    rows = explain(lora_fused, ours)
    wrapped = [row for row in rows if row.layer in ("LoraExperts", "ParamWrapper")]
    without = (name, targets) in (("gpt_oss", "all-linear"), ("llama4", "all-linear"))  # no parameters, PEFT says
    assert (len(wrapped) >= 4) != without and len(rows) > len(wrapped)
    for row in rows:
        assert row.fused or row.reason, str(row)
    mixtures = [row for row in wrapped if "experts" in row.module]
    assert (not mixtures) == without and all(row.fused != (name == "llama4") for row in mixtures)
    assert all("no weight of experts" in row.reason for row in wrapped if "experts" not in row.module)
    assert len(calls) == (0 if name == "llama4" else steps * len(mixtures) // 2)


@pytest.mark.parametrize("targets", (["w1", "w2", "w3"],))
def test_names_of_older_checkpoints(lora_fused, targets):
    """PEFT makes parameters of them."""
    theirs = whole("mixtral", targets)
    ours = kernelized(lora_fused, theirs)
    with counted(lora_fused) as calls:
        losses = losses_of(ours, 2)
    assert len(calls) == 4
    torch.testing.assert_close(losses, losses_of(theirs, 2), rtol=1e-10, atol=0)


def test_saved_and_merged_as_by_peft(lora_fused, tmp_path):
    from peft import PeftModel

    theirs = whole("gpt_oss", "parameters")
    ours = kernelized(lora_fused, theirs)
    losses_of(ours, 2), losses_of(theirs, 2)
    tokens = torch.randint(0, 64, (2, 9))
    ours.eval(), theirs.eval()
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert error(ours(tokens).logits, expected) < 1e-8
        ours.save_pretrained(tmp_path)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(copy.deepcopy(ours).unload(), tmp_path, autocast_adapter_dtype=False)
        assert error(loaded(tokens).logits, expected) < 1e-8
        merged = ours.merge_and_unload()
        assert error(merged(tokens).logits, expected) < 1e-8
        assert not any("lora" in name for name, _ in merged.named_modules())


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("name", ("qwen3_moe", "gpt_oss"))
def test_checkpointing(lora_fused, name, reentrant):
    ours = kernelized(lora_fused, whole(name, "parameters"))
    tokens = torch.randint(0, 64, (2, 9))

    def grads():
        ours.zero_grad()
        ours(input_ids=tokens, labels=tokens).loss.backward()
        return {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}

    plain = grads()
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with counted(lora_fused) as calls:
        again = grads()
    assert len(calls) == 4
    assert len(plain) > 8 and all(torch.equal(plain[name], again[name]) for name in plain)


def test_generates_as_peft(lora_fused):
    theirs = whole("qwen3_moe", "parameters").eval()
    ours = kernelized(lora_fused, theirs)
    prompt = torch.randint(0, 64, (2, 5))
    with counted(lora_fused) as calls:
        seen = ours.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(seen, theirs.generate(input_ids=prompt, max_new_tokens=6, do_sample=False))
    assert len(calls) == 12
