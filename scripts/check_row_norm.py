"""The CUDA row norm on a GPU: against float64 on odd shapes, then timed against one read of W."""

from __future__ import annotations

import argparse
import itertools
import pathlib
import statistics
import sys

import torch
from kernels import get_local_kernel

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPES = ((1, 1, 1), (17, 33, 3), (130, 257, 16), (257, 1000, 33), (64, 129, 100), (511, 513, 512))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIMED = ((4096, 4096, 32), (14336, 4096, 32), (8192, 8192, 384), (8192, 28672, 384))


def draw(n, k, r, weight_dtype, adapter_dtype):
    weight = torch.randn(n, k, device="cuda") * k**-0.5
    a, b = torch.randn(r, k, device="cuda") * k**-0.5, torch.randn(n, r, device="cuda") * r**-0.5
    return weight.to(weight_dtype), a.to(adapter_dtype), b.to(adapter_dtype)


def check(lora_fused) -> float:
    worst = 0.0
    for (n, k, r), weight_dtype, adapter_dtype in itertools.product(SHAPES, DTYPES, DTYPES):
        w, a, b = draw(n, k, r, weight_dtype, adapter_dtype)
        norm = lora_fused.row_norm(w, a, b, 0.7)
        truth = (w.double() + 0.7 * b.double() @ a.double()).norm(dim=1)
        error = ((norm.double() - truth).norm() / truth.norm()).item()
        if not error < 1e-5:
            sys.exit(f"row_norm {n}x{k}, rank {r}, {weight_dtype}/{adapter_dtype}: relative error {error:.3g}")
        worst = max(worst, error)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", action="store_true", help="check only, for a run under compute-sanitizer")
    sanitize = parser.parse_args().sanitize
    torch.manual_seed(0)
    lora_fused = get_local_kernel(ROOT / "build")
    print(f"row_norm: worst relative error against float64 {check(lora_fused):.2g}")
    if sanitize:
        return
    copy = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    bandwidth = 2 * copy.numel() / median_ms(lambda: copy.clone()) / 1e9
    for n, k, r in TIMED:
        w, a, b = draw(n, k, r, torch.bfloat16, torch.float32)
        ms = median_ms(lambda: lora_fused.row_norm(w, a, b, 0.7))
        floor = w.numel() * w.element_size() / bandwidth / 1e9
        print(f"row_norm {n}x{k}, rank {r}: {ms:.3f} ms, one read of W {floor:.3f} ms ({bandwidth:.2f} TB/s)")


def median_ms(function, repeats=20) -> float:
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


if __name__ == "__main__":
    main()
