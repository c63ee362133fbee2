"""Skinny products in one launch, on the GPUs that have it: scripts/check_skinny.py says what is compared."""

import itertools
import pathlib
import sys
import threading

import pytest
import torch
from helpers.hopper import HOPPER_ALONE

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "scripts"))

import check_skinny

pytestmark = HOPPER_ALONE


@pytest.fixture
def skinny(ops):
    return ops.skinny


@pytest.mark.parametrize("form", check_skinny.FORMS)
@pytest.mark.parametrize("dtype", check_skinny.ROUNDING, ids=str)
@pytest.mark.parametrize("to_float", (False, True), ids=("own", "float32"))
@pytest.mark.parametrize("shape", check_skinny.SMALL + check_skinny.LARGER, ids=str)
@pytest.mark.parametrize("p", check_skinny.DROPOUTS)
def test_as_in_float64(ops, shape, form, dtype, to_float, p):
    if p and form == "down, a turned":
        pytest.skip("of dy, which no mask is over")
    check_skinny.check(ops, [shape], form, dtype, torch.float32 if to_float else dtype, hopper=True, p=p)


@pytest.mark.parametrize("form", check_skinny.FORMS)
@pytest.mark.parametrize("hopper", (True, False))
@pytest.mark.parametrize("p", check_skinny.DROPOUTS)
def test_entries_of_many_shapes(ops, form, hopper, p):
    """More than a launch holds; the kernels for any GPU share tokens and take operands with contiguous rows."""
    shapes = check_skinny.SMALL + check_skinny.LARGER[:3]
    if not hopper:
        if form == "down, a turned":
            pytest.skip("not theirs")
        shapes = [(200, c, r) for _, c, r in shapes] * 2
    check_skinny.check(ops, shapes, form, torch.bfloat16, torch.bfloat16, hopper, p)


@pytest.mark.parametrize("dtype", check_skinny.ROUNDING, ids=str)
@pytest.mark.parametrize("dt_float, db_float", ((False, False), (False, True), (True, True)))
@pytest.mark.parametrize("m, widths, r", [
    (m, widths, r)
    for tokens, groups, ranks in (check_skinny.SMALL_OF_DY, check_skinny.LARGER_OF_DY)
    for m, widths, r in itertools.product(tokens, groups, ranks)
])  # fmt: skip
def test_both_products_of_dy_as_in_float64(ops, m, widths, r, dtype, dt_float, db_float):
    outs = (torch.float32 if is_float else dtype for is_float in (dt_float, db_float))
    check_skinny.check_of_dy(ops.dt_db, m, widths, r, dtype, *outs)


@pytest.mark.parametrize("form", check_skinny.FORMS)
@pytest.mark.parametrize("shapes", list(check_skinny.exact_lists(check_skinny.SMALL + check_skinny.LARGER)), ids=str)
@pytest.mark.parametrize("p", check_skinny.DROPOUTS)
def test_exact_products_as_in_float64(ops, form, shapes, p):
    if p and form == "down, a turned":
        pytest.skip("of dy, which no mask is over")
    check_skinny.check_exact(ops, shapes, form, p)


@pytest.mark.parametrize("db_dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("m, widths, r", [
    (m, widths, r)
    for tokens, groups, ranks in (check_skinny.SMALL_OF_DY, check_skinny.LARGER_OF_DY)
    for m, widths, r in itertools.product(tokens, groups, ranks) if r <= 32
])  # fmt: skip
def test_both_exact_products_of_dy_as_in_float64(ops, m, widths, r, db_dtype):
    check_skinny.check_exact_of_dy(ops.dt_db, m, widths, r, db_dtype)


def test_products_of_dy_are_the_same_every_time(ops):
    randn = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()  # noqa: E731
    dy, b, t = randn(5000, 1200), randn(1200, 32), randn(5000, 32)
    runs = []
    for _ in range(3):
        dt, db = torch.empty_like(t), torch.empty_like(b, dtype=torch.float32)
        ops.dt_db([dy], [b], [t], [dt], [db], 1.0)
        runs.append((dt, db))
    for dt, db in runs[1:]:
        assert torch.equal(dt, runs[0][0]) and torch.equal(db, runs[0][1])


def test_in_a_graph_and_as_a_thread_s_first_call(skinny):
    """A replay reads its inputs anew; a thread that has not used the GPU has no context of the driver yet."""
    x, a = torch.randn(300, 256, device="cuda").bfloat16(), torch.randn(32, 256, device="cuda").bfloat16()
    out = torch.empty(300, 32, device="cuda", dtype=torch.bfloat16)
    thread = threading.Thread(target=skinny, args=([x], [a], [out], 1.0, False, True))
    thread.start()
    thread.join()
    torch.testing.assert_close(out, x @ a.t())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        skinny([x], [a], [out], 1.0, False, True)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(out, x @ a.t())


def refused(*, dtype=torch.bfloat16, rank=32, cols=256, shift=0, out=None):
    x = torch.zeros(64 * cols + shift, device="cuda", dtype=dtype)[shift:].view(64, cols)
    a, like = (
        torch.zeros(rank, cols, device="cuda", dtype=dtype),
        torch.zeros(64, rank, device="cuda", dtype=out or dtype),
    )
    return [x], [a], [like], 1.0, False, True


@pytest.mark.parametrize(
    "case",
    (dict(dtype=torch.float32), dict(rank=136), dict(cols=132), dict(shift=4), dict(out=torch.float16)),
    ids=str,
)
def test_refuses_what_it_does_not_serve(skinny, case):
    with pytest.raises(RuntimeError, match="skinny: not for"):
        skinny(*refused(**case))


@pytest.mark.parametrize("across", (True, False))
def test_refuses_a_rest_where_no_load_begins(skinny, across):
    """Four ranks of two bytes from the first: below them the rest of A is served, beside them it is not."""
    x, out = torch.randn(64, 256, device="cuda").bfloat16(), check_skinny.padded(64, 12, torch.bfloat16, float("nan"))
    (beside, _), (below, value) = check_skinny.with_rest(64, 4, True), check_skinny.with_rest(4, 256, False)
    refused = (beside, torch.zeros(256, 4, device="cuda")) if across else (below.t().contiguous().t(), out)
    with pytest.raises(RuntimeError, match="skinny: not for"):
        skinny([x], [refused[0]], [refused[1]], 1.0, across, True, bf16x3=4)
    skinny([x], [below], [out], 1.0, False, True, bf16x3=4)
    check_skinny.assert_parts("four ranks", out, 4, x, value.t(), 1.0)


@pytest.mark.parametrize("case", (dict(rank=72), dict(cols=132), dict(shift=4), dict(dtype=torch.float32)), ids=str)
def test_products_of_dy_refuse_what_they_do_not_serve(ops, case):
    (dy,), (b,), (dt,), *_ = refused(**case)
    t, db = torch.zeros_like(dt), torch.zeros_like(b).t().contiguous()
    with pytest.raises(RuntimeError, match="dt_db: not for"):
        ops.dt_db([dy], [db.clone()], [t], [dt], [db], 1.0)


def test_products_of_dy_name_the_entry_of_other_shapes(ops):
    dy, b, t = (torch.zeros(*shape, device="cuda").bfloat16() for shape in ((64, 128), (128, 16), (64, 16)))
    with pytest.raises(RuntimeError, match="shapes or dtypes of entry 1"):
        ops.dt_db([dy, dy], [b, b], [t, t[:32]], [t, t], [b, b], 1.0)
    with pytest.raises(RuntimeError, match="lists of 1, 2"):
        ops.dt_db([dy], [b, b], [t], [t], [b], 1.0)
