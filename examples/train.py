#!/usr/bin/env python3
"""transformers' Trainer with the callback, in one process or several:

    python examples/train.py
    torchrun --nproc-per-node 2 examples/train.py                                     DistributedDataParallel
    accelerate launch --config_file examples/fsdp2.yaml examples/train.py             FSDP2

Prints the losses and what ran. Exits with 1 if not every call was fused.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from small_model import small_data, small_model
from transformers import Trainer, TrainingArguments


def load_kernel():
    """The one in LOCAL_KERNELS or of the Hub, or this checkout's."""
    from kernels import get_kernel, get_local_kernel

    if "LOCAL_KERNELS" in os.environ or "KERNEL" in os.environ:
        return get_kernel(os.environ.get("KERNEL", "org/lora-fused"), version=1)
    return get_local_kernel(Path(__file__).resolve().parent.parent / "build")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--cpu", action="store_true", help="where there is a GPU as well")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("lora_fused").setLevel(logging.INFO)

    lora_fused = load_kernel()
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        output_dir=".demo/train", max_steps=args.steps, per_device_train_batch_size=12, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=args.cpu, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        get_peft_model(small_model(), lora),
        arguments,
        train_dataset=small_data(),
        callbacks=[lora_fused.LoraFusedCallback()],
    )
    with lora_fused.record() as calls:
        trainer.train()
    if trainer.is_world_process_zero():
        print("losses", [round(row["loss"], 3) for row in trainer.state.log_history if "loss" in row])
        print(calls)
    return 0 if calls.fused and not calls.own else 1


if __name__ == "__main__":
    sys.exit(main())
