"""dA and dB beside dx, on a Hopper GPU: backward ops of groups and gated MLPs against the kernels of other GPUs, many
at a time, in graphs and with memory that is written over as soon as they return, then timed, beside another build if
one is given.

    timeout 200 python scripts/check_adapter_grads.py [--against OLD/build]
    timeout 300 compute-sanitizer --tool memcheck python scripts/check_adapter_grads.py --sanitize
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from kernel_checks import ROOT, medians
from kernels import get_local_kernel
from torch import Tensor

RANK, SCALING, DROPOUT = 32, 0.75, 0.1
KINDS = ("LoRA", "dropout", "DoRA", "DoRA, dropout")
LINEARS, MLP = "linears", "MLP"
# What runs, K, and N of each linear or what is between a gated MLP's linears
CHECKED = ((LINEARS, 2048, (2048, 1024, 1024)), (MLP, 2048, (2816,)))
TIMED = {
    "q, k, v": (LINEARS, 4096, (4096, 1024, 1024)),
    "o": (LINEARS, 4096, (4096,)),
    "MLP": (MLP, 4096, (14336,)),
}
OPERANDS, WEIGHT, DOWN, UP, MAGNITUDE, SCALE = 6, 0, 2, 3, 4, 5  # of a projection, as the ops take them


class Call(NamedTuple):
    """A backward op and what it reads."""

    op: str
    tensors: list[Tensor | None]  # x, of which the last are the operands
    run: Callable[..., list[Tensor]]  # by ops and such tensors


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def projection(n: int, k: int, kind: str) -> list[Tensor | None]:
    a = draw(RANK, k, dtype=torch.float32, scale=k**-0.5)
    b = draw(n, RANK, dtype=torch.float32, scale=0.1)
    magnitude = torch.rand(n, device="cuda") + 0.5 if "DoRA" in kind else None
    return [draw(n, k, scale=k**-0.5), None, a, b, magnitude, None]


def masks(count: int, kind: str):
    if "dropout" not in kind:
        return None, None
    return torch.randint(0, 2**40, (count,), device="cuda"), [DROPOUT] * count


def with_norms(operands: list, norms: list[Tensor]) -> list:
    """What a backward takes in place of magnitudes."""
    found, count = list(operands), len(norms) // 2
    for i in range(count):
        found[OPERANDS * i + MAGNITUDE], found[OPERANDS * i + SCALE] = norms[i], norms[count + i]
    return found


def linears(ops, m: int, k: int, widths, kind: str) -> Call:
    x, dys = draw(m, k), [draw(m, n) for n in widths]
    operands, count = [t for n in widths for t in projection(n, k, kind)], len(widths)
    seeds, dropouts = masks(count, kind)
    how = [SCALING] * count, seeds, dropouts, None, kind == "DoRA"
    _, *found = itertools.islice(ops.lora_forward(x, operands, *how), count - 1, None)
    unscaled = found[1 : 1 + count] if "DoRA" in kind else []
    tensors = [x, found[0], *dys, *unscaled, *with_norms(operands, found[1 + len(unscaled) :])]
    needs = [3 + 8 * ("DoRA" in kind)] * count

    def run(ops, tensors):
        x, t, *rest = tensors
        given = rest[count : count + len(unscaled)] or None
        return ops.lora_backward(rest[:count], x, t, given, rest[count + len(unscaled) :], *how, True, needs)

    return Call("lora_backward", tensors, run)


def mlp(ops, m: int, k: int, widths, kind: str) -> Call:
    (inner,) = widths
    x, dy = draw(m, k), draw(m, k)
    operands = [t for n, of in ((inner, k), (inner, k), (k, inner)) for t in projection(n, of, kind)]
    seeds, dropouts = masks(3, kind)
    how = [SCALING] * 3, seeds, dropouts, None, kind == "DoRA", 0, 0
    found = ops.gated_forward(x, operands, *how, False)
    norms = found[-6:] if "DoRA" in kind else []
    kept = found[1 : len(found) - len(norms)]
    tensors = [x, dy, *kept, *with_norms(operands, norms)]
    needs = [3 + 8 * ("DoRA" in kind)] * 3

    def run(ops, tensors):
        x, dy, *rest = tensors
        return ops.gated_backward(dy, x, rest[: len(kept)], rest[len(kept) :], *how, True, needs)

    return Call("gated_backward", tensors, run)


def call_of(ops, m: int, case, kind: str) -> Call:
    what, k, widths = case
    return (linears if what == LINEARS else mlp)(ops, m, k, widths, kind)


def streams_of(run: Callable[[], object]) -> dict[str, set[int]]:
    """The streams of each kernel of a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found: dict[str, set[int]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name, set()).add(event.device_resource_id)
    return found


def is_beside(run: Callable[[], object]) -> bool:
    """Whether a product with a rank has run on another stream than a sum of products."""
    streams = streams_of(run)
    of = lambda word: set().union(*(ids for name, ids in streams.items() if word in name))  # noqa: E731
    return bool(of("skinny_kernel") - of("gemm_kernel")) and bool(of("gemm_kernel"))


def errors(values: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((v.double() - e.double()).norm() / e.double().norm()).item() for v, e in zip(values, exact, strict=True)]


