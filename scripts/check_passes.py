"""The passes of a gated MLP and of a group on a GPU, which memory bounds: the gated activation, DoRA's scale and its
sums. Microseconds of each kernel inside its op, beside the time of its traffic, and of another build if one is given.

    timeout 100 python scripts/check_passes.py [--against OLD/build]

What they compute is checked by tests/test_gated_passes.py and tests/test_native.py.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import re
import statistics
from collections import defaultdict

import torch
from check_adapter_grads import LINEARS, MLP, OPERANDS, SCALING, call_of
from kernel_checks import ROOT
from kernels import get_local_kernel

PASSES = re.compile(r"gated_activation_kernel|scale_output_\w+_kernel|add_shares_kernel")
CALLS = 8
# What runs, K, and N of each linear or what is between a gated MLP's linears, as `call_of` takes them
CASES = {"MLP": (MLP, 4096, (14336,)), "q, k, v": (LINEARS, 4096, (4096, 1024, 1024)), "o": (LINEARS, 4096, (4096,))}


def copy_rate() -> float:
    """Bytes a microsecond of a plain copy."""
    source = torch.empty(2**29, device="cuda", dtype=torch.uint8)
    to = torch.empty_like(source)
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        to.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return 2 * source.numel() / statistics.median(times[1:])


def passes_of(run, ops) -> dict[str, float]:
    """Microseconds of each kernel of a call; of one that runs twice, both."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(CALLS):
            run(ops)
        torch.cuda.synchronize()
    found = defaultdict(list)
    for event in profile.events():
        name = PASSES.search(event.name)
        if name and event.device_type == torch.autograd.DeviceType.CUDA:
            found[name[0]].append(event.time_range.elapsed_us())
    return {name: sum(times) / CALLS for name, times in found.items()}


def bytes_of(m: int, case, kind: str, direction: str) -> int:
    """What the passes have to move: the activation's tensors once and, in DoRA's backward, dy, u and dy scaled of the
    other linears, whose outputs the product scales in the forward."""
    what, k, widths = case
    activation = (3 if direction == "forward" else 6) * 2 * m * widths[0] if what == MLP else 0
    others = k if what == MLP else sum(widths)
    return activation + (3 * 2 * m * others if (kind, direction) == ("DoRA", "backward") else 0)


def directions_of(call, case):
    """The backward op of a case, and of a gated MLP the forward."""
    backward = lambda ops: call.run(ops, call.tensors)  # noqa: E731
    if case[0] == LINEARS:
        return {"backward": backward}
    x, operands = call.tensors[0], call.tensors[-3 * OPERANDS :]
    how = [SCALING] * 3, None, None, None, False, 0, 0, False
    return {"forward": lambda ops: ops.gated_forward(x, operands, *how), "backward": backward}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=pathlib.Path, metavar="BUILD", help="another build to time beside this one")
    arguments = parser.parse_args()
    builds = {"": ROOT / "build", **({"the other build": arguments.against} if arguments.against else {})}
    loaded = {said: get_local_kernel(path)._ops.ops for said, path in builds.items()}
    torch.manual_seed(0)
    rate = copy_rate()
    print(f"a copy moves {rate / 1e6:.2f} TB/s")
    for m, kind, (name, case) in itertools.product((2048, 8192), ("LoRA", "DoRA"), CASES.items()):
        if (case[0], kind) == (LINEARS, "LoRA"):
            continue  # no pass
        call = call_of(loaded[""], m, case, kind)
        for direction, run in directions_of(call, case).items():
            print(
                f"{m} tokens, {kind}, {name}, {direction}: traffic {bytes_of(m, case, kind, direction) / rate:.0f} µs"
            )
            for said, ops in loaded.items():
                run(ops)
                torch.cuda.synchronize()
                for kernel, time in passes_of(run, ops).items():
                    print(f"    {kernel} {time:.1f} {said}", flush=True)
        del call, run
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
