"""transformers' Trainer on a small model: its data, its losses, and what it ends with."""

import torch
from transformers import Trainer, TrainingArguments

from helpers.cases import DEVICE

STEPS = 6


def rows():
    """Token ids, each row counting on from where it starts."""
    ids = [torch.arange(start, start + 12) % 64 for start in range(0, 64, 3)]
    return [dict(input_ids=row, labels=row) for row in ids]


def trainer_of(model, folder, *callbacks, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        optim="sgd",  # Adam makes much of the smallest difference
        learning_rate=0.1,
        report_to=[],
        use_cpu=DEVICE == "cpu",
        **{"max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, **options},
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else it takes nn.DataParallel
    return Trainer(model, arguments, train_dataset=rows(), callbacks=list(callbacks))


def losses_and_adapter(trainer, resume=None):
    """Each step's loss, and the trained parameters at the end."""
    trainer.train(resume_from_checkpoint=resume)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, {name: p.detach().cpu() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(ours, theirs, rtol):
    assert len(ours[0]) == len(theirs[0]) == STEPS
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=0.0)
    assert ours[1].keys() == theirs[1].keys()
    for name, value in ours[1].items():
        assert (value - theirs[1][name]).norm() <= rtol * theirs[1][name].norm(), name
