"""What the first step costs: forward + backward right after the model is built, each in a process of its own.

Beside it stand loading the kernel, `kernelize` and a later step. Triton's cache is empty, and for lora-fused filled in
a second process. The frozen model's first step is what CUDA and its libraries cost anyone. A GPU is required.

    python benchmarks/first_call.py --out results.json
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import compare_lora as bench
import kernels
import progress
import torch
from measuring import change_parameters
from reporting import environment, parser_of

LATER = 5  # steps after the first, of which the median is given
RUNS = (("frozen", "empty"), ("PEFT", "empty"), ("lora-fused", "empty"), ("lora-fused", "filled"))


def cases(layers: int) -> list[dict]:
    """What waits for the host, and a rank whose norm is compiled by Triton."""
    model = dict(kind="llama-8b", layers=layers, batch=1, seq=2048, rank=32, adapter="fp32", autocast=True)
    high = dict(kind="linear", variant="DoRA", m=4096, k=8192, n=8192, rank=384, adapter="bf16", autocast=False)
    return [dict(model, variant=variant) for variant in ("LoRA", "DoRA")] + [high]


def seconds(work, device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def first_steps(case: dict, who: str, kernel: pathlib.Path, device: str) -> dict:
    """Seconds of everything that comes after the model is built."""
    inputs, model = bench.inputs_of(case, device), bench.build(lambda: bench.make_model(case), device=device)
    result = {}
    if who != "frozen":
        model = bench.adapt(model, case, bench.adapter_dtype_of(case))
    if who == "lora-fused":
        loaded = []
        result["load_s"] = seconds(lambda: loaded.append(kernels.get_local_kernel(kernel)), device)
        result["kernelize_s"] = seconds(lambda: bench.fuse(model, loaded[0]), device)
    times = []
    for _ in range(1 + LATER):
        change_parameters(model)
        inputs["leaf"].grad = None
        times.append(seconds(lambda: bench.step(model, inputs, case["autocast"]), device))
    return {**result, "first_s": times[0], "later_s": statistics.median(times[1:])}


def in_a_process(case: dict, who: str, cache: str, folder: str, arguments) -> dict:
    command = [sys.executable, __file__, "--kernel", arguments.kernel, "--device", arguments.device]
    done = subprocess.run(
        [*command, "--run", json.dumps(case), who],
        env={**os.environ, "TRITON_CACHE_DIR": folder},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {**case, "who": who, "triton_cache": cache, **json.loads(done.stdout.splitlines()[-1])}


def describe(row: dict) -> str:
    before = f", load {row['load_s']:.3f} s, kernelize {row['kernelize_s']:.3f} s" if "load_s" in row else ""
    return (
        f"{bench.head_of(row)} {row['who']:10} cache {row['triton_cache']:6} first {row['first_s']:.3f} s, "
        f"later {row['later_s']:.4f} s{before}"
    )


def main() -> None:
    parser = parser_of(__doc__, "benchmark_first_call.json")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--run", nargs=2, metavar=("CASE", "WHO"), help="one case, as JSON, in this process")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("a CUDA GPU is required")
    if arguments.run:
        case, who = arguments.run
        print(json.dumps(first_steps(json.loads(case), who, arguments.kernel, arguments.device)))
        return
    made_with, results = environment(arguments.device), []
    for case in progress.numbered(cases(arguments.layers)):
        with tempfile.TemporaryDirectory() as folder:
            for who, cache in RUNS:
                results.append(in_a_process(case, who, cache, folder, arguments))
                print(describe(results[-1]), flush=True)
        arguments.out.write_text(json.dumps({"environment": made_with, "results": results}, indent=1))


if __name__ == "__main__":
    main()
