"""Library against Triton on this machine's GPU, and tiles against each other: writes
torch-ext/lora_fused/backends/configs/<device>.json, which the next build ships.

    make tune

A time is the GPU's, from replays of a graph, or the host's to launch the same, whichever is longer: a step
waits for that one. Inputs are random and larger than the L2. What disagrees with the library is never chosen.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, bfloat16, float16, float32, int64

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("scripts", "benchmarks")]

import tune_experts
from kernel_checks import CACHE, host_microseconds, microseconds

RANK, SCALING = 32, 0.1  # of operands of size one: a delta about as large as what it is added to
LINEARS = (
    (512, 4096, 4096),
    (2048, 4096, 4096),
    (2048, 14336, 4096),
    (4096, 4096, 4096),
    (8192, 4096, 4096),
    (8192, 14336, 4096),
)  # M, N, K
TILED = tuple((m, n, k) for m in (512, 2048, 8192) for n, k in ((4096, 4096), (14336, 4096), (4096, 14336)))
TILES = (
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (64, 128, 64, 4, 4),
    (128, 128, 32, 4, 3),
    (128, 128, 64, 4, 2),
)
WEIGHTS = tuple((n, k, r) for n, k in ((4096, 4096), (8192, 8192), (8192, 28672)) for r in (64, 128, 256, 384))
EMBEDDED = tuple(itertools.product((512, 2048, 8192, 16384, 65536), (1024, 4096)))  # tokens, H
VOCABULARY = 32768
AGREES = 2.0**-6  # of the largest value: three roundings of bfloat16


class Case(NamedTuple):
    """One shape of an op: the sizes that its limits are about, µs of both, infinite where Triton was wrong."""

    sizes: tuple[int, ...]
    library: float
    triton: float


Tiles = dict[tuple[int, ...], dict[tuple[int, ...], float]]  # µs by shape and tile, right ones alone


def reaches_all(sizes: Sequence[int], limits: Sequence[float]) -> bool:
    return all(size >= limit for size, limit in zip(sizes, limits))


def passes_any(sizes: Sequence[int], limits: Sequence[float]) -> bool:
    return any(size > limit for size, limit in zip(sizes, limits))


def pick_limits(cases: Sequence[Case], in_triton: Callable[..., bool]) -> list[int | None]:
    """The limits under which all cases cost least, by the product of their times: sizes that were measured, 0, or
    None for no limit. Of those that cost the same the largest, which leave the library more."""
    found = [sorted(set(sizes), reverse=True) for sizes in zip(*(case.sizes for case in cases))]

    def cost(limits: tuple[float, ...]) -> float:
        return sum(math.log(case.triton if in_triton(case.sizes, limits) else case.library) for case in cases)

    best = min(itertools.product(*((math.inf, *sizes, 0) for sizes in found)), key=cost)
    return [None if limit == math.inf else limit for limit in best]


def agrees(run: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor]) -> bool:
    """Whether a candidate computes what the library did; memory that it leaves out holds NaN."""
    poison = [torch.full_like(tensor, math.nan) for tensor in expected for _ in range(2)]
    del poison
    pairs = [(ours.double(), theirs.double()) for ours, theirs in zip(run(), expected, strict=True)]
    return all(bool((ours - theirs).abs().max() <= AGREES * theirs.abs().max()) for ours, theirs in pairs)


def draw(device: torch.device, *operands: tuple[tuple[int, ...], torch.dtype]) -> list[list[Tensor]]:
    """Random operands of these shapes and dtypes, as many sets as pass the L2."""

    def one(shape, dtype):
        if dtype == int64:
            return torch.randint(VOCABULARY, shape, device=device)
        return torch.randn(shape, device=device).to(dtype)

    first = [one(*each) for each in operands]
    more = min(7, CACHE // sum(tensor.nbytes for tensor in first))
    return [first] + [[one(*each) for each in operands] for _ in range(more)]


def compare(sizes: tuple[int, ...], library, triton, inputs: list) -> Case:
    """Both take one of `inputs` and give a list of tensors."""

    def time(run) -> float:
        return max(microseconds(run, inputs), host_microseconds(lambda: run(inputs[0])))

    right = agrees(lambda: triton(inputs[0]), library(inputs[0]))
    return Case(sizes, time(library), time(triton) if right else math.inf)


def both_ways(compute: Callable[..., Tensor], leaves: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = compute(*leaves)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def linear_cases(kernels, device: torch.device) -> Iterator[Case]:
    # On Hopper only what the native op does not take may go to Triton, such as float32 adapters beside float16.
    adapter = float32 if kernels.backends.select.is_hopper(device) else float16

    def run(operands, backend):
        x, w, a, b, dy = operands
        return both_ways(lambda x, a, b: kernels.lora_linear(x, w, a, b, SCALING, backend=backend), (x, a, b), dy)

    for m, n, k in LINEARS:
        lora = ((RANK, k), adapter), ((n, RANK), adapter)
        inputs = draw(device, ((m, k), float16), ((n, k), float16), *lora, ((m, n), float16))
        yield compare((m * n * k,), lambda t: run(t, "native"), lambda t: run(t, "triton"), inputs)


def row_norm_cases(kernels, device: torch.device) -> Iterator[Case]:
    ours = kernels.backends.select.get("triton")
    for n, k, r in WEIGHTS:
        inputs = draw(device, ((n, k), bfloat16), ((r, k), bfloat16), ((n, r), bfloat16))
        if ours.row_norm_fits(*inputs[0]):
            library, triton = (lambda t, op=op: [op.row_norm(*t, SCALING)] for op in (kernels.backends.native, ours))
            yield compare((r, n * k * r), library, triton, inputs)


def embedding_cases(kernels, device: torch.device) -> Iterator[Case]:
    def run(operands, backend):
        ids, w, a, b, dy = operands
        return both_ways(lambda a, b: kernels.lora_embedding(ids, w, a, b, SCALING, backend=backend), (a, b), dy)

    for tokens, h in EMBEDDED:
        lora = ((RANK, VOCABULARY), float32), ((h, RANK), float32)
        inputs = draw(device, ((tokens,), int64), ((VOCABULARY, h), bfloat16), *lora, ((tokens, h), bfloat16))
        sizes = tokens, tokens * h * RANK
        yield compare(sizes, lambda t: run(t, "native"), lambda t: run(t, "triton"), inputs)


class Op(NamedTuple):
    cases: Callable[..., Iterator[Case]]
    in_triton: Callable[..., bool]
    limits: tuple[str, ...]  # names in `tuned.DeviceConfig`


OPS = {
    "linear": Op(linear_cases, reaches_all, ("linear_expand_from",)),
    "row_norm": Op(row_norm_cases, reaches_all, ("row_norm_from_rank", "row_norm_from")),
    "embedding": Op(embedding_cases, passes_any, ("embedding_tokens", "embedding_up_to")),
}


def configuration(cases: dict[str, list[Case]], tiles: Tiles, of_experts: Tiles) -> dict:
    """What the file of a device says of its measurements; an op without any stays with the library."""
    found: dict = {}
    for name, op in OPS.items():
        found.update(dict.fromkeys(op.limits))
        found.update(zip(op.limits, pick_limits(cases[name], op.in_triton)))
    found["linear_expand_tiles"] = tune_experts.as_entries({shape: us for shape, us in tiles.items() if us})
    found["experts_tiles"] = tune_experts.as_entries(of_experts)
    return found


def tile_times(kernels, device: torch.device) -> Tiles:
    """GPU time of y = x Wᵀ + t Bᵀ and dx = dy W + t A together."""
    module = importlib.import_module(f"{kernels.__name__}.backends.triton.linear_expand")
    room = module.shared_memory(device)
    # Two thirds for the stages: the rest is for the LoRA term and what a mag_norm_scale and float32 adapters need.
    fitting = [module.Tile(*t) for t in TILES if 2 * (t[0] + t[1]) * t[2] * t[4] <= room * 2 // 3]

    def run(operands, linear_expand, **tile):
        x, dy, t, w, a, b = operands
        return [linear_expand(x, w, t, b, **tile), linear_expand(dy, w.t(), t, a.t(), **tile)]

    times: Tiles = {}
    for m, n, k in TILED:
        halves = [(shape, bfloat16) for shape in ((m, k), (m, n), (m, RANK), (n, k))]
        inputs = draw(device, *halves, ((RANK, k), float32), ((n, RANK), float32))
        expected = run(inputs[0], kernels.backends.reference.linear_expand)
        times[m, n, k] = {
            tuple(tile): microseconds(lambda t, tile=tile: run(t, module.linear_expand, tile=tile), inputs)
            for tile in fitting
            if agrees(lambda tile=tile: run(inputs[0], module.linear_expand, tile=tile), expected)
        }
        shown = (f"{'x'.join(map(str, tile))} {us:.0f}" for tile, us in times[m, n, k].items())
        print(f"linear_expand {m}x{n}x{k}, us:", *shown, flush=True)
    return times


def measure(kernels, device: torch.device) -> dict:
    """The configuration of a device; prints what was measured."""
    if device.type != "cuda" or not torch.cuda.is_available():
        sys.exit(f"tune: device {device}, but a CUDA GPU is required")
    cases: dict[str, list[Case]] = {name: [] for name in OPS}
    torch.cuda.set_device(device)
    for i, (name, op) in enumerate(OPS.items(), 1):
        print(f"{name}: {i} of {len(OPS) + 2}", flush=True)
        for case in op.cases(kernels, device):
            cases[name].append(case)
            print(f"{name} {case.sizes}: library {case.library:.0f}, Triton {case.triton:.0f} us", flush=True)
    print(f"tiles of linears: {len(OPS) + 1} of {len(OPS) + 2}", flush=True)
    tiles = tile_times(kernels, device)
    print(f"tiles of experts: {len(OPS) + 2} of {len(OPS) + 2}", flush=True)
    return configuration(cases, tiles, tune_experts.tile_times(kernels, device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda", 0))
    device = parser.parse_args().device
    from kernels import get_local_kernel

    kernels = get_local_kernel(ROOT / "build")
    found = measure(kernels, device)
    name, triton = torch.cuda.get_device_name(device), importlib.import_module("triton")
    source = f"benchmarks/tune.py, torch {torch.__version__}, triton {triton.__version__}"
    path = (
        ROOT / "torch-ext" / "lora_fused" / "backends" / "configs" / kernels.backends.device_config.path_of(name).name
    )
    path.write_text(json.dumps({"device": name, "source": source, **found}, indent=2) + "\n")
    print(f"{path.relative_to(ROOT)}:\n{path.read_text()}")


if __name__ == "__main__":
    main()
