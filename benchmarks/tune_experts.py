"""Tiles of experts' products in Triton on this machine's GPU, and whether they beat torch's grouped products: forward
and backward of `lora_experts`, bfloat16, r=16, GPU time from replays of a graph.

    make tune                                           # with all else that is measured
    python benchmarks/tune_experts.py                   # these alone: a table, and the device's file with them
    python benchmarks/tune_experts.py --processes 16    # the same, Triton's cache filled first: a minute or two

A tile is chosen by rows an expert, N and K of the first product; where torch's products are faster a shape has none,
and they are taken there. What disagrees with torch's products is never chosen. Of the fastest tile the table also has
both ways to make t = x Aᵀ: beside the product, and in a launch of its own (`grouped_linear.FUSED_RANK_UP_TO`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import math
import pathlib
import subprocess
import sys
from typing import NamedTuple

import torch
from torch import Tensor, bfloat16, float32

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from kernel_checks import microseconds

RANK, SCALING, AGREES = 16, 2.0, 2e-2


class Shape(NamedTuple):
    """Hidden and inner size, experts, choices of a token, whether as gpt-oss stores and gates; tokens to measure."""

    title: str
    hidden: int
    inner: int
    experts: int
    chosen: int
    is_gpt_oss: bool = False
    tokens: tuple[int, ...] = (2048, 8192)


SHAPES = (
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8, tokens=(512, 2048, 8192)),
    Shape("Mixtral-8x7B", 4096, 14336, 8, 2),
    Shape("gpt-oss-20b", 2880, 2880, 32, 4, True),
)
# Two warpgroups or one, a program a multiprocessor or two. Experts with about as many rows as a tile has fill the last
# tile badly: for them tiles of 64 rows, which read a weight's tile again from the L2.
TILES = (
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 3),
    (128, 128, 128, 8, 2),
    (64, 256, 64, 4, 3),
    (64, 256, 64, 8, 4),
    (64, 128, 64, 4, 3),
    (64, 128, 64, 4, 4),
    (64, 128, 128, 4, 2),
)
APART = ("beside", 2**62), ("apart", 0)  # how t is made, and the limit that makes it so


class Operands(NamedTuple):
    """Of one call of `lora_experts`, all that is trained a leaf."""

    x: Tensor
    index: Tensor
    routing: Tensor
    up: tuple
    down: tuple
    gate: object
    dy: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        factors = [weights[part] for weights in (self.up, self.down) for part in (2, 3)]
        return [self.x, self.routing, *factors]


def draw(specs, shape: Shape, tokens: int, device: torch.device, adapter=bfloat16) -> Operands:
    """Adapters as PEFT stores them: A by expert, B with the expert fastest."""

    def weights(n: int, k: int):
        sizes = (k, n) if shape.is_gpt_oss else (n, k)
        weight = torch.randn((shape.experts, *sizes), device=device, dtype=bfloat16).mul_(k**-0.5)
        bias = torch.randn((shape.experts, n), device=device, dtype=bfloat16) if shape.is_gpt_oss else None
        a = torch.randn((shape.experts, RANK, k), device=device).mul_(k**-0.5).to(adapter)
        b = torch.randn((n, RANK, shape.experts), device=device).mul_(0.1).to(adapter)
        factors = a.requires_grad_(), b.permute(2, 0, 1).requires_grad_()
        return specs.ExpertWeights(weight.transpose(1, 2) if shape.is_gpt_oss else weight, bias, *factors, SCALING)

    x, dy = (torch.randn((tokens, shape.hidden), device=device, dtype=bfloat16) for _ in range(2))
    logits = torch.randn((tokens, shape.experts), device=device)
    routing, index = logits.softmax(-1).topk(shape.chosen, -1)
    gate = specs.Gate(interleaved=True, limit=7.0, slope=1.702, offset=1.0) if shape.is_gpt_oss else specs.Gate()
    up, down = weights(2 * shape.inner, shape.hidden), weights(shape.hidden, shape.inner)
    return Operands(x.requires_grad_(), index, routing.to(bfloat16).requires_grad_(), up, down, gate, dy)


def step(kernels, operands: Operands) -> list[Tensor]:
    """Output and gradients."""
    y = kernels.functional.experts.compute_experts(*operands[:6], False)
    # A graph that is alive would have nodes of this stream in one that is captured on another.
    return [y.detach(), *torch.autograd.grad(y, operands.leaves, operands.dy)]


@contextlib.contextmanager
def taking(module, name: str, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def differs(seen: list[Tensor], expected: list[Tensor]) -> float:
    """The largest ‖ours - theirs‖ / ‖theirs‖."""
    pairs = [(ours.to(float32), theirs.to(float32)) for ours, theirs in zip(seen, expected, strict=True)]
    errors = [((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs]
    return max(math.inf if math.isnan(error) else error for error in errors)


def fitting(kernels, device: torch.device) -> list[tuple[int, ...]]:
    """The tiles for which a program has room."""
    room = importlib.import_module(f"{kernels.__name__}.backends.triton.launch").shared_memory(device)
    return [tile for tile in TILES if 2 * (tile[0] + tile[1] + RANK) * tile[2] * tile[4] <= room]


@contextlib.contextmanager
def in_triton(kernels, tile: tuple[int, ...]):
    """Products are Triton's, of this tile."""
    select, experts = (
        importlib.import_module(f"{kernels.__name__}.backends.{name}") for name in ("select", "triton.experts")
    )
    chosen = experts.Tile(*tile)
    with (
        taking(select, "choose_experts", lambda *_: select.TRITON),
        taking(experts, "choose_tile", lambda weight, choices: chosen),
    ):
        yield


