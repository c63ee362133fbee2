#!/usr/bin/env python3
"""Two adapters of one base, trained in turns, and served from one slot by PEFT's hot swap:

    python examples/adapters.py

What is fused reads its state at every call, so a switch and a swap are seen at once. Prints the losses and what ran.
Exits with 1 if not every call was fused, or an adapter is another one after it was swapped in.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from shared import batches, load_kernel, small_model


def config(alpha: int) -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    ids = ids.to(model.device)
    return model(input_ids=ids, labels=ids).loss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="of each adapter")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lora_fused = load_kernel()
    model = get_peft_model(small_model(), config(16), adapter_name="first").to(device)
    model.add_adapter("second", config(32))
    lora_fused.apply(model)

    texts = batches(2 * args.steps)
    losses = {}
    with lora_fused.record() as calls, tempfile.TemporaryDirectory() as folder:
        for place, name in enumerate(("first", "second")):
            model.set_adapter(name)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            for ids in texts[place::2]:
                loss_of(model, ids).backward()
                optimizer.step()
                optimizer.zero_grad()
            losses[name] = loss_of(model, texts[0]).item()
        model.save_pretrained(folder)

        served = PeftModel.from_pretrained(small_model(), Path(folder, "first"), adapter_name="slot").to(device)
        lora_fused.apply(served)
        swapped = {"first": loss_of(served, texts[0]).item()}
        hotswap_adapter(served, str(Path(folder, "second")), adapter_name="slot", torch_device=device)
        swapped["second"] = loss_of(served, texts[0]).item()
    for name, loss in losses.items():
        print(f"{name}: loss {loss:.4f}, from the slot {swapped[name]:.4f}")
    print(calls)
    same = all(abs(swapped[name] - loss) <= 1e-4 for name, loss in losses.items())
    return 0 if calls.fused and not calls.own and same else 1


if __name__ == "__main__":
    sys.exit(main())
