#!/usr/bin/env python3
"""Host time of a call and of a step of one build against another's, both in one process.

    python benchmarks/host_time.py --against OTHER/build [--build build] [--rounds 400] [--out FILE]

Sizes are so small that the host is what takes the time: a linear alone, a group of three siblings and a linear, a
gated MLP, an embedding, as LoRA and as DoRA, float32 on a CPU, bfloat16 on a GPU. The builds take turns call by call,
with the same model without adapters beside them: its time is torch's own. A step is forward and backward from a
gradient that is there; parameters change before it and gradients are let go, neither of which is timed. Prints for each
build the 10th percentile and the median in µs, the ratio of each, and the ratio of what they take beyond the model
without adapters. Besides, on a GPU, the time of steps of 4096 tokens, which the GPU takes: the same kernels have to
run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import torch
from kernels import Mode, get_local_kernel, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


class Linear(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.q = nn.Linear(width, width)

    def forward(self, x):
        return self.q(x)


class Siblings(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        return self.o(self.q(x) + self.k(x) + self.v(x))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(width, 2 * width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Embedding(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.table = nn.Embedding(512, width)

    def forward(self, x):
        return self.table(x)


class Case:
    """One model, and how it is trained: kernelized by one build, or without adapters where there is no package."""

    def __init__(self, package, kind: type[nn.Module], dora: bool, width: int, tokens: int):
        torch.manual_seed(0)
        self.inner = kind(width).to(DEVICE, DTYPE).requires_grad_(False)
        if package is not None:
            names = [
                name for name, module in self.inner.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))
            ]
            config = LoraConfig(r=8, target_modules=names, use_dora=dora, init_lora_weights=True)
            self.model = get_peft_model(self.inner, config, autocast_adapter_dtype=False)
            with package.use_peft_layers():
                kernelize(self.model, mode=Mode.TRAINING, device=DEVICE)
        ids = kind is Embedding
        self.x = (
            torch.randint(0, 512, (tokens,), device=DEVICE)
            if ids
            else torch.randn(tokens, width, device=DEVICE, dtype=DTYPE)
        )
        self.x.requires_grad_(not ids)
        self.dy = torch.randn_like(self.inner(self.x))
        self.trained = [p for p in self.inner.parameters() if p.requires_grad]
        for _ in range(5):
            self.prepare()
            self.step()

    def prepare(self) -> None:
        self.x.grad = None
        for parameter in self.trained:
            parameter.grad = None
        if self.trained:
            with torch.no_grad():
                torch._foreach_mul_(self.trained, 0.999)

    def forward(self) -> None:
        self.inner(self.x)

    def step(self) -> None:
        y = self.inner(self.x)
        if y.requires_grad:
            y.backward(self.dy)


def interleaved(cases: dict[str, Case], what: str, rounds: int, whole: bool) -> dict[str, list[float]]:
    """µs of each round by build; with `whole` until the GPU is done."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    gc.disable()
    try:
        for i in range(rounds):
            for name in sorted(cases, reverse=bool(i % 2)):
                run = getattr(cases[name], what)
                cases[name].prepare()
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                run()
                if whole and DEVICE == "cuda":
                    torch.cuda.synchronize()
                times[name].append((time.perf_counter() - start) * 1e6)
    finally:
        gc.enable()
    return times


def shown(name: str, of: dict[str, float]) -> str:
    """The times of both builds, their ratio, and that of what they take beyond the model without adapters."""
    new, old, frozen = of["new"], of["old"], of["frozen"]
    beyond = (new - frozen) / (old - frozen)
    return f"{name} {old:7.1f} -> {new:7.1f} µs ({new / old:.3f}x; beyond {frozen:6.1f} of torch's own {beyond:.3f}x)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=Path("build"), help="folder of the build in question")
    parser.add_argument("--against", type=Path, required=True, help="folder of the build it is compared with")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    packages = {"new": get_local_kernel(args.build), "old": get_local_kernel(args.against), "frozen": None}
    results = []
    for kind in (Linear, Siblings, MLP, Embedding):
        for dora in (False, True):
            for width, tokens in ((64, 4), (2048, 4096)) if DEVICE == "cuda" else ((64, 4),):
                cases = {name: Case(package, kind, dora, width, tokens) for name, package in packages.items()}
                for what in ("forward", "step"):
                    found = interleaved(cases, what, args.rounds, whole=tokens > 4)
                    row = dict(kind=kind.__name__, dora=dora, width=width, tokens=tokens, what=what)
                    row["p10"] = {name: statistics.quantiles(values, n=10)[0] for name, values in found.items()}
                    row["median"] = {name: statistics.median(values) for name, values in found.items()}
                    results.append(row)
                    name = f"{row['kind']:9} {'DoRA' if dora else 'LoRA'}{tokens:5} tokens {what:8}"
                    print(name + "   ".join(shown(each, row[each]) for each in ("p10", "median")), flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
