"""Tiles of experts' products in Triton on this machine's GPU, and whether they beat torch's grouped products: forward
and backward of `lora_experts`, bfloat16, r=16, GPU time from replays of a graph.

    make tune                            # with all else that is measured
    python benchmarks/tune_experts.py    # these alone, 2 to 4 minutes: a table, and the device's file with them

A tile is chosen by rows an expert, N and K of the first product; where torch's products are faster a shape has none,
and they are taken there. What disagrees with torch's products is never chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import pathlib
import sys
from typing import NamedTuple

import torch
from torch import Tensor, bfloat16, float32

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from check_row_norm import microseconds

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
TILES = (
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (64, 128, 64, 4, 4),
    (64, 256, 64, 8, 3),
    (32, 128, 64, 4, 4),
)


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
    return [y, *torch.autograd.grad(y, operands.leaves, operands.dy)]


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


def tile_times(kernels, device: torch.device) -> dict[tuple[int, ...], dict[tuple[int, ...], float]]:
    """µs by (rows an expert, N, K) and tile, of those that are right and faster than torch's products."""
    select = kernels.backends.select
    experts = importlib.import_module(f"{kernels.__name__}.backends.triton.experts")
    room = importlib.import_module(f"{kernels.__name__}.backends.triton.launch").shared_memory(device)
    fitting = [tile for tile in TILES if 2 * (tile[0] + tile[1] + RANK) * tile[2] * tile[4] <= room]
    times: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}
    for shape in SHAPES:
        for tokens in shape.tokens:
            operands = draw(kernels.specs, shape, tokens, device)

            def timed(operands=operands) -> float:
                return microseconds(lambda each: step(kernels, each), [operands], repeats=5)

            with taking(select, "choose_experts", lambda *_: select.GROUPED):
                expected, grouped = step(kernels, operands), timed()
            found = {}
            for tile in fitting:
                chosen = experts.Tile(*tile)
                with (
                    taking(select, "choose_experts", lambda *_: select.TRITON),
                    taking(experts, "choose_tile", lambda weight, choices, chosen=chosen: chosen),
                ):
                    if differs(step(kernels, operands), expected) <= AGREES:
                        found[tile] = timed()
            sizes = tokens * shape.chosen // shape.experts, 2 * shape.inner, shape.hidden
            times[sizes] = {tile: us for tile, us in found.items() if us < grouped}
            shown = (f"{'x'.join(map(str, tile))} {us:.0f}" for tile, us in found.items())
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
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_experts: a CUDA GPU is required")
    from kernels import get_local_kernel

    kernels = get_local_kernel(ROOT / "build")
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
