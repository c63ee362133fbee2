"""Sums of products in one launch, on the GPUs that have it: scripts/check_gemm.py says what is compared."""

import pathlib
import sys
import threading

import pytest
import torch
from helpers.hopper import HOPPER_ALONE

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "scripts"))

import check_gemm

pytestmark = HOPPER_ALONE


@pytest.fixture
def gemm(ops):
    return ops.gemm


@pytest.mark.parametrize("shape", check_gemm.SMALL + check_gemm.LARGER, ids=str)
@pytest.mark.parametrize("form", check_gemm.FORMS, ids=lambda form: f"{form[1]}, b {'[N, k]' if form[0] else '[k, N]'}")
@pytest.mark.parametrize("dtype", check_gemm.ROUNDING, ids=str)
def test_as_in_float64(ops, shape, form, dtype):
    check_gemm.check(ops, *shape, *form, dtype)


def operands(m=64, n=128, k=32, dtype=torch.bfloat16):
    randn = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    return [randn(m, k)], [randn(n, k)], randn(m, n)


def test_in_a_graph(gemm):
    """A replay reads its inputs anew."""
    a, b, out = operands()
    gemm(a, b, True, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm(a, b, True, out)
    a[0].normal_()
    graph.replay()
    torch.testing.assert_close(out, a[0] @ b[0].t())


def test_as_a_thread_s_first_call(gemm):
    """A thread that has not used the GPU has no context of the driver yet."""
    a, b, out = operands()
    thread = threading.Thread(target=gemm, args=(a, b, True, out))
    thread.start()
    thread.join()
    torch.testing.assert_close(out, a[0] @ b[0].t())


def single(
    *,
    n=128,
    dtype=torch.bfloat16,
    count=1,
    bias=False,
    mag_norm_scale=False,
    accumulate=False,
    shift=0,
    dropped=None,
    leading=0,
    factor=1.0,
):
    a, b, out = operands(n=n, dtype=dtype)
    if shift:
        a = [torch.zeros(a[0].numel() + shift, device="cuda", dtype=dtype)[shift:].view_as(a[0])]
    vector = torch.ones(n, device="cuda", dtype=dtype) if bias else None
    seed = None if dropped is None else torch.tensor([3], device="cuda")
    mag_norm_scale = torch.ones(n, device="cuda") if mag_norm_scale else None
    return (
        a * count,
        b * count,
        True,
        out,
        vector,
        mag_norm_scale,
        None,
        accumulate,
        seed,
        0.1,
        leading if dropped is None else dropped,
        factor,
    )


REFUSED = {
    "float32": dict(dtype=torch.float32),
    "N of 132": dict(n=132),
    "nine segments": dict(count=9),
    "address of 8 bytes": dict(shift=4),
    "mag_norm_scale without z": dict(mag_norm_scale=True),
    "bias added to out": dict(bias=True, accumulate=True),
    "a mask over nothing": dict(count=2, dropped=0),
    "a mask over all": dict(count=2, dropped=2),
    "leading segments for nothing": dict(count=2, leading=1),
    "a multiple of nothing": dict(count=2, dtype=torch.float16, factor=2.0),
    "a multiple in bfloat16": dict(count=2, leading=1, factor=2.0),
    "a multiple under a mask": dict(count=2, dtype=torch.float16, dropped=1, factor=2.0),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_does_not_serve(gemm, case):
    arguments = single(**REFUSED[case])
    before = arguments[3].clone()
    with pytest.raises(RuntimeError, match="gemm: not for"):
        gemm(*arguments)
    assert torch.equal(arguments[3], before)
