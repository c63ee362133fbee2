"""row_norm on a GPU: against float64 on odd shapes, then timed against one read of W."""

from __future__ import annotations

import itertools
import sys

import torch
from kernel_checks import CACHE, begin, host_microseconds, microseconds

SHAPES = (
    (1, 1, 1),
    (17, 33, 3),
    (130, 257, 16),
    (257, 1000, 33),
    (64, 129, 100),
    (511, 513, 512),
    (300, 1032, 72),
    (520, 776, 384),
    (5200, 4104, 32),
    (1300, 16400, 5),
    (2048, 16384, 512),
)  # two for Hopper's own, and one that goes to Triton
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LINEARS = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
TIMED = tuple((*nk, r) for nk in LINEARS for r in (16, 32, 64)) + (
    (8192, 8192, 384),
    (8192, 28672, 384),
    (28672, 8192, 384),
)
ADAPTERS = (torch.bfloat16, torch.float32)  # of a bfloat16 base; PEFT keeps float32


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
    lora_fused, sanitize = begin(__doc__)
    torch.manual_seed(0)
    print(f"row_norm: worst relative error against float64 {check(lora_fused):.2g}")
    if sanitize:
        return
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)  # a kernel: the copy engine of a graph is slower
    bandwidth = 2 * source.nbytes / microseconds(lambda x: torch.neg(x, out=target), [source]) / 1e6
    print(f"read and write {bandwidth:.2f} TB/s; floor: one read of W at that rate; sum: torch's W.sum()")
    print("     N      K    R adapter        us   TB/s  x floor  x sum  dense us  host us")
    for (n, k, r), adapter in itertools.product(TIMED, ADAPTERS):
        first = draw(n, k, r, torch.bfloat16, adapter)
        size = first[0].numel() * first[0].element_size()
        inputs = [first] + [draw(n, k, r, torch.bfloat16, adapter) for _ in range(min(8, 1 + CACHE // size))]
        fused = microseconds(lambda x: lora_fused.row_norm(*x, 0.7), inputs)
        read = microseconds(lambda x: x[0].sum(), inputs)
        dense = microseconds(lambda x: (x[0] + 0.7 * (x[2] @ x[1])).norm(dim=1), inputs)
        print(
            f"{n:6} {k:6} {r:4} {str(adapter)[6:]:8} {fused:9.1f} {size / fused / 1e6:6.2f} "
            f"{fused * bandwidth * 1e6 / size:8.2f} {fused / read:6.2f} {dense:9.1f} "
            f"{host_microseconds(lambda: lora_fused.row_norm(*first, 0.7)):8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
