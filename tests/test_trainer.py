"""transformers' Trainer: a kernelized model has the losses and ends with the adapters of PEFT's own, and takes up again
where it was saved."""

import pytest
import torch
from helpers.cases import LINEARS, OwnForwards, peft_llama
from helpers.kernelizing import explain, kernelize_in_place, ours_in
from helpers.trainers import STEPS, assert_same, losses_and_adapter, trainer_of
from peft import LoraConfig, get_peft_model


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


@pytest.mark.parametrize("restored", (False, True), ids=("left", "restored"))
def test_a_second_adapter_on_the_merged_base(lora_fused, tmp_path, restored):
    """Both trainings are PEFT's, recorded as fused, whether our forwards were left on the merged MLPs or not."""

    def both(fuse, restore, trained):
        model = fuse(peft_llama())
        first = trained(model, tmp_path)
        merged = model.merge_and_unload()
        if restored:
            restore(merged)
        torch.manual_seed(5)
        config = LoraConfig(r=4, target_modules=LINEARS, task_type="CAUSAL_LM", init_lora_weights=False)
        again = fuse(get_peft_model(merged, config))
        return first, trained(again, tmp_path), again

    def recorded(*args):
        with lora_fused.record() as calls:
            found = trained_fused(*args)
        assert (calls.fused, calls.own) == (10 * STEPS, 0)
        return found

    theirs = both(lambda model: model, lambda model: model, trained)
    ours = both(lora_fused.apply, lora_fused.restore, recorded)
    for mine, right in zip(ours[:2], theirs[:2], strict=True):
        assert_same(mine, right, 1e-5)
    assert theirs[1][0][0] != theirs[0][0][0]
    merged = ours[2].merge_and_unload()
    with lora_fused.record() as calls:
        trained(lora_fused.restore(merged).requires_grad_(True), tmp_path, max_steps=1)
    assert ours_in(lora_fused, merged) == [] and calls.fused == calls.own == 0
