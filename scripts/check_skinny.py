"""Products of activations with an adapter's rank on a GPU: against float64, then timed against the library.

Inputs lie in larger buffers full of NaN, and outputs are NaN before a call. Timed over
random inputs larger than the L2, contenders in turn, GPU time alone; the floor is one read of x at the rate of a copy.
"""

from __future__ import annotations

import itertools

import torch
from kernel_checks import CACHE, ROUNDING, begin, host_microseconds, medians, padded
from torch import Tensor

# M, C, R
SMALL = ((1, 8, 8), (64, 64, 16), (129, 264, 24), (300, 520, 32), (70, 1032, 40), (257, 136, 96), (200, 72, 128))
LARGER = ((2048, 4096, 32), (1000, 14336, 16), (2500, 1000, 64), (8192, 1024, 96), (5000, 4104, 128), (70000, 128, 8))
FORMS = ("down", "down, a turned", "across", "across, out turned")
ENTRIES = (1, 3, 9)  # of a launch; nine are two
DROPOUTS = (0.0, 0.3, 1.0)
# M, widths of a launch, R
SMALL_OF_DY = ((1, 300), ((520, 72), (1032, 200, 512, 136, 8)), (8, 24, 64))
LARGER_OF_DY = ((5000, 8192), ((4096, 1024, 1024), (14336,)), (16, 32))


def draw(m: int, c: int, r: int, form: str, dtype, out_dtype, hopper=True) -> tuple[Tensor, Tensor, Tensor]:
    """x, the other operand as [R, C] or [M, R], and out, NaN; not `hopper`, the gradients are contiguous."""
    x = padded(m, c, dtype)
    if form.startswith("down"):
        other = padded(c, r, dtype).t() if "turned" in form else padded(r, c, dtype)
        return x, other, padded(m, r, out_dtype, float("nan"))
    shape = (r, c) if "turned" in form else (c, r)
    if hopper:
        out = padded(*shape, out_dtype, float("nan"))
    else:
        out = torch.full((shape[0] + 3, shape[1]), float("nan"), device="cuda", dtype=out_dtype)[: shape[0]]
    return x, padded(m, r, dtype), out.t() if "turned" in form else out


