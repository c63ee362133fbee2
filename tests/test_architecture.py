"""Whose kernels run: what the ops `architecture` and `set_architecture` say and take."""

import contextlib
import re

import pytest
import torch
from helpers.native_ops import GROUPS, check_group

pytestmark = pytest.mark.own_architecture


@pytest.fixture
def ops(lora_fused):
    yield lora_fused._ops.ops
    lora_fused._ops.ops.set_architecture("")


def possible() -> list[str]:
    """What every GPU of this machine can run."""
    if not torch.cuda.is_available():
        return []
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return ["sm75"] + ["sm80"] * (min(capabilities) >= (8, 0)) + ["sm90"] * (set(capabilities) == {(9, 0)})


def test_a_tensor_on_the_cpu(ops):
    assert ops.architecture(torch.zeros(1)) == "cpu"
    for name in possible():
        ops.set_architecture(name)
        assert ops.architecture(torch.zeros(1)) == "cpu"


@pytest.mark.parametrize("name", ("sm70", "cpu", "SM80", "sm90 ", "sm100"))
def test_an_unknown_architecture_is_an_error_that_says_which_are_possible(ops, device, name):
    before = ops.architecture(torch.zeros(1, device=device))
    expected = ", ".join(f'"{known}"' for known in ["", *possible()])
    with pytest.raises(RuntimeError, match=rf'"{name}" is not .*, expected one of {re.escape(expected)}(\n|$)'):
        ops.set_architecture(name)
    assert ops.architecture(torch.zeros(1, device=device)) == before


@pytest.mark.parametrize("name", ("sm75", "sm80", "sm90"))
def test_what_no_gpu_of_the_process_can_run_is_an_error(ops, name):
    if name in possible():
        ops.set_architecture(name)
        assert ops.architecture(torch.zeros(1, device="cuda")) == name
        ops.set_architecture("")
        assert ops.architecture(torch.zeros(1, device="cuda")) == possible()[-1]
    else:
        with pytest.raises(RuntimeError, match=f'"{name}" is not what this process can run'):
            ops.set_architecture(name)


def test_python_asks_the_library(lora_fused, device):
    """And asks again after it was set."""
    native, select = lora_fused.backends.native, lora_fused.backends.select
    own = native.architecture(torch.device(device))
    try:
        for name in possible():
            native.set_architecture(name)
            assert native.architecture(torch.device(device)) == name
            assert select.is_hopper(torch.device(device)) == (name == "sm90")
            assert select.is_old(torch.device(device)) == (name == "sm75")
    finally:
        native.set_architecture("")
    assert native.architecture(torch.device(device)) == own == (possible() or ["cpu"])[-1]


@pytest.mark.parametrize("name", ["", *possible()])
def test_results_are_right_whatever_is_set(lora_fused, ops, device, name):
    """On a GPU the kernels that the dispatch table then chooses; on the CPU what there is."""
    ops.set_architecture(name)
    check_group(lora_fused, device, 300, 1024, GROUPS["masks"], torch.bfloat16, torch.float32)
    has_norms = name != "sm75" or device == "cpu"  # before 8.0 a GPU has no op of DoRA's norm
    with contextlib.nullcontext() if has_norms else pytest.raises(RuntimeError, match="8.0 or later"):
        check_group(lora_fused, device, 300, 1024, GROUPS["mixed"], torch.bfloat16, torch.float32)
