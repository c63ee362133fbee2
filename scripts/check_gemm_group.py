"""The sums of a group in one launch with the products with a rank that they read, on a Hopper GPU: against float64,
under load and in graphs, then timed against a launch for each.

Inputs lie in larger buffers full of NaN, and t and outputs are NaN before a call. Each part is named before it runs,
so that a launch that hangs is known when a time limit ends the script:

    timeout 100 python scripts/check_gemm_group.py
    timeout 300 compute-sanitizer --tool memcheck python scripts/check_gemm_group.py --sanitize     (or synccheck)
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from check_skinny import assert_close, assert_nothing_around, assert_product
from kernel_checks import CACHE, ROUNDING, begin, host_microseconds, medians, padded
from torch import Tensor

# M, K, and of each member N and rank
SMALL = (
    (1, 8, ((8, 8),)),
    (77, 136, ((72, 8), (40, 16), (64, 8))),
    (129, 520, ((264, 32),)),
    (257, 1032, ((520, 64), (136, 32), (8, 0))),
    (300, 200, ((1000, 96),)),
)
GROUPS = (
    (4096, ((4096, 32), (1024, 32), (1024, 32))),
    (1024, ((2048, 8),)),
    (1000, ((1032, 64), (520, 64))),
    (14336, ((512, 16), (264, 0), (1024, 8))),
    (2048, ((4096, 96),)),
)
LARGER = tuple((m, *group) for m in (1, 77, 129, 2000, 2048, 8192) for group in GROUPS)
# Of the 8B shape: in, outs, and whether today's backward makes dt beside dB
TIMED = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate, up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
SCALING, RANK = 0.75, 32


class Call(NamedTuple):
    """Operands of ops.gemm_group."""

    x: list[Tensor]
    other: list[Tensor]
    t: list[Tensor]
    scalings: list[float]
    a: list[Tensor]
    b: list[Tensor]
    segments: list[int]
    made: list[int]
    b_rows_are_n: bool
    out: list[Tensor]
    bias: list[Tensor | None]


def cuts(members) -> list[tuple[int, int]]:
    """Each member's first column of t, and its rank."""
    ends = list(itertools.accumulate(rank for _, rank in members))
    return [(end - rank, rank) for end, (_, rank) in zip(ends, members)]


def draw_forward(m: int, k: int, members, dtype, bias: bool, draw=padded) -> Call:
    """y of each member, t of all."""
    nan = float("nan")
    ranks = sum(rank for _, rank in members)
    x, of_all = draw(m, k, dtype), draw(ranks, k, dtype)
    t = draw(m, ranks, dtype, nan)
    a, b, outs = [], [], []
    for (n, rank), (first, _) in zip(members, cuts(members)):
        a += [x, t[:, first : first + rank]] if rank else [x]
        b += [draw(n, k, dtype)] + ([draw(n, rank, dtype)] if rank else [])
        outs.append(draw(m, n, dtype, nan))
    segments = [2 if rank else 1 for _, rank in members]
    biases = [draw(1, n, dtype)[0] if bias else None for n, _ in members]
    return Call([x], [of_all], [t], [SCALING], a, b, segments, [s - 1 for s in segments], True, outs, biases)


def draw_backward(m: int, k: int, members, dtype, bias: bool, draw=padded) -> Call:
    """dx [M, K] of all members, and dt of each that has a rank."""
    nan = float("nan")
    ranks = sum(rank for _, rank in members)
    dt = draw(m, ranks, dtype, nan)
    dys = [draw(m, n, dtype) for n, _ in members]
    shrinks = [
        (dy, draw(n, rank, dtype), dt[:, first : first + rank])
        for dy, (n, rank), (first, _) in zip(dys, members, cuts(members))
        if rank
    ]
    x, other, t = map(list, zip(*shrinks))
    b = [draw(n, k, dtype) for n, _ in members] + [draw(ranks, k, dtype)]
    biases = [draw(1, k, dtype)[0] if bias else None]
    return Call(x, other, t, [SCALING] * len(x), [*dys, dt], b, [len(b)], [1], False, [draw(m, k, dtype, nan)], biases)


