"""`LoraFusedCallback` in transformers' Trainer: applies when training begins, reports, and goes with merging and
restoring."""

import copy
import logging
import types

import pytest
import torch
from helpers.cases import DEVICE, LINEARS, OwnForwards, peft_llama, tiny_llama
from helpers.kernelizing import explain, ours_in
from helpers.llamas import same_bits
from helpers.trainers import STEPS, assert_same, losses_and_adapter as trained, rows, trainer_of
from kernels import Mode
from peft import LoraConfig
from transformers import TrainerCallback, TrainerState


def reports(trainer):
    return [row.get("lora_fused") for row in trainer.state.log_history]


@pytest.mark.parametrize("options", ({}, dict(gradient_checkpointing=True)), ids=("plain", "checkpointing"))
def test_trained_as_peft(lora_fused, tmp_path, options):
    theirs = trained(trainer_of(peft_llama(), tmp_path, **options))
    trainer = trainer_of(peft_llama(), tmp_path, lora_fused.LoraFusedCallback(), **options)
    with OwnForwards() as own, lora_fused.record() as calls:
        ours = trained(trainer)
    assert_same(ours, theirs, 1e-5)
    assert not own and calls.own == 0 and calls.fused == STEPS * 10 * (2 if options else 1)
    assert reports(trainer)[:STEPS] == [1.0] + [None] * (STEPS - 1)
    assert all(row.fused and row.last == "fused" for row in explain(lora_fused, trainer.model))


def test_applied_when_training_begins_and_no_sooner(lora_fused, tmp_path, caplog):
    trainer = trainer_of(peft_llama(), tmp_path, lora_fused.LoraFusedCallback())
    assert ours_in(lora_fused, trainer.model) == []
    with caplog.at_level(logging.INFO, logger="lora_fused"):
        trainer.train()
    assert len(ours_in(lora_fused, trainer.model)) == 16
    (record,) = [record for record in caplog.records if record.name == "lora_fused"]
    assert record.getMessage().startswith("14 of 14 LoRA modules fused")


def test_the_class_is_taken_as_well(lora_fused, tmp_path):
    """As transformers allows, and takes it out again by its class."""
    trainer = trainer_of(peft_llama(), tmp_path, lora_fused.LoraFusedCallback)
    (callback,) = [
        each for each in trainer.callback_handler.callbacks if isinstance(each, lora_fused.LoraFusedCallback)
    ]
    assert isinstance(callback, TrainerCallback)
    assert trainer.pop_callback(lora_fused.LoraFusedCallback) is callback
    trainer.train()
    assert ours_in(lora_fused, trainer.model) == []


def test_what_is_not_fused_is_in_the_report(lora_fused, tmp_path):
    model = peft_llama()
    hooked = model.base_model.model.model.layers[0].self_attn
    for part in (hooked.q_proj, hooked.o_proj):
        part.lora_A.default.register_forward_hook(lambda *_: None)
    trainer = trainer_of(model, tmp_path, lora_fused.LoraFusedCallback())
    trainer.train()
    assert reports(trainer)[0] == pytest.approx(12 / 14)


def test_unloaded_before_the_first_log(lora_fused, tmp_path):
    """By another callback: nothing is left to report of, and training goes on."""

    class Unload(TrainerCallback):
        def on_step_end(self, *args, model, **kwargs):
            model.unload()

    trainer = trainer_of(peft_llama(), tmp_path, lora_fused.LoraFusedCallback(), max_steps=1)
    trainer.add_callback(Unload())
    trainer.train()
    assert len(explain(lora_fused, trainer.model)) == 0 and reports(trainer)[0] == 0.0


def test_what_others_log_sees_the_report(lora_fused, tmp_path):
    seen = []

    class Sees(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs.get("lora_fused"))

    trainer_of(peft_llama(), tmp_path, lora_fused.LoraFusedCallback(), Sees()).train()
    assert seen[:2] == [1.0, None]


def test_each_training_reports_once(lora_fused, tmp_path):
    trainer = trainer_of(peft_llama(), tmp_path, lora_fused.LoraFusedCallback(), max_steps=2)
    trainer.train()
    lora_fused.restore(trainer.model)
    trainer.train()
    assert len(ours_in(lora_fused, trainer.model)) == 16
    assert [report for report in reports(trainer) if report is not None] == [1.0]  # its history begins anew


def test_a_mode(lora_fused, tmp_path):
    with pytest.raises(TypeError, match="mode: 'training', expected a kernels.Mode"):
        lora_fused.LoraFusedCallback(mode="training")
    trainer = trainer_of(peft_llama(), tmp_path, lora_fused.LoraFusedCallback(mode=Mode.INFERENCE), max_steps=1)
    trainer.train()
    assert reports(trainer)[0] == 1.0


def test_several_gpus_in_one_process(lora_fused, tmp_path, caplog):
    """The trainer copies the model to each, and what is bound to it would run the first one's."""
    callback, model = lora_fused.LoraFusedCallback(), peft_llama()
    with caplog.at_level(logging.WARNING, logger="lora_fused"):
        callback.on_train_begin(types.SimpleNamespace(n_gpu=2), TrainerState(), None, model=model)
    assert ours_in(lora_fused, model) == []
    (record,) = [record for record in caplog.records if record.name == "lora_fused"]
    assert record.levelno == logging.WARNING and "torchrun" in record.getMessage()
    logs = {}
    callback.on_log(None, TrainerState(), None, logs=logs, model=model)
    assert logs == {"lora_fused": 0.0}
    model.get_base_model().is_loaded_in_4bit = True  # which it does not copy
    callback.on_train_begin(types.SimpleNamespace(n_gpu=2), TrainerState(), None, model=model)
    assert len(ours_in(lora_fused, model)) == 16


