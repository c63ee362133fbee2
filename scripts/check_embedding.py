"""Embeddings on a GPU: every backend, output and gradients, against float64.

Fresh random inputs on odd shapes, in every dtype that the kernels take, with memory that holds NaN
where the kernels allocate. The norm is checked alone as well.
"""

from __future__ import annotations

import itertools
import math
import pathlib
import sys

import torch
from kernels import get_local_kernel

ROOT = pathlib.Path(__file__).resolve().parent.parent
# (tokens, V, H, R, padding_idx); the last norm is over a large vocabulary.
SHAPES = (
    (5, 9, 8, 1, None),
    (7, 33, 24, 5, 0),
    (130, 40, 136, 16, 39),
    (66, 301, 72, 33, None),
    (40, 129, 264, 100, 3),
    (2049, 1003, 520, 8, None),
    (9000, 50, 64, 40, 7),
    (0, 20, 32, 4, None),
    (300, 151936, 256, 32, None),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT = {torch.float32: 2.0**-21, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def poison() -> None:
    """Leaves NaN in what the allocator hands out next."""
    sizes = (128, 1024, 2**14, 2**17) * 8 + (2**22,) * 2
    blocks = [torch.full((size,), math.nan, device="cuda") for size in sizes]
    del blocks


def draw(tokens, v, h, r, table, adapter):
    ids = torch.randint(0, v, (tokens,), device="cuda")
    w = torch.randn(v, h, device="cuda").to(table)
    a, b = torch.randn(r, v, device="cuda"), torch.randn(h, r, device="cuda") * r**-0.5
    m = (0.5 + torch.rand(h, device="cuda")) * v**0.5
    return ids, (w, a.to(adapter), b.to(adapter), m.to(adapter)), torch.randn(tokens, h, device="cuda").to(table)


def results(lora_fused, backend, ids, operands, dy, dora, scale, padding) -> dict:
    operands = [t.detach().requires_grad_() for t in (operands if dora else operands[:3])]
    w, a, b, *m = operands
    poison()
    y = lora_fused.lora_embedding(
        ids, w, a, b, 0.7, magnitude=m[0] if m else None, embed_scale=scale, padding_idx=padding, backend=backend
    )
    poison()
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), **{name: t.grad for name, t in zip("wabm", operands)}}


def error(value, truth) -> float:
    value, truth = value.double(), truth.double()
    if truth.numel() == 0 or truth.norm() == 0:
        return 0.0 if value.numel() == 0 else value.abs().max().item()
    return ((value - truth).norm() / truth.norm()).item()


def check(lora_fused, backend) -> float:
    """Worst error in units of the dtype of the table or, for a plain LoRA's gradients on the native ops,
    which keep 16 bits of a float32 adapter, of 2⁻¹⁵."""
    worst = 0.0
    for number, (shape, table) in enumerate(itertools.product(SHAPES, DTYPES)):
        for adapter, dora in itertools.product({table, torch.float32}, (False, True)):
            *sizes, padding = shape
            ids, operands, dy = draw(*sizes, table, adapter)
            if backend == "native" and table == torch.float32:
                continue
            ids = ids.int() if number % 2 else ids
            scale = (1.0, 7.3, torch.tensor(7.25, device="cuda", dtype=table))[number % 3]
            wide = [t.double() for t in operands]
            e = scale.double() if isinstance(scale, torch.Tensor) else scale
            truth = results(lora_fused, "reference", ids, wide, dy.double(), dora, e, padding)
            for name, value in results(lora_fused, backend, ids, operands, dy, dora, scale, padding).items():
                coarse = backend == "native" and name in "abm" and not dora
                unit = 2.0**-15 if coarse and adapter == torch.float32 else UNIT[table]
                units = error(value, truth[name]) / unit
                if not units <= 1.0:
                    sys.exit(f"{backend} {shape} {table}/{adapter} dora={dora}: {name} is off by {units:.3g} units")
                worst = max(worst, units)
    return worst


def check_norm(lora_fused, name) -> float:
    worst = 0.0
    for (_, v, h, r, _), table in itertools.product(SHAPES, DTYPES):
        for adapter in {table, torch.float32}:
            _, (w, a, b, m), _ = draw(0, v, h, r, table, adapter)
            operands = lora_fused.specs.EmbeddingOperands(w, a, b, m)
            if name == "native" and not lora_fused.backends.native_embedding.norm_fits(operands):
                continue
            poison()
            kernels = lora_fused.backends.select.get_embedding(name)
            value = kernels.column_norm(w, a, b, 0.7)
            off = error(value, torch.linalg.vector_norm(w.double() + 0.7 * (b.double() @ a.double()).t(), dim=0))
            # A float32 A is rounded, each entry apart.
            bound = 2e-6 if adapter == table else 2e-6 + 2.0**-8 / v**0.5
            mag_norm_scale = lora_fused.backends.select.column_norm_and_scale(name, operands, 0.7)[1]
            if not torch.equal(mag_norm_scale, lora_fused.backends.native.mag_norm_scale(m, value)):
                sys.exit(f"{name} mag_norm_scale {v}x{h}, rank {r}, {table}/{adapter}: not magnitude over the norm")
            if not off <= bound:
                sys.exit(f"{name} norm {v}x{h}, rank {r}, {table}/{adapter}: relative error {off:.3g}")
            worst = max(worst, off)
    return worst


def main() -> None:
    torch.manual_seed(torch.seed() % 2**31)
    lora_fused = get_local_kernel(ROOT / "build")
    names = sys.argv[1:] or ["native", "triton"]
    for name in names:
        print(f"{name}: norm within {check_norm(lora_fused, name):.2g} of float64", flush=True)
        print(f"{name}: forward and backward within {check(lora_fused, name):.2g} units of float64", flush=True)


if __name__ == "__main__":
    main()
