#!/usr/bin/env python3
"""TRL's trainers with the callback; each adapts the model itself:

    python examples/train_trl.py sft
    python examples/train_trl.py dpo
    python examples/train_trl.py grpo

The reference model of DPO and GRPO is the same model with its adapter disabled, which is PEFT's forward. Prints the
losses and what ran. Exits with 1 if any other call was not fused.
"""

from __future__ import annotations

import argparse
import sys

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from shared import load_kernel, small_model, small_text, small_tokenizer

NOT_FUSED = ("adapters are disabled", "evaluation of up to")  # reference passes; on a GPU single tokens of a rollout


def lines() -> list[str]:
    """Of the language reference, long enough to be cut in two."""
    return [line for line in small_text().splitlines() if len(line) > 60][:64]


def lower_case(completions: list[str], **_) -> list[float]:
    """GRPO's reward: the share of lower-case letters."""
    return [sum(letter.islower() for letter in text) / max(len(text), 1) for text in completions]


def sft(options: dict, shared: dict):
    data = Dataset.from_list([dict(text=line) for line in lines()])
    return trl.SFTTrainer(args=trl.SFTConfig(max_length=64, **options), train_dataset=data, **shared)


def dpo(options: dict, shared: dict):
    """Chosen is how the line goes on, rejected the same backwards."""
    pairs = [dict(prompt=line[:30], chosen=line[30:], rejected=line[:29:-1]) for line in lines()]
    return trl.DPOTrainer(args=trl.DPOConfig(**options), train_dataset=Dataset.from_list(pairs), **shared)


def grpo(options: dict, shared: dict):
    arguments = trl.GRPOConfig(num_generations=4, max_completion_length=8, beta=0.1, **options)
    data = Dataset.from_list([dict(prompt=line[:30]) for line in lines()])
    return trl.GRPOTrainer(args=arguments, train_dataset=data, reward_funcs=lower_case, **shared)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trainer", choices=("sft", "dpo", "grpo"))
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    lora_fused = load_kernel()
    options = dict(
        output_dir=f".demo/{args.trainer}", max_steps=args.steps, per_device_train_batch_size=4, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, bf16=torch.cuda.is_available(),
    )  # fmt: skip
    shared = dict(
        model=small_model(),
        processing_class=small_tokenizer(),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[lora_fused.LoraFusedCallback()],
    )
    trainer = globals()[args.trainer](options, shared)
    with lora_fused.record() as calls:
        trainer.train()
    print("losses", [round(row["loss"], 3) for row in trainer.state.log_history if "loss" in row])
    print(calls)
    expected = ("fused", *NOT_FUSED)
    unexpected = [reason for reason in calls.total if not any(part in reason for part in expected)]
    return 0 if calls.fused and not unexpected else 1


if __name__ == "__main__":
    sys.exit(main())
