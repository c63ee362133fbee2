"""What of a first step bfloat16 keeps: a Llama's loss before and after one step of AdamW from B = 0, in float32, with
PEFT in bfloat16 and with lora-fused in bfloat16, at the same adapter.

    python benchmarks/first_step.py           8B's shape, 8192 tokens, a GPU of 80 GB or more
    python benchmarks/first_step.py --tiny    four small layers on a CPU

The first updates are as large as the learning rate, and the adapter's part in an output then smaller than half a unit
in the last place of the base output in bfloat16. What adds the two after the base product is rounded loses most of it;
what adds them before rounding, in one accumulator, keeps it on average.
"""

from __future__ import annotations

import argparse

import compare_training
import kernels
import torch
from reporting import ROOT


def built(case: dict, options: argparse.Namespace) -> torch.nn.Module:
    """PEFT's model with B = 0, as it is created."""
    model = compare_training.built(case, "PEFT", options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    return model


def loss_of(model: torch.nn.Module, ids: torch.Tensor, autocast: bool) -> torch.Tensor:
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=autocast):
        return model(input_ids=ids, labels=ids).loss


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="32, or 4 with --tiny")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU")
    options = parser.parse_args()
    options.fsdp, options.device = False, "cpu" if options.tiny else "cuda"
    seq = 512 if options.tiny else 8192
    case = dict(layers=options.layers or (4 if options.tiny else 32), base="bf16", seq=seq, world=1)
    ids = compare_training.rows_of(case, 1, 0)[0].to(options.device)
    lora_fused = kernels.get_local_kernel(ROOT / "build")

    exact = built(case, options).float()
    before = loss_of(exact, ids, autocast=False)
    before.backward()
    adapter = trained(exact)
    torch.optim.AdamW(adapter.values(), lr=compare_training.LEARNING_RATE).step()
    falls = {"PEFT, float32": (before.item(), exact)}
    for way in ("PEFT, bfloat16", "lora-fused, bfloat16"):
        model = built(case, options)
        if way.startswith("lora-fused"):
            lora_fused.apply(model)
        with torch.no_grad():
            before = loss_of(model, ids, autocast=True).item()
            for name, parameter in trained(model).items():
                parameter.copy_(adapter[name])
        falls[way] = before, model
    for way, (before, model) in falls.items():
        with torch.no_grad():
            after = loss_of(model, ids, autocast=way.endswith("bfloat16")).item()
        print(f"{way:22} loss {before:.5f} -> {after:.5f}, falls by {before - after:.5f}", flush=True)


if __name__ == "__main__":
    main()
