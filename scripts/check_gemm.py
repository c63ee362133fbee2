"""The Hopper product with LoRA terms inside, on a GPU: against float64, then timed against the library.

Inputs lie in larger buffers full of NaN, and outputs are NaN before a call: what is read or left out by
mistake shows. Timed over random inputs larger than the L2, contenders in turn, GPU time alone.
"""

from __future__ import annotations

import itertools

import torch
from kernel_checks import CACHE, ROUNDING, begin, host_microseconds, medians, padded

# M, N, k of every segment
SMALL = (
    (1, 8, (8,)),
    (128, 256, (64,)),
    (64, 128, (64, 16)),
    (129, 264, (72, 16)),
    (300, 520, (256, 8, 8)),
    (255, 128, (1024, 32)),
)
LARGER = (
    (257, 1000, (520, 24)),
    (1000, 776, (2048, 16, 8, 64, 32, 40, 128, 8)),
    (4096, 1024, (512, 96)),
    (2300, 4104, (1000, 200, 48)),
    (2048, 4096, (4096, 1024, 1024, 96)),
    (70000, 264, (128, 32)),
)
EPILOGUES = (
    "plain",
    "bias",
    "accumulate",
    "mag_norm_scale",
    "mag_norm_scale and bias",
    "dropped",
    "dropped, mag_norm_scale and bias",
    "excess",
    "excess and bias",
    "multiplied",
    "multiplied, mag_norm_scale and bias",
)
# Whether b is [N, k], and what becomes of the sum; (mag_norm_scale - 1)∘ of the leading segments for such b alone.
FORMS = [(rows, name) for rows in (True, False) for name in EPILOGUES if rows or "excess" not in name]
P, SEED = 0.3, 2**40 + 1  # of what is dropped, or multiplied in float16: the sum of the first half of the segments
LINEARS = ((4096, 4096), (4096, 14336), (14336, 4096))  # in, out


def check(ops, m: int, n: int, ks: tuple[int, ...], rows_are_n: bool, epilogue: str, dtype) -> None:
    excess = "excess" in epilogue
    multiplied = 4.0 if "multiplied" in epilogue and len(ks) > 1 and dtype == torch.float16 else 1.0
    leading = len(ks) // 2 if "dropped" in epilogue or excess or multiplied != 1.0 else 0
    a = [padded(m, k, dtype) for k in ks]
    b = [padded(n, k, dtype) if rows_are_n else padded(k, n, dtype) for k in ks]
    bias = padded(1, n, dtype)[0] if "bias" in epilogue else None
    mag_norm_scale = padded(1, n, torch.float32)[0] if "mag_norm_scale" in epilogue or excess else None
    accumulate = epilogue == "accumulate"
    out = padded(m, n, dtype, None if accumulate else float("nan"))
    z = padded(m, n, dtype, float("nan")) if mag_norm_scale is not None else None
    products = [x.double() @ (y.double().t() if rows_are_n else y.double()) for x, y in zip(a, b)]
    acc, before, seed = sum(products[leading:]), sum(products[:leading]), None
    if leading and excess:
        z_truth, truth, acc = before, acc + before * (mag_norm_scale.double() - 1), acc.abs() + before.abs()
    else:
        if multiplied != 1.0:
            acc = acc + multiplied * before
        elif leading:
            mask, seed = torch.empty(m, n, device="cuda"), torch.tensor([SEED], device="cuda")
            ops.dropout(torch.ones_like(mask), seed, P, mask)
            acc = acc + mask.double() * before
        z_truth, truth = acc, acc * mag_norm_scale.double() if mag_norm_scale is not None else acc
    if bias is not None:
        truth = truth + bias.double()
    if accumulate:
        truth = truth + out.double()
    # One rounding, and that of acc where it is added to out; in float32 one truncation a wgmma.
    size = truth.abs() + (acc.abs() if accumulate else 0)
    slack = sum(ks) / 16 * 2.0**-23 * acc.square().mean().sqrt()
    if mag_norm_scale is not None:
        slack = slack * (
            (mag_norm_scale.double() - 1).abs() + 1 if excess else mag_norm_scale.double().abs().clamp(min=1)
        )
    ops.gemm(a, b, rows_are_n, out, bias, mag_norm_scale, z, accumulate, seed, P, leading, multiplied)
    for name, value, exact in (("out", out, truth), ("z", z, z_truth)):
        if value is None:
            continue
        wrong = ~((value.double() - exact).abs() <= ROUNDING[dtype] * (size if value is out else exact.abs()) + slack)
        if wrong.any():
            at = wrong.nonzero()[0].tolist()
            raise AssertionError(
                f"gemm {m}x{n}, k {ks}, b {'[N, k]' if rows_are_n else '[k, N]'}, {epilogue}, {dtype}: {name} wrong in "
                f"{int(wrong.sum())} places, first {at}: {value[at[0], at[1]].item()} for {exact[at[0], at[1]].item()}"
            )
        around = value._base
        if not (around[m:].isnan().all() and around[:m, n:].isnan().all()):
            raise AssertionError(f"gemm {m}x{n}, k {ks}: wrote outside {name}")


