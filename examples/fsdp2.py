#!/usr/bin/env python3
"""FSDP2 by torch's `fully_shard`, one process a GPU, or two on a CPU:

    torchrun --nproc-per-node 2 examples/fsdp2.py

Prints the losses and what ran. Exits with 1 if not every call was fused.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from small_model import small_data, small_model
from torch.distributed.fsdp import fully_shard
from train import load_kernel


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--cpu", action="store_true", help="where there is a GPU as well")
    args = parser.parse_args()
    rank = int(os.environ["RANK"])
    device = torch.device("cpu" if args.cpu or not torch.cuda.is_available() else f"cuda:{os.environ['LOCAL_RANK']}")
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")

    lora_fused = load_kernel()
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(small_model(), lora).to(device)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    lora_fused.apply(model)  # before it is sharded is as well

    data = small_data()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with lora_fused.record() as calls:
        for step in range(args.steps):
            rows = [data[(12 * (2 * step + rank) + i) % len(data)]["input_ids"] for i in range(12)]
            ids = torch.stack(rows).to(device)
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
