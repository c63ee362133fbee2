"""Where the time of one experts layer goes: launches, host time and GPU time by kernel, of forward and backward and of
decoding, beside what the shape must read and multiply at least.

    python benchmarks/profile_experts.py                 # a GPU of 40 GB or more, about a minute
    python benchmarks/profile_experts.py --backend grouped_mm --shapes Qwen3-30B-A3B
    python benchmarks/profile_experts.py --host --tokens 2048    # and where host time goes, from launch to launch

Host time is what it takes to enqueue a call. The floor counts weights read once a direction, what is saved written and
read once, and the products' FLOPs; "at peak" divides them by `--bandwidth` and `--flops`.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import statistics
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from tune_experts import RANK, SHAPES, Shape, draw, step, taking


def floor(shape: Shape, tokens: int) -> tuple[float, float]:
    """(bytes, FLOPs) of forward and backward, bfloat16."""
    rows = tokens * shape.chosen
    used = min(rows, shape.experts)
    width, hidden = 3 * shape.inner, shape.hidden  # both products' weights of an expert are width · hidden
    weights = 2 * 2 * used * width * hidden
    factors = 2 * 2 * used * RANK * (2 * hidden + 3 * shape.inner) * 2
    per_row = 2 * (2 * 2 * shape.inner * 2 + 2 * shape.inner * 2 + 2 * hidden * 2)  # z, dz; h; y and dx by row
    per_token = 2 * 4 * hidden
    return weights + factors + rows * per_row + tokens * per_token, 2 * 2 * rows * width * hidden


def host(run, calls: int = 20) -> float:
    """µs to enqueue a call."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    total = 0.0
    for _ in range(calls):
        start = time.perf_counter()
        run()
        total += time.perf_counter() - start
        torch.cuda.synchronize()
    return 1e6 * total / calls


def between_launches(kernels, run, calls: int = 40) -> list[tuple[str, float, float]]:
    """(kernel, µs of the host before its launch, µs in it) in order, medians; the last is what follows them all."""
    stamps: list[tuple[str, float, float]] = []
    prefix = f"{kernels.__name__}.backends.triton."
    modules = [module for name, module in sys.modules.items() if name.startswith(prefix) and hasattr(module, "launch")]

    def stamped(own):
        def launch(kernel, *args, **kwargs):
            start = time.perf_counter()
            own(kernel, *args, **kwargs)
            stamps.append((kernel.fn.__name__, start, time.perf_counter()))

        return launch

    rounds = []
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(taking(module, "launch", stamped(module.launch)))
        for _ in range(calls):
            torch.cuda.synchronize()
            stamps.clear()
            before = time.perf_counter()
            run()
            stamps.append(("", time.perf_counter(), time.perf_counter()))
            starts = [before, *(end for _, _, end in stamps)]
            rounds.append([(start - last, end - start) for last, (_, start, end) in zip(starts, stamps)])
    medians = [
        [1e6 * statistics.median(each[i][part] for each in rounds) for part in (0, 1)] for i in range(len(stamps))
    ]
    return [(name, *median) for (name, _, _), median in zip(stamps, medians)]


def by_kernel(run, calls: int = 5) -> list[tuple[str, float, float]]:
    """(name, launches, µs) a call of every kernel, longest first."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    rows = [(event.key, event.count / calls, event.device_time_total / calls) for event in seen.key_averages()]
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])


def show(title: str, run, parts: dict) -> None:
    kernels = by_kernel(run)
    launches, gpu = sum(row[1] for row in kernels), sum(row[2] for row in kernels)
    hosts = ", ".join(f"{name} {host(part):.0f}" for name, part in parts.items())
    print(f"\n{title}: {launches:.0f} launches, GPU {gpu:.0f} us, host us: {hosts}")
    for name, count, us in kernels[:16]:
        print(f"  {us:8.1f} us {count:4.0f}x  {name[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    titles = [shape.title for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=titles, default=titles)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--decoding", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--backend", choices=("default", "triton", "grouped_mm"), default="default")
    parser.add_argument("--host", action="store_true", help="host time from launch to launch")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="TB/s")
    parser.add_argument("--flops", type=float, default=989, help="TFLOP/s")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("profile_experts: a CUDA GPU is required")
    from kernels import get_local_kernel

    kernels = get_local_kernel(ROOT / "build")
    select, device = kernels.backends.select, torch.device("cuda", 0)
    own, own_few = select.choose_experts, select.few_rows
    forward = kernels.functional.experts.compute_experts
    choose = own if args.backend == "default" else lambda *_: args.backend
    few = (lambda *_: None) if args.backend == "grouped_mm" else own_few
    with taking(select, "choose_experts", choose), taking(select, "few_rows", few):
        for shape in (shape for shape in SHAPES if shape.title in args.shapes):
            for tokens in args.tokens:
                operands = draw(kernels.specs, shape, tokens, device, torch.float32)
                read, flops = floor(shape, tokens)
                show(
                    f"{shape.title}, {tokens} tokens",
                    lambda operands=operands: step(kernels, operands),
                    {
                        "forward": lambda operands=operands: forward(*operands[:6], False),
                        "both": lambda operands=operands: step(kernels, operands),
                    },
                )
                for name, gap, own in between_launches(kernels, lambda: step(kernels, operands)) if args.host else ():
                    print(f"  {gap:6.0f} us of the host before {name or 'the end'}, {own:.0f} in it")
                at_peak = read / args.bandwidth * 1e-6, flops / args.flops * 1e-6
                shown = f"{read / 1e9:.2f} GB, {flops / 1e12:.2f} TFLOP"
                print(f"  floor: {shown}: {at_peak[0]:.0f} and {at_peak[1]:.0f} us at peak")
            for tokens in args.decoding:
                operands = draw(kernels.specs, shape, tokens, device, torch.float32)

                def decode(operands=operands):
                    with torch.no_grad():
                        return forward(*operands[:6], False)

                show(f"{shape.title}, decoding {tokens} tokens", decode, {"call": decode})
                used = operands.index.unique().numel()
                read = 2 * used * 3 * shape.inner * shape.hidden
                print(f"  floor: {used} experts, {read / 1e9:.2f} GB: {read / args.bandwidth * 1e-6:.0f} us at peak")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