def check_all(ops, shapes) -> int:
    count = 0
    for shape, form, dtype in itertools.product(shapes, FORMS, ROUNDING):
        check(ops, *shape, *form, dtype)
        count += 1
    torch.cuda.synchronize()
    return count


def draw(m: int, n: int, ks: tuple[int, ...], rows_are_n: bool) -> list:
    """Enough sets of (a, b, out) to pass the L2."""
    size = 2 * (m * n + sum(ks) * (m + n))
    randn = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    return [
        (
            [randn(m, k) for k in ks],
            [randn(n, k) if rows_are_n else randn(k, n) for k in ks],
            torch.empty(m, n, device="cuda", dtype=torch.bfloat16),
        )
        for _ in range(min(8, 1 + CACHE // size))
    ]


def library(count: int, rows_are_n: bool):
    """The first `count` segments as products of the library, all but the first added in place."""
    stored = (lambda b: b.t()) if rows_are_n else (lambda b: b)

    def run(a, b, out):
        torch.mm(a[0], stored(b[0]), out=out)
        for x, y in zip(a[1:count], b[1:count]):
            out.addmm_(x, stored(y))

    return run


def contenders(gemms: dict, segments: int, rows_are_n: bool, linear_expand=None) -> dict:
    """`segments` counts the LoRA terms, which are the last, as one."""
    table = {"library, no LoRA": library(segments - 1, rows_are_n), "native": library(segments, rows_are_n)}
    if linear_expand is not None and segments == 2:
        stored = (lambda b: b) if rows_are_n else (lambda b: b.t())
        table["triton"] = lambda a, b, out: linear_expand(a[0], stored(b[0]), a[1], stored(b[1]))
    for name, gemm in gemms.items():
        table[name] = lambda a, b, out, gemm=gemm: gemm(a, b, rows_are_n, out)
    first = next(iter(gemms.values()))
    table["gemm, no LoRA"] = lambda a, b, out: first(a[:-1], b[:-1], rows_are_n, out)
    if not rows_are_n:  # a backward; what the mask is over comes first
        mask = (torch.tensor([SEED], device="cuda"), 0.1, 1)
        table["gemm, dropped"] = lambda a, b, out: first(a[::-1], b[::-1], False, out, None, None, None, False, *mask)
    return table


def report(gemms: dict, linear_expand, tokens, ranks, linears=LINEARS) -> None:
    groups = [((k,), n, "forward") for k, n in linears] + [((n,), k, "backward") for k, n in linears]
    groups += [((4096,), 1024, "forward"), ((4096, 1024, 1024), 4096, "backward")]
    print("direction       M      N  k                    r  us and TFLOP/s of the arithmetic with LoRA")
    for m, (ks, n, direction), r in itertools.product(tokens, groups, ranks):
        rank = r * len(ks)
        inputs = draw(m, n, (*ks, rank), direction == "forward")
        times = medians(contenders(gemms, len(ks) + 1, direction == "forward", linear_expand), inputs)
        flops = 2 * m * n * (sum(ks) + rank)
        cells = "  ".join(f"{name} {t:.1f} {flops / t / 1e6:.0f}" for name, t in times.items())
        print(f"{direction:9} {m:7} {n:6}  {'+'.join(map(str, ks)):15} {rank:4}  {cells}", flush=True)


def main() -> None:
    lora_fused, sanitize = begin(__doc__, hopper="gemm")
    gemm = lora_fused._ops.ops.gemm
    print(f"gemm: {check_all(lora_fused._ops.ops, SMALL)} small cases right", flush=True)
    if sanitize:
        return
    print(f"gemm: {check_all(lora_fused._ops.ops, LARGER)} larger cases right", flush=True)
    x = draw(128, 256, (64, 16), True)[0]
    host = host_microseconds(lambda: gemm(*x[:2], True, x[2]))
    print(f"gemm: {host:.1f} us of host time, the dispatcher's included")
    from importlib import import_module

    linear_expand = import_module(f"{lora_fused.__name__}.backends.triton.linear_expand").linear_expand
    report({"gemm": gemm}, linear_expand, (2048, 8192), (16, 32, 64))


if __name__ == "__main__":
    main()
