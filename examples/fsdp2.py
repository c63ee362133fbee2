#!/usr/bin/env python3
"""FSDP2 by torch's `fully_shard`, one process a GPU, or two on a CPU:

    torchrun --nproc-per-node 2 examples/fsdp2.py
    torchrun --nproc-per-node 2 examples/fsdp2.py --qlora

--qlora: the base in NF4, whose packed weights are sharded as any other, kept as bfloat16, since FSDP2 of torch 2.11
shards no integers. Prints the losses and what ran. Exits with 1 if
not every call was fused.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from shared import batches, load_kernel, small_model
from torch.distributed.fsdp import fully_shard


def four_bit_model():
    """The small model in NF4, loaded as a checkpoint is."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        small_model().save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--qlora", action="store_true", help="the base in four bits")
    parser.add_argument("--cpu", action="store_true", help="where there is a GPU as well")
    args = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu" if args.cpu or not torch.cuda.is_available() else f"cuda:{os.environ['LOCAL_RANK']}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    base = four_bit_model() if args.qlora else small_model()  # each process saves its own while there is no group
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")

    lora_fused = load_kernel()
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).to(device)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    lora_fused.apply(model)  # before it is sharded is as well

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with lora_fused.record() as calls:
        for step, ids in enumerate(batches(args.steps, rank=rank, world=world)):
            ids = ids.to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.qlora):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0:
                print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    if rank == 0:
        print(calls)
    dist.destroy_process_group()
    return 0 if calls.fused and not calls.own else 1


if __name__ == "__main__":
    sys.exit(main())