@pytest.mark.parametrize("quantized", (False, True))
def test_whom_the_trainer_copies(lora_fused, tmp_path, monkeypatch, quantized):
    """Its own choice is the callback's: it is asked of the trainer itself."""
    trainer = trainer_of(peft_llama(), tmp_path)
    trainer.model.get_base_model().is_loaded_in_8bit = quantized
    monkeypatch.setattr(type(trainer.args), "n_gpu", 2)
    copied = isinstance(trainer._wrap_model(trainer.model), torch.nn.DataParallel)
    callback = lora_fused.LoraFusedCallback()
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert copied is not quantized and (ours_in(lora_fused, trainer.model) == []) is copied


def test_a_class_that_derives_from_it(lora_fused, tmp_path):
    class Mine(lora_fused.LoraFusedCallback):
        began = 0

        def on_train_begin(self, *args, **kwargs):
            super().on_train_begin(*args, **kwargs)
            self.began += 1

    callback = Mine()
    assert isinstance(callback, Mine) and isinstance(callback, TrainerCallback)
    trainer = trainer_of(peft_llama(), tmp_path, callback, max_steps=1)
    trainer.train()
    assert callback.began == 1 and reports(trainer)[0] == 1.0


def test_a_model_without_adapters(lora_fused, tmp_path):
    trainer = trainer_of(tiny_llama(), tmp_path, lora_fused.LoraFusedCallback())
    with pytest.raises(ValueError, match="has no PEFT LoRA modules"):
        trainer.train()


@pytest.mark.parametrize("merge", (False, True), ids=("unload", "merge_and_unload"))
def test_unloaded_and_restored(lora_fused, tmp_path, merge):
    trainer = trainer_of(peft_llama(), tmp_path, lora_fused.LoraFusedCallback())
    trainer.train()
    plain = lora_fused.restore(copy.deepcopy(trainer.model))
    ours, plain = (each.merge_and_unload() if merge else each.unload() for each in (trainer.model, plain))
    lora_fused.restore(ours)
    for each in (ours, plain):
        each.requires_grad_(True)
    assert ours_in(lora_fused, ours) == [] and same_bits(ours, plain)


def test_trained_on_after_restoring(lora_fused, tmp_path):
    """A checkpoint of the one is the other's: half of the steps fused, half PEFT's."""
    save = dict(save_strategy="steps", save_steps=STEPS // 2)
    whole = trained(trainer_of(peft_llama(), tmp_path / "whole", **save))
    trainer_of(peft_llama(), tmp_path / "first", lora_fused.LoraFusedCallback(), **save).train()
    second = trainer_of(peft_llama(), tmp_path / "second", **save)
    with OwnForwards() as own:
        found = trained(second, str(tmp_path / "first" / f"checkpoint-{STEPS // 2}"))
    assert sum(own.values()) == 14 * (STEPS - STEPS // 2)
    assert_same(found, whole, 1e-5)


def test_compiled_by_the_trainer(lora_fused, tmp_path):
    """What is fused in the graph counts, and an MLP's projections with it."""
    torch.compiler.reset()
    model = peft_llama(shape=dict(num_hidden_layers=1))
    trainer = trainer_of(
        model, tmp_path, lora_fused.LoraFusedCallback(), max_steps=2, torch_compile=True, torch_compile_backend="eager"
    )
    trainer.train()
    assert reports(trainer)[0] == 1.0
    assert {row.backend for row in explain(lora_fused, model)} == {"native, compiled"}


def test_it_can_be_copied_and_has_every_event(lora_fused):
    callback = lora_fused.LoraFusedCallback()
    assert type(copy.deepcopy(callback)) is type(callback) and isinstance(callback, TrainerCallback)
    assert {name for name in dir(TrainerCallback) if name.startswith("on_")} <= set(dir(callback))


def test_sft_trainer(lora_fused, tmp_path):
    """TRL adapts the model itself."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([dict(input_ids=row["input_ids"].tolist()) for row in rows()])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, report_to=[], save_strategy="no",
        use_cpu=DEVICE == "cpu", max_length=16, bf16=False,
    )  # fmt: skip
    config = LoraConfig(r=4, target_modules=LINEARS, task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = trl.SFTTrainer(
        tiny_llama(), arguments, train_dataset=data, peft_config=config, callbacks=[lora_fused.LoraFusedCallback()],
        processing_class=_tokenizer(),
    )  # fmt: skip
    with OwnForwards() as own, lora_fused.record() as calls:
        trainer.train()
    assert reports(trainer)[0] == 1.0
    assert not own and calls.own == 0 and calls.fused == 2 * 2 * 10  # it checkpoints
    plain = lora_fused.restore(copy.deepcopy(trainer.model)).merge_and_unload()
    merged = trainer.model.merge_and_unload()
    assert len(ours_in(lora_fused, merged)) == 2
    ids = rows()[0]["input_ids"][None].to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(lora_fused.restore(merged)(ids).logits, plain(ids).logits)
    assert ours_in(lora_fused, merged) == []


def test_dpo_trainer(lora_fused, tmp_path):
    """Its reference model is the same one with adapters disabled, which is PEFT's to compute."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, report_to=[], use_cpu=DEVICE == "cpu", bf16=False
    )
    trainer = trl.DPOTrainer(
        tiny_llama(),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([dict(prompt="1 2", chosen=" 3 4", rejected=" 5 6")] * 4),
        processing_class=_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=LINEARS, task_type="CAUSAL_LM"),
        callbacks=[lora_fused.LoraFusedCallback()],
    )
    with lora_fused.record() as calls:
        trainer.train()
    assert reports(trainer)[:2] == [1.0, None]
    assert calls.fused > 0 and all("adapters are disabled" in reason for reason in calls.total if reason != "fused")


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="1", pad_token="2")
