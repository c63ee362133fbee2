"""Every benchmark on this machine's GPU, or those that are named; results go to benchmarks/results/<gpu>/.

    python benchmarks/run.py [NAME ...]        of those in RUNS

What wants two GPUs is left out where there is one, unless it is named. On an H200 the tables and pictures of the docs
are made anew from them.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import time

import torch

BENCHMARKS = pathlib.Path(__file__).resolve().parent
# What makes benchmark_<name>.json, --out aside.
RUNS = {
    "lora": ("compare_lora.py",),
    "peers": ("compare_lora.py", "--peers", "--layers", "8"),  # torch.compile takes minutes for more
    "compiled": ("compare_compiled.py",),
    "generation": ("compare_generation.py",),
    "qlora": ("compare_qlora.py",),
    "embedding": ("compare_embedding.py",),
    "training": ("compare_training.py",),
    "training_compiled": ("compare_training.py", "--layers", "8", "--base", "bf16", "--compiled"),  # as the peers
    "training_fsdp": ("compare_training.py", "--fsdp"),
    "first_call": ("first_call.py",),
}
TWO_GPUS = {"training_fsdp": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}; all of them unless given")
    alone = torch.cuda.device_count() < 2
    names = parser.parse_args().names or [name for name in RUNS if not (alone and name in TWO_GPUS)]
    unknown = [name for name in names if name not in RUNS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(RUNS)}")
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is required")
    gpu = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()
    results = BENCHMARKS / "results" / gpu
    results.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for i, name in enumerate(names, 1):
        print(f"{name}: {i} of {len(names)}, {(time.monotonic() - started) / 60:.0f} min passed", flush=True)
        script, *options = RUNS[name]
        out = results / f"benchmark_{name}.json"
        launcher = TWO_GPUS.get(name, ())
        subprocess.run([sys.executable, *launcher, BENCHMARKS / script, *options, "--out", out], check=True)
    if gpu == "h200":
        for script in (BENCHMARKS / "charts.py", BENCHMARKS.parent / "scripts" / "pages.py"):
            subprocess.run([sys.executable, script], check=True)


if __name__ == "__main__":
    main()
