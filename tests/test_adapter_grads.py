"""dA and dB beside dx, on the GPUs that have it: scripts/check_adapter_grads.py says what is compared."""

import pathlib
import sys

import pytest
from helpers.hopper import HOPPER_ALONE

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "scripts"))

import check_adapter_grads as checks

pytestmark = HOPPER_ALONE
each_case = pytest.mark.parametrize("case", checks.CHECKED, ids=("linears", "MLP"))
each_kind = pytest.mark.parametrize("kind", checks.KINDS)


@each_case
@each_kind
@pytest.mark.parametrize("tokens", (2048, 4096))
def test_as_one_after_another(ops, case, kind, tokens):
    checks.check_as_one_after_another(ops, tokens, case, kind, beside=checks.is_expected(case, kind, tokens))


@each_case
@each_kind
def test_memory_is_not_waited_for(ops, case, kind):
    checks.check_memory_written_over(ops, 4096, case, kind)


@each_case
@each_kind
def test_in_graphs(ops, case, kind):
    checks.check_graphs(ops, 4096, case, kind)


@each_kind
def test_many_at_a_time(ops, kind):
    checks.check_many(ops, 4096, kind)