def dropped(ops, x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    if not p:
        return x
    kept = torch.empty(x.shape, device="cuda")
    ops.dropout(torch.ones_like(kept), seed, p, kept, scaled=False)
    return x.double() * kept / (1 - p) if p < 1 else torch.zeros_like(x)


def check(ops, shapes, form: str, dtype, out_dtype, hopper: bool, p: float = 0.0) -> None:
    """One call with an entry for each of `shapes`, x dropped with probability p."""
    across = form.startswith("across")
    scaling = 0.75
    entries = [draw(*shape, form, dtype, out_dtype, hopper) for shape in shapes]
    seed = torch.randint(2**62, (1,), device="cuda") if p else None
    ops.skinny(*map(list, zip(*entries)), scaling, across, hopper, seed, p)
    for (m, c, r), (x, other, out) in zip(shapes, entries):
        x = dropped(ops, x, seed, p)
        left, right = (x.t(), other) if across else (x, other.t())
        name = f"skinny {form} M={m} C={c} R={r} {dtype} to {out_dtype}, {len(shapes)} entries, p={p}"
        assert_product(name, out, left, right, scaling, (r, c) if form == "across, out turned" else out.shape)


def assert_close(name: str, value: Tensor, rounding: float, left: Tensor, right: Tensor, scaling: float) -> None:
    truth = scaling * (left.double() @ right.double())
    # One truncation a wgmma, of what it adds up: first the products, at last about the result.
    products = scaling * (left.double().abs() @ right.double().abs())
    size = truth.abs().clamp(min=truth.square().mean().sqrt())
    slack = 2.0**-23 * (left.shape[1] / 16 * size + products)
    if value.dtype == torch.float16:
        slack = slack + 2.0**-25  # half a last place of a subnormal number
    wrong = ~((value.double() - truth).abs() <= rounding * truth.abs() + slack)
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        seen, exact = value[at[0], at[1]].item(), truth[at[0], at[1]].item()
        raise AssertionError(f"{name}: wrong in {int(wrong.sum())} places, first {at}: {seen} for {exact}")


def assert_nothing_around(name: str, out: Tensor, written: tuple[int, int]) -> None:
    rows, cols = written
    around = out._base
    if not (around[rows:].isnan().all() and around[:rows, cols:].isnan().all()):
        raise AssertionError(f"{name}: wrote outside out")


def assert_product(
    name: str, out: Tensor, left: Tensor, right: Tensor, scaling: float, written: tuple[int, int]
) -> None:
    """out = scaling · left right, and around the part of its buffer that is to be `written` nothing changed."""
    assert_close(name, out, ROUNDING.get(out.dtype, 2.0**-24), left, right, scaling)
    assert_nothing_around(name, out, written)


def with_rest(rows: int, cols: int, beside: bool) -> tuple[Tensor, Tensor]:
    """Float32 values as bfloat16 and what their rounding leaves out, beside or below each other; and their sum."""
    value = torch.randn(rows, cols, device="cuda")
    high = value.bfloat16()
    both = torch.cat([high, (value - high).bfloat16()], dim=int(beside))
    out = padded(*both.shape, torch.bfloat16).copy_(both)
    return out, sum(half.double() for half in both.chunk(2, dim=int(beside)))


def assert_parts(name: str, out: Tensor, ranks: int, left: Tensor, right: Tensor, scaling: float) -> None:
    """scaling · left right as high, high again and the rest, those of every `ranks` columns next to each other."""
    columns = out.reshape(out.shape[0], -1, 3, ranks)
    high, again, rest = (columns[:, :, part].flatten(1) for part in range(3))
    if not (torch.equal(high, again) and (rest.abs() <= 2.0**-8 * high.abs()).all()):
        raise AssertionError(f"{name}: parts that are not of one value")
    assert_close(name, high.double() + rest.double(), 2.0**-17, left, right, scaling)
    assert_nothing_around(name, out, out.shape)


def check_exact(ops, shapes, form: str, p: float = 0.0) -> None:
    """One call with an entry for each of `shapes`, the other operand given with its rest, bfloat16."""
    across, turned, nan = form.startswith("across"), "turned" in form, float("nan")
    entries, truths = [], []
    for m, c, r in shapes:
        beside = across or turned
        other, value = with_rest(m if across else c, r, True) if beside else with_rest(r, c, False)
        if across:
            out = padded(*((r, c) if turned else (c, r)), torch.float32, nan)
            out = out.t() if turned else out
        else:
            out = padded(m, 3 * r, torch.bfloat16, nan)
            other, value = (other.t() if turned else other), (value if turned else value.t())
        entries.append((padded(m, c, torch.bfloat16), other, out))
        truths.append(value)
    of_member = min(r for _, _, r in shapes)  # divides every rank of this list
    scaling = 0.75
    seed = torch.randint(2**62, (1,), device="cuda") if p else None
    ops.skinny(*map(list, zip(*entries)), scaling, across, True, seed, p, bf16x3=of_member)
    for (m, c, r), (x, _, out), value in zip(shapes, entries, truths):
        x = dropped(ops, x, seed, p)
        name = f"skinny, exact {form} M={m} C={c} R={r} in members of {of_member}, {len(shapes)} entries, p={p}"
        if across:
            assert_product(name, out, x.t(), value, scaling, (r, c) if turned else (c, r))
        else:
            assert_parts(name, out, of_member, x, value, scaling)


def check_exact_of_dy(dt_db, m: int, widths, r: int, db_dtype) -> None:
    entries, values = [], []
    for n in widths:
        (b, b_value), (t, t_value) = with_rest(n, r, True), with_rest(m, r, True)
        dy, dt, db = (padded(m, n, torch.bfloat16), padded(m, 3 * r, torch.bfloat16, float("nan")),
                      padded(n, r, db_dtype, float("nan")))  # fmt: skip
        entries.append((dy, b, t, dt, db))
        values.append((b_value, t_value))
    dt_db(*map(list, zip(*entries)), 0.75, bf16x3=True, db_scaling=4.0)
    for n, (dy, _, _, dt, db), (b, t) in zip(widths, entries, values):
        name = f"products of dy, exact M={m} N={n} R={r} to {db_dtype}, {len(widths)} entries"
        assert_parts(f"{name}: dt", dt, r, dy, b, 0.75)
        assert_product(f"{name}: dB", db, dy.t(), t, 4.0, db.shape)


def check_of_dy(dt_db, m: int, widths, r: int, dtype, dt_dtype, db_dtype) -> None:
    """dt and dB from one read of dy, an entry for each width."""
    nan = float("nan")
    draws = [
        (
            padded(m, n, dtype),
            padded(n, r, dtype),
            padded(m, r, dtype),
            padded(m, r, dt_dtype, nan),
            padded(n, r, db_dtype, nan),
        )
        for n in widths
    ]
    dt_db(*map(list, zip(*draws)), 0.75, db_scaling=4.0)
    for n, (dy, b, t, dt, db) in zip(widths, draws):
        name = f"products of dy M={m} N={n} R={r} {dtype} to {dt_dtype} and {db_dtype}, {len(widths)} entries"
        assert_product(f"{name}: dt", dt, dy, b, 0.75, dt.shape)
        assert_product(f"{name}: dB", db, dy.t(), t, 4.0, db.shape)


def cases():
    return itertools.product(FORMS, ROUNDING, (False, True))


def check_all(ops, shapes, counts=ENTRIES) -> int:
    count = 0
    for (form, dtype, to_float), entries, p in itertools.product(cases(), counts, DROPOUTS):
        if p and form == "down, a turned":
            continue  # is a product of dy, which no mask is over
        groups = [[shape] for shape in shapes] if entries == 1 else [[shapes[i % len(shapes)] for i in range(entries)]]
        for group in groups:
            check(ops, group, form, dtype, torch.float32 if to_float else dtype, hopper=True, p=p)
            count += 1
    torch.cuda.synchronize()
    return count


def check_all_of_dy(dt_db, tokens, widths, ranks) -> int:
    count = 0
    for m, n, r, dtype in itertools.product(tokens, widths, ranks, ROUNDING):
        for outs in ((dtype, dtype), (dtype, torch.float32), (torch.float32, torch.float32)):
            check_of_dy(dt_db, m, n, r, dtype, *outs)
            count += 1
    torch.cuda.synchronize()
    return count


def exact_lists(shapes):
    """Each shape alone, and lists of ranks that are multiples of their least, one of more than a launch holds."""
    yield from ([shape] for shape in shapes)
    multiples = [(m, c, r) for m, c, r in shapes if r % 16 == 0] + [(64, 96, 16)]
    yield multiples
    yield (multiples * 9)[:9]


def check_all_exact(ops, shapes, of_dy) -> int:
    count = 0
    for form, group, p in itertools.product(FORMS, list(exact_lists(shapes)), DROPOUTS):
        if p and form == "down, a turned":
            continue  # as above
        check_exact(ops, group, form, p)
        count += 1
    for m, n, r, db_dtype in itertools.product(*of_dy, (torch.bfloat16, torch.float32)):
        if r <= 32:
            check_exact_of_dy(ops.dt_db, m, n, r, db_dtype)
            count += 1
    torch.cuda.synchronize()
    return count


def report_of_dy(ops, tokens, groups, ranks) -> None:
    """dt and dB of a group with float32 adapters: by the library, by the skinny kernels for Hopper, from one read."""
    randn = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    print("products of dy, us by the library, the kernels for Hopper, from one read")
    for m, widths, r in itertools.product(tokens, groups, ranks):
        inputs = []
        for _ in range(min(8, 1 + CACHE // (2 * m * sum(widths)))):
            dys, bs, ts = [randn(m, n) for n in widths], [randn(n, r) for n in widths], [randn(m, r) for _ in widths]
            dts = [torch.empty_like(t) for t in ts]
            inputs.append((dys, bs, ts, dts, [torch.empty_like(b, dtype=torch.float32) for b in bs]))

        def library(dys, bs, ts, dts, dbs):
            for dy, b, t, dt in zip(dys, bs, ts, dts):
                torch.mm(dy, b, out=dt)
                torch.mm(dy.t(), t, out_dtype=torch.float32)

        def hopper(dys, bs, ts, dts, dbs):
            ops.skinny(dys, [b.t() for b in bs], dts, 1.0, False, True)
            ops.skinny(dys, ts, dbs, 1.0, True, True)

        one = lambda *lists: ops.dt_db(*lists, 1.0)  # noqa: E731
        times = medians({"native": library, "hopper": hopper, "one read": one}, inputs)
        cells = "  ".join(f"{name} {time:6.1f}" for name, time in times.items())
        print(f"M={m:5} N={'+'.join(map(str, widths)):14} R={r:3}  {cells}", flush=True)


def report(skinny, tokens, widths, ranks, dropouts=(0.0, 0.1)) -> None:
    randn = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    to = torch.empty_like(source)
    copied = medians({"copy": lambda: to.copy_(source)}, [()])["copy"]
    rate = 2 * source.numel() / copied
    print(f"copy {rate / 1e6:.2f} TB/s; us of the floor, the library, the kernels of skinny.cu, those for Hopper")
    seed = torch.ones(1, device="cuda", dtype=torch.int64)
    for m, c, r, p, form in itertools.product(tokens, widths, ranks, dropouts, FORMS[:3]):
        if p and form == "down, a turned":
            continue
        across, mask = form == "across", (seed, p) if p else ()
        inputs = []
        for _ in range(min(16, 1 + CACHE // (2 * m * c))):
            other = randn(m, r) if across else randn(c, r).t() if "turned" in form else randn(r, c)
            out = torch.empty(
                (c, r) if across else (m, r), device="cuda", dtype=torch.float32 if across else torch.bfloat16
            )
            inputs.append((randn(m, c), other, out))
        contenders = {"hopper": lambda x, other, out: skinny([x], [other], [out], 1.0, across, True, *mask)}
        if not p and across:
            contenders["native"] = lambda x, t, out: torch.mm(x.t(), t, out_dtype=torch.float32)
        elif not p:
            contenders["native"] = lambda x, a, out: torch.mm(x, a.t(), out=out)
        if form != "down, a turned":
            contenders["skinny"] = lambda x, other, out: skinny([x], [other], [out], 1.0, across, False, *mask)
        times = medians(contenders, inputs)
        floor = 2 * m * c / rate
        cells = "  ".join(f"{name} {times[name]:6.1f}" for name in ("native", "skinny", "hopper") if name in times)
        name = form + (", masked" if p else "")
        print(f"{name:15} {m:6} {c:6} {r:4}  floor {floor:6.1f}  {cells}  {times['hopper'] / floor:.2f}x", flush=True)


def main() -> None:
    lora_fused, sanitize = begin(__doc__, hopper="skinny")
    ops = lora_fused._ops.ops
    skinny = ops.skinny
    print(f"skinny: {check_all(ops, SMALL)} small cases right", flush=True)
    print(f"products of dy: {check_all_of_dy(ops.dt_db, *SMALL_OF_DY)} small cases right", flush=True)
    print(f"exact: {check_all_exact(ops, SMALL, SMALL_OF_DY)} small cases right", flush=True)
    if sanitize:
        return
    print(f"exact: {check_all_exact(ops, LARGER, LARGER_OF_DY)} larger cases right", flush=True)
    print(f"products of dy: {check_all_of_dy(ops.dt_db, *LARGER_OF_DY)} larger cases right", flush=True)
    report_of_dy(ops, (2048, 4096, 8192), ((4096,), (4096, 1024, 1024), (14336, 14336)), (16, 32, 64))
    print(f"skinny: {check_all(ops, LARGER)} larger cases right", flush=True)
    x, a, t = draw(128, 256, 32, "down", torch.bfloat16, torch.bfloat16)
    host = host_microseconds(lambda: skinny([x], [a], [t], 1.0, False, True))
    print(f"skinny: {host:.1f} us of host time, the dispatcher's included")
    report(skinny, (256, 1024, 2048, 4096, 8192), (1024, 4096, 14336), (32, 96))


if __name__ == "__main__":
    main()