DRAWS = {"forward": draw_forward, "backward": draw_backward}


def counters(call: Call) -> int:
    """As common/gemm.h has it."""
    return 2 + -(-call.out[0].shape[0] // 128)


def check(ops, direction: str, m: int, k: int, members, dtype, bias: bool, zeros: bool) -> None:
    call = DRAWS[direction](m, k, members, dtype, bias)
    name = f"gemm_group {direction} M={m} K={k} members {members} {dtype} bias {bias} zeros {zeros}"
    ops.gemm_group(*call, zeros=torch.zeros(counters(call), device="cuda", dtype=torch.int32) if zeros else None)
    stored = (lambda b: b.t()) if call.b_rows_are_n else (lambda b: b)
    for x, other, t in zip(call.x, call.other, call.t):
        assert_close(f"{name}: t", t, ROUNDING[dtype], x, stored(other), SCALING)
    whole = call.t[0] if direction == "forward" else call.a[-1]
    assert_nothing_around(f"{name}: t", whole, whole.shape)
    at = 0
    for out, count, vector in zip(call.out, call.segments, call.bias):
        left = torch.cat([a.double() for a in call.a[at : at + count]], dim=1)
        right = torch.cat([stored(b).double() for b in call.b[at : at + count]])
        if vector is not None:
            left = torch.cat([left, torch.ones_like(left[:, :1])], dim=1)
            right = torch.cat([right, vector.double()[None]])
        assert_product(f"{name}: out of {out.shape[1]}", out, left, right, 1.0, out.shape)
        at += count


def check_all(ops, shapes) -> int:
    count = 0
    for i, (shape, direction, dtype) in enumerate(itertools.product(shapes, DRAWS, ROUNDING)):
        check(ops, direction, *shape, dtype, bias=i % 3 == 0, zeros=i % 2 == 0)
        count += 1
    torch.cuda.synchronize()
    return count


def results(call: Call) -> list[Tensor]:
    return [*call.t, *call.out]


def stress(ops, launches: int) -> None:
    """Launches on two streams, one of them preferred, beside a third's products: every result is that of a launch
    alone, bit for bit. So grids are there in part, and each other's slices are made in any order."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream(priority=-1)]
    load, big = torch.cuda.Stream(), torch.randn(3000, 3000, device="cuda").bfloat16()
    shapes = (
        ("forward", 2000, 1024, ((1024, 32), (512, 32))),
        ("backward", 700, 1000, ((520, 16), (264, 64))),
        ("forward", 300, 2048, ((2048, 96),)),
        ("backward", 2048, 512, ((1024, 32), (512, 32), (512, 32))),
    )
    work = []
    for stream in streams:
        calls = [DRAWS[direction](*shape, torch.bfloat16, False) for direction, *shape in shapes]
        expected = []
        for call in calls:
            ops.gemm_group(*call)
            torch.cuda.synchronize()
            expected.append([value.clone() for value in results(call)])
        work.append((stream, calls, expected, torch.zeros((), device="cuda", dtype=torch.int64)))
    torch.cuda.synchronize()
    for i in range(launches // len(streams)):
        if i % 8 == 0:
            with torch.cuda.stream(load):
                torch.mm(big, big)
        for stream, calls, expected, wrong in work:
            with torch.cuda.stream(stream):
                call = calls[i % len(calls)]
                for value in results(call):
                    value.fill_(float("nan"))
                ops.gemm_group(*call)
                for value, alone in zip(results(call), expected[i % len(calls)]):
                    wrong += (value != alone).sum()
    torch.cuda.synchronize()
    for at, (_, _, expected, wrong) in enumerate(work):
        assert all(value.isfinite().all() for alone in expected for value in alone)
        if wrong.item():
            raise AssertionError(f"stream {at}: {wrong.item()} values differ from those of a launch alone")


def check_graphs(ops, replays: int = 50) -> None:
    """A replay reads its inputs anew and counts from zero; two graphs at a time do not meet."""
    captured = []
    for direction in DRAWS:
        call = DRAWS[direction](2000, 1024, ((1024, 32), (512, 32)), torch.bfloat16, True)
        ops.gemm_group(*call)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ops.gemm_group(*call)
        captured.append((torch.cuda.Stream(), graph, call))
    for _ in range(replays):
        for _, _, call in captured:
            call.x[0].normal_()
            for value in results(call):
                value.fill_(float("nan"))
        torch.cuda.synchronize()
        for stream, graph, _ in captured:
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for _, _, call in captured:
            replayed = [value.clone() for value in results(call)]
            ops.gemm_group(*call)
            for again, value in zip(replayed, results(call)):
                assert torch.equal(again, value), "a replay differs from a launch"


def layer_results(lora_fused, parts, x, dys, dora: bool, dtype, adapter, backend: str) -> list[Tensor]:
    """Outputs and gradients of a group of (W, A, B, magnitude)."""
    leaf = lambda value, dtype: value.to(dtype, copy=True).requires_grad_()  # noqa: E731
    leaves, projections = [leaf(x, dtype)], []
    for w, a, b, magnitude in parts:
        own = [leaf(a, adapter), leaf(b, adapter)]
        if dora:
            own.append(leaf(magnitude, adapter if adapter == torch.float64 else torch.float32))
        leaves += own
        operands = lora_fused.Operands(w.to(dtype), None, *own[:2], None, own[2] if dora else None)
        projections.append(lora_fused.Projection(operands, 0.5))
    with torch.autocast("cuda", dtype=dtype, enabled=adapter != dtype):
        ys = lora_fused.lora_linear_group(leaves[0], projections, backend=backend)
    torch.autograd.backward(ys, [dy.to(y.dtype) for dy, y in zip(dys, ys)])
    return [*(y.detach() for y in ys), *(each.grad for each in leaves)]


def launches(run) -> int:
    """Of gemm_group's kernel in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if "gemm_group_kernel" in event.key)


def check_layers(lora_fused) -> int:
    """Groups that the dispatch table sends to it, LoRA and DoRA, adapters in the base's dtype or in float32 under
    autocast: no result is further from float64 than a tenth more than that of the kernels
    for other GPUs."""
    ops = lora_fused._ops.ops
    m, k, r = 2000, 1024, 16
    # Of three linears the forward is one launch, of one linear the backward as well.
    cases = {(2048, 1024, 1024): 1, (2048,): 2}
    count = 0
    for widths, dora, adapter, dtype in itertools.product(cases, (False, True), (torch.float32, None), ROUNDING):
        if dora and dtype == torch.float16:
            continue  # not the native ops'
        draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.float64) * shape[-1] ** -0.5  # noqa: E731
        x, dys = draw(m, k).to(dtype), [draw(m, n).to(dtype) for n in widths]
        parts = [tuple(draw(*shape).to(dtype) for shape in ((n, k), (r, k), (n, r))) for n in widths]
        parts = [(w, a, b, (w.double() + 0.5 * b.double() @ a.double()).norm(dim=1) * 1.3) for w, a, b in parts]
        run = lambda *how: layer_results(lora_fused, parts, x, dys, dora, *how)  # noqa: E731
        truth = run(torch.float64, torch.float64, "reference")
        native = (dtype, adapter or dtype, "native")
        together = run(*native)
        ran = launches(lambda: run(*native))
        assert ran == cases[widths], f"{widths}, DoRA {dora}, {adapter}, {dtype}: {ran} launches of a group"
        ops.set_architecture("sm80")
        apart = run(*native)
        ops.set_architecture("")
        for i, (value, other, exact) in enumerate(zip(together, apart, truth)):
            error, allowed = (((v.double() - exact).norm() / exact.norm()).item() for v in (value, other))
            if not error <= 1.1 * allowed + 1e-6:
                raise AssertionError(f"result {i}, DoRA {dora}, {adapter}, {dtype}: error {error}, apart {allowed}")
            count += 1
    return count


