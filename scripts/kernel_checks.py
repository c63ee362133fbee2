"""What the checks of kernels on a GPU share: how one begins, operands with NaN around them, GPU and host times."""

from __future__ import annotations

import argparse
import pathlib
import random
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence

import torch
from kernels import get_local_kernel
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a last place
CACHE = 256 * 2**20  # more than any L2: inputs rotate through this much memory


def begin(doc: str, hopper: str | None = None) -> tuple[types.ModuleType, bool]:
    """The built package, and whether the small checks alone are asked for. `hopper`: the name of a kernel that is for
    compute capability 9.0 alone; elsewhere the process says so and ends."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true", help="small checks only, for a run under compute-sanitizer")
    sanitize = parser.parse_args().sanitize
    if hopper and torch.cuda.get_device_capability() != (9, 0):
        print(f"{hopper}: for compute capability 9.0 alone, not run")
        sys.exit()
    return get_local_kernel(ROOT / "build"), sanitize


def padded(rows: int, cols: int, dtype: torch.dtype, fill: float | None = None) -> Tensor:
    """[rows, cols] with NaN around it; `fill`: its own value, random unless given."""
    whole = torch.full((rows + 3, (cols + 7) // 8 * 8 + 8), float("nan"), device="cuda", dtype=dtype)
    part = whole[:rows, :cols]
    return part.normal_() if fill is None else part.fill_(fill)


def medians(contenders: dict[str, Callable], inputs: Sequence, rounds: int = 15) -> dict[str, float]:
    """Microseconds of a call of each on the GPU, from graphs over all inputs, so without host time, replayed in random
    order: the clock follows the load. An input is a tuple of arguments."""
    graphs = {}
    for name, function in contenders.items():
        for x in inputs:
            function(*x)
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for x in inputs:
                function(*x)
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, graph in random.sample(list(graphs.items()), len(graphs)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / len(inputs))
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def microseconds(function: Callable, inputs: Sequence, repeats: int = 7) -> float:
    """`medians` of one function of one argument, over inputs in turn and so again."""
    return medians({"": function}, [(x,) for x in (*inputs, *inputs)], repeats + 1)[""]


def host_microseconds(function: Callable, calls: int = 20) -> float:
    """Time to enqueue a call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6
