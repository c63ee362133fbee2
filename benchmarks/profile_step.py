"""Where a step's time goes: wall time, host time and GPU time by kernel, frozen base, PEFT and lora-fused.

Few tokens show the host alone, many the GPU. Every trainable parameter is changed in place before each
step. A GPU is required.

    python benchmarks/profile_step.py --variant DoRA --tokens 32 2048 --layers 8
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time

import compare_lora as bench
import kernels
import torch
from measuring import change_parameters
from reporting import ROOT, parsed_on_a_gpu
from torch.profiler import ProfilerActivity, profile


def inputs_of(tokens: int) -> dict:
    x = torch.randn(1, tokens, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return {"call": {"inputs_embeds": x}, "leaf": x, "dy": torch.randn_like(x)}


def step_times(model, inputs: dict, autocast: bool, repeats: int) -> tuple[float, float]:
    """Medians in ms: of a step with nothing queued before it, and of the host's part of it."""
    walls, hosts = [], []
    for i in range(repeats + 3):
        change_parameters(model)
        inputs["leaf"].grad = None
        torch.cuda.synchronize()
        start = time.perf_counter()
        bench.step(model, inputs, autocast)
        queued = time.perf_counter()
        torch.cuda.synchronize()
        if i >= 3:
            hosts.append((queued - start) * 1e3)
            walls.append((time.perf_counter() - start) * 1e3)
    return statistics.median(walls), statistics.median(hosts)


def gpu_table(model, inputs: dict, autocast: bool, rows: int) -> str:
    """Busy time, launches and the kernels with the largest shares."""
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        change_parameters(model)
        bench.step(model, inputs, autocast)
        torch.cuda.synchronize()
    # The host's calls are among the rows, without time on the device.
    on_device = [row for row in run.key_averages() if row.self_device_time_total > 0]
    kernels_run = sorted(on_device, key=lambda row: -row.self_device_time_total)
    busy, launches = sum(row.self_device_time_total for row in kernels_run), sum(row.count for row in kernels_run)
    lines = [f"  GPU busy {busy / 1e3:.2f} ms in {launches} launches"]
    lines += [
        f"  {row.self_device_time_total / 1e3:9.3f} ms x{row.count:<5} {row.key[:90]}" for row in kernels_run[:rows]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=pathlib.Path, default=ROOT / "build", help="build folder to load")
    parser.add_argument("--variant", choices=bench.VARIANTS, default="LoRA")
    parser.add_argument("--adapter", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--no-autocast", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 2048])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=25, help="kernels to list")
    arguments = parsed_on_a_gpu(parser)
    lora_fused, autocast = kernels.get_local_kernel(arguments.kernel), not arguments.no_autocast
    case = dict(kind="llama-8b", variant=arguments.variant, layers=arguments.layers, rank=32)
    dtype = torch.float32 if arguments.adapter == "fp32" else torch.bfloat16
    print(torch.cuda.get_device_name())
    for tokens in arguments.tokens:
        inputs, model = inputs_of(tokens), bench.build(lambda: bench.make_model(case))
        for name in ("frozen", "PEFT", "lora-fused"):
            if name == "PEFT":
                model = bench.adapt(model, case, dtype)
            elif name == "lora-fused":
                bench.fuse(model, lora_fused)
            wall, host = step_times(model, inputs, autocast, repeats=10)
            print(f"{arguments.variant}, {tokens} tokens, {name}: {wall:.2f} ms, host {host:.2f} ms", flush=True)
            print(gpu_table(model, inputs, autocast, arguments.rows), flush=True)
        bench.release_memory()


if __name__ == "__main__":
    main()
