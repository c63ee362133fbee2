"""How the comparisons measure: GPU time of queued steps, the memory that a step takes, contenders in turns.

Steps are queued one after another without a wait between them; a step's time is between two events on the GPU.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable

import torch


def event_times(step: Callable, before: Callable, repeats: int, calls: int = 1) -> list[float]:
    """Milliseconds of `step` in each of `repeats`, in which it runs `calls` times in a row and `before` outside of the
    clock."""
    pairs = []
    for _ in range(repeats):
        before()
        pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        pairs[-1][0].record()
        for _ in range(calls):
            step()
        pairs[-1][1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / calls for start, end in pairs]


def measured(step: Callable, before: Callable, repeats: int, calls: int = 1) -> dict:
    """Times as `event_times` takes them and the peak of memory while they were taken; warming up is the caller's."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    times = event_times(step, before, repeats, calls)
    peak = torch.cuda.max_memory_allocated()
    return {
        "ms": statistics.median(times),
        "min_ms": min(times),
        "times_ms": [round(time, 3) for time in times],  # a host that others use shows in their spread
        "peak_gb": peak / 1e9,
        "transient_gb": (peak - held) / 1e9,  # of a step, gradients included
    }


def change_parameters(model: torch.nn.Module) -> None:
    """Before a step, as an optimizer leaves them: every trained parameter has changed in place, and no gradient is left
    that a backward would add to."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return
    with torch.no_grad():
        torch._foreach_mul_(trained, 1.0 + 1e-6)
    for p in trained:
        p.grad = None


def captured(step: Callable, before: Callable) -> Callable:
    """The replay of a step in a CUDA graph, which the host takes no part in; parameters and inputs are read anew at
    every replay. `before` runs between warming up, three steps since groups form in the second, and the capture: what
    it runs before every other step, so that the graph writes the gradients that these would add to."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def in_turns(ways: dict[str, Callable[[], dict]], rounds: int) -> dict[str, dict]:
    """Each way's figures, medians of `rounds` in which all take turns in changing order: a GPU that has just rested
    runs faster than one at its power limit, so that the first to be measured would win."""
    found: dict[str, list[dict]] = {name: [] for name in ways}
    names = list(ways)
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(ways[name]())
    over = {"min_ms": min, "times_ms": lambda rounds: [time for times in rounds for time in times]}
    return {
        name: {key: over.get(key, statistics.median)([part[key] for part in parts]) for key in parts[0]}
        for name, parts in found.items()
    }


def release_memory() -> None:
    """What the last models held, cycles included, so that the next peak is the next model's own."""
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # one for each stream that a graph had
    torch.cuda.empty_cache()
