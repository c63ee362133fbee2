#!/usr/bin/env python3
"""transformers' Trainer with the callback, in one process or several:

    python examples/train.py
    torchrun --nproc-per-node 2 examples/train.py                                       DistributedDataParallel
    accelerate launch --config_file examples/fsdp2.yaml examples/train.py               FSDP2
    torchrun --nproc-per-node 2 examples/train.py --deepspeed examples/zero3.json       DeepSpeed ZeRO-3
    python examples/train.py --compile                                                  torch.compile
    python examples/train.py --liger                                                    beside Liger's kernels, on a GPU

Prints the losses and what ran. Exits with 1 if not every call was fused.
"""

from __future__ import annotations

import argparse
import logging
import sys

import torch
from peft import LoraConfig, get_peft_model
from shared import load_kernel, small_data, small_model
from transformers import Trainer, TrainingArguments


def gather_whole_layers(model) -> None:
    """DeepSpeed's ZeRO-3 fetches each weight for its own module's call, and what is fused calls no module; so a decoder
    layer's weights are fetched together. The input's gradient is what tells it to, in backward. ZeRO-2 needs neither.
    """
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, ["LlamaDecoderLayer"])
    model.enable_input_require_grads()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--deepspeed", metavar="FILE", help="configuration: examples/zero2.json, zero3.json")
    parser.add_argument("--liger", action="store_true", help="Liger's norm, rotary embedding and loss; needs a GPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile, of the whole model")
    parser.add_argument("--cpu", action="store_true", help="where there is a GPU as well")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("lora_fused").setLevel(logging.INFO)

    on_cpu = args.cpu or not torch.accelerator.is_available()  # several processes on CPUs train together if it is said

    lora_fused = load_kernel()
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        output_dir=".demo/train", max_steps=args.steps, per_device_train_batch_size=12, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=on_cpu, disable_tqdm=True,
        deepspeed=args.deepspeed, use_liger_kernel=args.liger, torch_compile=args.compile,
        liger_kernel_config=dict(swiglu=False),  # its MLP would hide that there is a gated one
    )  # fmt: skip
    model = get_peft_model(small_model(), lora)
    if args.deepspeed:
        gather_whole_layers(model)
    callbacks = [lora_fused.LoraFusedCallback()]
    trainer = Trainer(model, arguments, train_dataset=small_data(), callbacks=callbacks)
    with lora_fused.record() as calls:
        trainer.train()
    if trainer.is_world_process_zero():
        print("losses", [round(row["loss"], 3) for row in trainer.state.log_history if "loss" in row])
        print(calls)
    if args.compile:  # a graph makes no calls that could be counted
        found = lora_fused.explain(trainer.model)
        print(found)
        return 0 if all(row.fused for row in found) and not calls.own else 1
    return 0 if calls.fused and not calls.own else 1


if __name__ == "__main__":
    sys.exit(main())