def check_as_one_after_another(ops, m: int, case, kind: str, beside: bool | None) -> None:
    """The same gradients, to rounding, as by the kernels for GPUs before Hopper, whose every launch waits for the one
    before; `beside`: whether this case is to run so, None where the profiler cannot be asked."""
    call = call_of(ops, m, case, kind)
    run = lambda: call.run(ops, call.tensors)  # noqa: E731
    run()
    assert beside is None or is_beside(run) == beside, f"{case} {kind}, {m} tokens: beside {not beside}"
    found = run()
    ops.set_architecture("sm80")
    others = run()
    ops.set_architecture("")
    for i, error in enumerate(errors(found, others)):
        if not error <= 1e-2:
            raise AssertionError(f"{case} {kind}, {m} tokens: gradient {i} is {error} apart")


def check_memory_written_over(ops, m: int, case, kind: str, times: int = 20) -> None:
    """What an op reads belongs to others as soon as it returns."""
    call = call_of(ops, m, case, kind)
    expected = [value.clone() for value in call.run(ops, call.tensors)]
    torch.cuda.synchronize()
    for _ in range(times):
        copies = [None if t is None else t.clone() for t in call.tensors]
        found = call.run(ops, copies)
        for copy in copies:
            if copy is not None and copy.is_floating_point():
                copy.fill_(float("nan"))
        del copies
        for value, exact in zip(found, expected, strict=True):
            assert torch.equal(value, exact), f"{case} {kind}: another result where memory is written over"


def check_many(ops, m: int, kind: str, times: int = 40) -> None:
    """Calls on two streams beside a third's products: every result is that of a call alone, bit for bit."""
    streams, load = [torch.cuda.Stream(), torch.cuda.Stream(priority=-1)], torch.cuda.Stream()
    big = draw(3000, 3000)
    calls = [call_of(ops, m, case, kind) for case in CHECKED]
    alone = [[value.clone() for value in call.run(ops, call.tensors)] for call in calls]
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    torch.cuda.synchronize()
    for i in range(times):
        with torch.cuda.stream(load):
            torch.mm(big, big)
        for at, stream in enumerate(streams):
            which = (i + at) % len(calls)
            with torch.cuda.stream(stream):
                for value, exact in zip(calls[which].run(ops, calls[which].tensors), alone[which], strict=True):
                    wrong += (value != exact).sum()
    torch.cuda.synchronize()
    assert all(value.isfinite().all() for each in alone for value in each)
    assert wrong.item() == 0, f"{kind}: {wrong.item()} values differ from those of a call alone"


def check_graphs(ops, m: int, case, kind: str, replays: int = 5) -> None:
    """A replay reads its inputs anew, after another capture and calls outside of it as well."""
    captured = []
    for _ in range(2):
        call = call_of(ops, m, case, kind)
        call.run(ops, call.tensors)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call.run(ops, call.tensors)
        captured.append((call, graph, found))
    for _ in range(replays):
        for call, graph, found in captured:
            call.tensors[0].normal_()
            graph.replay()
            torch.cuda.synchronize()
            for value, exact in zip(found, call.run(ops, call.tensors), strict=True):
                assert torch.equal(value, exact), f"{case} {kind}: a replay differs from a call"


def check_all(ops, few: bool) -> int:
    """`few`: under compute-sanitizer, which leaves no room for the profiler."""
    count = 0
    for case, kind in itertools.product(CHECKED, KINDS):
        print(f"{case} {kind}", flush=True)
        expected = None if few else is_expected(case, kind, 2048)
        check_as_one_after_another(ops, 2048, case, kind, expected)
        check_memory_written_over(ops, 2048, case, kind, times=2 if few else 20)
        count += 2
        if not few:
            check_as_one_after_another(ops, 4096, case, kind, is_expected(case, kind, 4096))
            check_graphs(ops, 2048, case, kind)
            count += 2
    for kind in () if few else KINDS:
        check_many(ops, 2048, kind)
        count += 1
    return count


def is_expected(case, kind: str, m: int) -> bool:
    """As dispatch/table.h has it."""
    if case[0] == MLP or "dropout" in kind:
        return True
    return kind == "LoRA" and m >= 4096


def time_all(ops, other) -> None:
    for m, kind, (name, case) in itertools.product((2048, 4096, 8192), KINDS, TIMED.items()):
        calls = [call_of(ops, m, case, kind) for _ in range(4 if case[0] == LINEARS and m == 2048 else 2)]
        contenders = {"": lambda call: call.run(ops, call.tensors)}
        if other:
            contenders["the other build"] = lambda call: call.run(other, call.tensors)
        times = medians(contenders, [(call,) for call in calls], rounds=11)
        print(f"{m} tokens, {kind}, {name}:", *(f"{time:.1f} {said}" for said, time in times.items()), flush=True)
        del calls
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true", help="small checks only, for a run under compute-sanitizer")
    parser.add_argument("--against", type=pathlib.Path, metavar="BUILD", help="another build to time beside this one")
    arguments = parser.parse_args()
    if torch.cuda.get_device_capability() != (9, 0):
        print("adapter gradients beside dx: for compute capability 9.0 alone, not run")
        sys.exit()
    torch.manual_seed(0)
    ops = get_local_kernel(ROOT / "build")._ops.ops
    print(f"{check_all(ops, arguments.sanitize)} checks passed", flush=True)
    if not arguments.sanitize:
        time_all(ops, get_local_kernel(arguments.against)._ops.ops if arguments.against else None)


if __name__ == "__main__":
    main()