def dense(rows: int, cols: int, dtype, fill=None) -> Tensor:
    whole = torch.empty(rows, cols, device="cuda", dtype=dtype)
    return whole.normal_() if fill is None else whole


def contenders(ops, calls: list[Call]) -> dict:
    """A launch for each product, as other sizes run; all in one, its counters cleared by a launch of its own or, for
    all inputs in one, as a conversion of adapters does; and the sums without LoRA by the library."""
    size = counters(calls[0])
    pool = torch.zeros(len(calls) * size, device="cuda", dtype=torch.int32)
    zeros = {id(call): pool[i * size : (i + 1) * size] for i, call in enumerate(calls)}
    few = calls[0].out[0].shape[0] <= 2048

    def library(call):
        stored = (lambda b: b.t()) if call.b_rows_are_n else (lambda b: b)
        at = 0
        for out, count, made in zip(call.out, call.segments, call.made):
            for i in range(at, at + count - made):
                out.addmm_(call.a[i], stored(call.b[i])) if i > at else torch.mm(call.a[i], stored(call.b[i]), out=out)
            at += count

    def apart(call):
        turned = (lambda b: b) if call.b_rows_are_n else (lambda b: b.t())
        if few:
            ops.skinny(call.x, [turned(other) for other in call.other], call.t, SCALING, False, True)
        else:
            for x, other, t in zip(call.x, call.other, call.t):
                torch.mm(x, turned(other).t(), out=t)
        at = 0
        for out, count in zip(call.out, call.segments):
            ops.gemm(call.a[at : at + count], call.b[at : at + count], call.b_rows_are_n, out)
            at += count

    def together_cleared(call):
        if call is calls[0]:
            pool.zero_()
        ops.gemm_group(*call, zeros=zeros[id(call)])

    return {
        "library, no LoRA": library,
        "apart": apart,
        "together": lambda call: ops.gemm_group(*call),
        "together, cleared before": together_cleared,
    }


