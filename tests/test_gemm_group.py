"""The sums of a group in one launch, on the GPUs that have it: scripts/check_gemm_group.py says what is compared."""

import pathlib
import sys

import pytest
import torch
from helpers.hopper import HOPPER_ALONE

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "scripts"))

import check_gemm_group

pytestmark = HOPPER_ALONE


@pytest.mark.parametrize("shape", check_gemm_group.SMALL + check_gemm_group.LARGER, ids=str)
@pytest.mark.parametrize("direction", check_gemm_group.DRAWS)
@pytest.mark.parametrize("dtype", check_gemm_group.ROUNDING, ids=str)
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
def test_as_in_float64(ops, shape, direction, dtype, bias):
    check_gemm_group.check(ops, direction, *shape, dtype, bias, zeros=bias)


def test_groups_of_layers(lora_fused):
    check_gemm_group.check_layers(lora_fused)


def test_many_at_a_time(ops):
    check_gemm_group.stress(ops, 200)


def test_in_graphs(ops):
    check_gemm_group.check_graphs(ops, replays=5)


def call(direction="forward", m=200, k=64, members=((64, 8), (32, 16)), dtype=torch.bfloat16):
    return check_gemm_group.DRAWS[direction](m, k, members, dtype, bias=False)


def with_a_row_less(values):
    return [values[0][1:], *values[1:]]


REFUSED = {
    "float32": lambda: call(dtype=torch.float32),
    "a rank of 12": lambda: call(members=((64, 12),)),
    "ranks of 136": lambda: call(members=((64, 136),)),
    "four outputs": lambda: call(members=((64, 8),) * 4),
    "N of 36": lambda: call(members=((36, 8),)),
    "t of fewer rows": lambda: call()._replace(t=with_a_row_less(call().t)),
    "x of fewer rows": lambda: call()._replace(x=with_a_row_less(call().x)),
    "an A of other columns": lambda: call()._replace(other=call(k=128).other),
    "outputs of fewer rows": lambda: call()._replace(out=with_a_row_less(call().out)),
    "more made than there are": lambda: call()._replace(made=[3, 1]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_does_not_serve(ops, case):
    given = REFUSED[case]()
    with pytest.raises(RuntimeError, match="gemm_group: not for"):
        ops.gemm_group(*given)
    assert all(value.isnan().all() for value in check_gemm_group.results(given))


@pytest.mark.parametrize(
    "zeros, said", ((torch.int32, "at least 4"), (torch.float32, "expected zeros in int32")), ids=("few", "float32")
)
def test_refuses_other_zeros(ops, zeros, said):
    given = call(direction="backward")
    with pytest.raises(RuntimeError, match=said):
        ops.gemm_group(*given, zeros=torch.zeros(2, device="cuda", dtype=zeros))


def test_refuses_lists_of_different_lengths(ops):
    given = call()
    with pytest.raises(RuntimeError, match="gemm_group: lists of different lengths"):
        ops.gemm_group(*given._replace(scalings=[]))
    with pytest.raises(RuntimeError, match="segments or made of output 1"):
        ops.gemm_group(*given._replace(segments=[2, 3]))
