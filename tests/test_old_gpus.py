"""GPUs before compute capability 8.0, as a T4 is: bfloat16 is PEFT's own forward there, and what is fused runs without
the kernels that need 8.0. Rehearsed on the CPU by saying that tensors are on such a GPU."""

import types

import pytest
import torch
from helpers.cases import DEVICE, Case, peft_linear
from helpers.embeddings import Case as EmbeddingCase, peft_embedding
from helpers.experts import adapt, block_of, explain as explain_experts, kernelized as kernelized_experts
from helpers.kernelizing import assert_peft_runs, explain, kernelized
from helpers.mlps import glu
from helpers.native_ops import GROUPS, check_group

pytestmark = pytest.mark.usefixtures("on_device")
REASON = "GPU of compute capability 7.5: bfloat16 is computed from 8.0 on"
CASE = Case((6,), 32, 24, 4)


@pytest.fixture
def capability(lora_fused, monkeypatch):
    """The two GPUs that this process is told of; the first is the old one."""
    native, found = lora_fused.backends.native, [(7, 5), (8, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[getattr(device, "index", device)])
    monkeypatch.setattr(native, "architecture", lambda device: "sm75" if found[device.index] < (8, 0) else "sm80")
    monkeypatch.setattr(native, "is_architecture_forced", False)
    monkeypatch.setattr(native, "may_be_old", True)
    return found


@pytest.fixture
def old(lora_fused, monkeypatch):
    """Every tensor is on an old GPU."""
    select = lora_fused.backends.select

    def reason(x, *dtypes):
        return REASON if torch.bfloat16 in dtypes else None

    monkeypatch.setattr(lora_fused.backends.native, "may_be_old", True)
    monkeypatch.setattr(select, "is_old", lambda device: True)
    monkeypatch.setattr(select, "old_gpu_reason", reason)
    return select


def on(index):
    device = torch.device("cuda", index)
    return types.SimpleNamespace(is_cuda=True, device=device)


def test_the_reason_names_the_gpu_and_what_is_needed(lora_fused, capability):
    select, native = lora_fused.backends.select, lora_fused.backends.native
    assert select.old_gpu_reason(on(0), torch.float16, torch.bfloat16) == REASON
    assert select.old_gpu_reason(on(0), torch.float16, torch.float32) is None
    assert select.old_gpu_reason(on(1), torch.bfloat16) is None
    assert native.may_be_old  # one of both is
    assert select.is_old(torch.device("cuda", 0)) and not select.is_old(torch.device("cuda", 1))
    assert not select.is_old(torch.device("cpu"))


def test_nothing_is_asked_again_where_no_gpu_is_old(lora_fused, capability):
    select, native = lora_fused.backends.select, lora_fused.backends.native
    capability[0] = (9, 0)
    assert select.old_gpu_reason(torch.ones(1, device="cpu"), torch.bfloat16) is None and native.may_be_old
    assert select.old_gpu_reason(on(0), torch.bfloat16) is None
    assert not native.may_be_old and not select.is_old(torch.device("cuda", 0))


@pytest.mark.parametrize("base, adapter, fused", (
    (torch.bfloat16, torch.bfloat16, False),
    (torch.bfloat16, torch.float32, False),
    (torch.float32, torch.bfloat16, False),  # PEFT casts x for the adapter
    (torch.float32, torch.float32, True),
), ids=str)  # fmt: skip
def test_linears(lora_fused, old, base, adapter, fused):
    model, _ = peft_linear(CASE, base, adapter)
    x = torch.randn(6, 32, dtype=base)
    if fused:
        assert [row.fused for row in explain(lora_fused, kernelized(lora_fused, model))] == [True]
    else:
        assert_peft_runs(lora_fused, model, REASON, x)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(lora_fused, old, dtype):
    """Its dtype is what is computed in, whatever the parameters have."""
    model, _ = peft_linear(CASE, torch.float32, torch.bfloat16 if dtype == torch.float16 else torch.float32)
    ours, x = kernelized(lora_fused, model), torch.randn(6, 32)
    with torch.autocast(DEVICE, dtype=dtype):
        y, theirs = ours(x), model(x)
        (row,) = lora_fused.explain(ours)
    assert row.last == ("fused" if dtype == torch.float16 else REASON)
    torch.testing.assert_close(y, theirs, rtol=1e-2, atol=1e-2)


def test_gated_mlps(lora_fused, old):
    model = kernelized(lora_fused, glu(torch.bfloat16))
    model(torch.randn(3, 32, dtype=torch.bfloat16))
    rows = explain(lora_fused, model)
    assert len(rows) == 3 and {row.last for row in rows} == {REASON}


@pytest.mark.parametrize("base, adapter", ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)), ids=str)
def test_embeddings(lora_fused, old, base, adapter):
    model = peft_embedding(EmbeddingCase((7,), 33, 16, 4), base, adapter, DEVICE)
    assert_peft_runs(lora_fused, model, REASON, torch.arange(7))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_experts(lora_fused, old, dtype):
    model = kernelized_experts(lora_fused, adapt(block_of("mixtral", dtype), adapter_dtype=dtype), DEVICE)
    model(torch.randn(2, 5, 32, dtype=dtype))
    said = {row.last for row in explain_experts(lora_fused, model)}
    assert (REASON in said) == (dtype == torch.bfloat16) and ("fused" in said) == (dtype == torch.float32)


@pytest.mark.parametrize("group", ("mixed", "masks"))
def test_groups_are_right_with_norms_of_the_library(lora_fused, old, group, device, monkeypatch):
    """The op's norm, which needs 8.0 on a GPU, is not run: not by name, and not in a forward, which is given
    mag_norm_scales in place of magnitudes."""
    native, given = lora_fused.backends.native, []
    for name in ("row_norm", "dora_scales"):
        monkeypatch.setattr(native, name, lambda *_: pytest.fail("a kernel that needs 8.0"))
    forward = native.lora_forward
    monkeypatch.setattr(
        native, "lora_forward", lambda x, operands, *rest: given.append(operands) or forward(x, operands, *rest)
    )
    check_group(lora_fused, device, 30, 64, GROUPS[group], torch.float32, torch.float32)
    assert given and all(magnitude is None for operands in given for magnitude in operands[4::6])
    assert any(scale is not None for operands in given for scale in operands[5::6]) == any(m[3] for m in GROUPS[group])


def test_no_triton_and_no_op_that_needs_more(lora_fused, old, monkeypatch):
    select, specs = lora_fused.backends.select, lora_fused.specs
    monkeypatch.setattr(select, "triton_is_there", lambda: True)
    monkeypatch.setattr(select.native_embedding, "fits", lambda table: True)
    monkeypatch.setattr(select, "is_gpu", lambda device: True)
    monkeypatch.setattr(select, "_WITH_MEMORY", (types.SimpleNamespace,))  # which stands for tensors
    monkeypatch.setattr(select.device_config, "of", lambda device: select.device_config.DeviceConfig(0, 0, 0))
    x = types.SimpleNamespace(is_cuda=True, dtype=torch.float16, device=torch.device("cuda", 0))
    assert select.pointwise(x) is select.reference
    assert select.choose(x.device, x.dtype, specs.NativePath(False), lambda: 10**9) == select.NATIVE
    assert select.choose_embedding(specs.EmbeddingOperands(x, x, x), 5) == select.REFERENCE
    experts = types.SimpleNamespace(weight=types.SimpleNamespace(is_cuda=True, dtype=torch.float16, device=x.device))
    assert select.choose_experts(experts, experts, 8) == select.REFERENCE