def report(ops, tokens=(2048, 8192)) -> None:
    print("us of the library without LoRA, of a launch for each, of one launch")
    for m, (name, (k, widths)), direction in itertools.product(tokens, TIMED.items(), DRAWS):
        members = tuple((n, RANK) for n in widths)
        size = 2 * (m * (k + sum(widths)) + k * sum(widths))
        calls = [
            DRAWS[direction](m, k, members, torch.bfloat16, False, dense) for _ in range(min(6, 1 + CACHE // size))
        ]
        times = medians(contenders(ops, calls), [(call,) for call in calls], rounds=9)
        cells = "  ".join(f"{contender} {t:.1f}" for contender, t in times.items())
        note = "  (in a step dt is made beside dB)" if direction == "backward" and name == "gate, up" else ""
        print(f"{m:5} {name:9} {direction:9} {cells}{note}", flush=True)
        del calls
        torch.cuda.empty_cache()


def main() -> None:
    lora_fused, sanitize = begin(__doc__, hopper="gemm_group")
    ops = lora_fused._ops.ops

    def part(name: str, run) -> None:
        print(f"gemm_group: {name} ...", flush=True)
        done = run()
        torch.cuda.synchronize()
        print(f"gemm_group: {name} right{'' if done is None else f', {done} of them'}", flush=True)

    for shape in SMALL:
        part(f"small {shape}", lambda: check_all(ops, [shape]))
    if sanitize:
        return
    part("graphs", lambda: check_graphs(ops))
    part("larger cases", lambda: check_all(ops, LARGER))
    part("2000 launches on two streams", lambda: stress(ops, 2000))
    part("layers", lambda: check_layers(lora_fused))
    call = draw_forward(2048, 4096, ((4096, 32), (1024, 32), (1024, 32)), torch.bfloat16, False)
    table = contenders(ops, [call])
    for name in ("apart", "together"):
        print(f"gemm_group: q, k and v {name}: {host_microseconds(lambda: table[name](call)):.1f} us of host time")
    report(ops)


if __name__ == "__main__":
    main()
