"""transformers' Trainer: a kernelized model has the losses and ends with the adapters of PEFT's own, and takes up again
where it was saved."""

import pytest
import torch
from helpers.cases import OwnForwards, peft_llama
from helpers.kernelizing import explain, kernelize_in_place
from helpers.trainers import STEPS, assert_same, losses_and_adapter, trainer_of


def trained(model, folder, resume=None, **options):
    """Each step's loss, and the trained parameters at the end."""
    return losses_and_adapter(trainer_of(model, folder, **options), resume)


def trained_fused(model, folder, *args, **options):
    """`trained`, of a kernelized model, in which PEFT's own forward has no part."""
    with OwnForwards() as calls:
        found = trained(model, folder, *args, **options)
    assert not calls
    return found


OPTIONS = {
    "plain": {},
    "accumulation": dict(gradient_accumulation_steps=2),
    "checkpointing": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    "reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
}


@pytest.mark.parametrize("dora", (False, True), ids=("LoRA", "DoRA"))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_losses_and_adapters_are_those_of_peft(lora_fused, tmp_path, dora, options):
    theirs = trained(peft_llama(use_dora=dora), tmp_path, **options)
    model = kernelize_in_place(lora_fused, peft_llama(use_dora=dora))
    assert all(row.fused for row in explain(lora_fused, model))
    before = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    ours = trained_fused(model, tmp_path, **options)
    assert not any(torch.equal(value, before[name]) for name, value in ours[1].items())
    assert_same(ours, theirs, 1e-5)


@pytest.mark.parametrize("dora", (False, True), ids=("LoRA", "DoRA"))
def test_mixed_precision_is_as_near_to_float32_as_peft(lora_fused, tmp_path, dora):
    _, truth = trained(peft_llama(use_dora=dora), tmp_path)
    _, theirs = trained(peft_llama(use_dora=dora), tmp_path, bf16=True)
    model = kernelize_in_place(lora_fused, peft_llama(use_dora=dora))
    _, ours = trained_fused(model, tmp_path, bf16=True)

    def distance(found):
        return torch.stack([(found[name] - value).norm() for name, value in truth.items()]).norm()

    assert 0.0 < distance(ours) <= 1.5 * distance(theirs)


def test_training_is_taken_up_again(lora_fused, tmp_path):
    save = dict(save_strategy="steps", save_steps=STEPS // 2)
    whole = trained(kernelize_in_place(lora_fused, peft_llama()), tmp_path, **save)
    again = kernelize_in_place(lora_fused, peft_llama())
    assert_same(trained_fused(again, tmp_path, tmp_path / f"checkpoint-{STEPS // 2}", **save), whole, 1e-6)
