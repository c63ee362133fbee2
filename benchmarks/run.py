"""Every benchmark on this machine's GPU; results go to benchmarks/results/<gpu>/.

    python benchmarks/run.py

On an H200 README's tables are made anew from them.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys

import torch

BENCHMARKS = pathlib.Path(__file__).resolve().parent
# What makes benchmark_<name>.json, --out aside.
RUNS = {
    "lora": ("compare_lora.py",),
    "peers": ("compare_lora.py", "--peers"),
    "qlora": ("compare_qlora.py",),
    "embedding": ("compare_embedding.py",),
    "first_call": ("first_call.py",),
}


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("a CUDA GPU is required")
    gpu = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()
    results = BENCHMARKS / "results" / gpu
    results.mkdir(parents=True, exist_ok=True)
    for name, (script, *options) in RUNS.items():
        out = results / f"benchmark_{name}.json"
        subprocess.run([sys.executable, BENCHMARKS / script, *options, "--out", out], check=True)
    if gpu == "h200":
        subprocess.run([sys.executable, BENCHMARKS / "tables.py"], check=True)


if __name__ == "__main__":
    main()