def compile_share(kernels, device: torch.device, number: int, processes: int) -> None:
    """Compiles one process's share of what `tile_times` launches; each begins with another shape, as memory is
    theirs together."""
    limits = importlib.import_module(f"{kernels.__name__}.backends.triton.grouped_linear")
    cases = [(shape, tokens) for shape in SHAPES for tokens in shape.tokens]
    first = number % len(cases)
    for shape, tokens in cases[first:] + cases[:first]:
        operands = draw(kernels.specs, shape, tokens, device)
        for tile, (_, limit) in list(itertools.product(fitting(kernels, device), APART))[number::processes]:
            with in_triton(kernels, tile), taking(limits, "FUSED_RANK_UP_TO", limit):
                step(kernels, operands)
        del operands
        torch.cuda.empty_cache()


def compile_in(processes: int, device: torch.device) -> None:
    """Fills Triton's cache; compiling takes most of the time."""
    command = [sys.executable, __file__, "--device", str(device), "--processes", str(processes), "--share"]
    running = [subprocess.Popen([*command, str(number)]) for number in range(processes)]
    if any([process.wait() for process in running]):
        sys.exit("tune_experts: a process that compiles has failed")


def tile_times(kernels, device: torch.device) -> dict[tuple[int, ...], dict[tuple[int, ...], float]]:
    """µs by (rows an expert, N, K) and tile, of those that are right and faster than torch's products."""
    select = kernels.backends.select
    limits = importlib.import_module(f"{kernels.__name__}.backends.triton.grouped_linear")
    times: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}
    for shape in SHAPES:
        for tokens in shape.tokens:
            operands = draw(kernels.specs, shape, tokens, device)

            def timed(operands=operands) -> float:
                return microseconds(lambda each: step(kernels, each), [operands], repeats=5)

            with taking(select, "choose_experts", lambda *_: select.GROUPED):
                expected, grouped = step(kernels, operands), timed()
            found = {}
            for tile in fitting(kernels, device):
                with in_triton(kernels, tile):
                    if differs(step(kernels, operands), expected) <= AGREES:
                        found[tile] = timed()
            shown = [f"{'x'.join(map(str, tile))} {us:.0f}" for tile, us in found.items()]
            for name, limit in APART if found else ():
                fastest = min(found, key=lambda tile: found[tile])
                with in_triton(kernels, fastest), taking(limits, "FUSED_RANK_UP_TO", limit):
                    shown.append(f"t {name} {timed():.0f}")
            sizes = tokens * shape.chosen // shape.experts, 2 * shape.inner, shape.hidden
            times[sizes] = {tile: us for tile, us in found.items() if us < grouped}
            print(f"experts {shape.title} {tokens}, us: torch {grouped:.0f};", *shown, flush=True)
            del operands, expected
            torch.cuda.empty_cache()
    return times


def as_entries(times: dict) -> list[dict]:
    """As a device's file has them."""
    return [{"shape": list(shape), "tile": list(min(us, key=us.get)) if us else None} for shape, us in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda", 0))
    parser.add_argument("--show", action="store_true", help="write no file")
    parser.add_argument("--processes", type=int, default=0, help="fill Triton's cache first, in so many")
    parser.add_argument("--share", type=int, help="compile alone, what is this one's of --processes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_experts: a CUDA GPU is required")
    from kernels import get_local_kernel

    kernels = get_local_kernel(ROOT / "build")
    if args.share is not None:
        compile_share(kernels, args.device, args.share, args.processes)
        return
    if args.processes:
        compile_in(args.processes, args.device)
    entries = as_entries(tile_times(kernels, args.device))
    print(json.dumps(entries))
    config = kernels.backends.device_config
    name = config.path_of(torch.cuda.get_device_name(args.device)).name
    path = ROOT / "torch-ext" / "lora_fused" / "backends" / "configs" / name
    if not args.show and path.exists():
        path.write_text(json.dumps({**json.loads(path.read_text()), "experts_tiles": entries}, indent=2) + "\n")
        print(f"{path.relative_to(ROOT)} has them; build again")


if __name__ == "__main__":
    main()
