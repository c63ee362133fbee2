"""Two processes: DistributedDataParallel, FSDP2 (`fully_shard`) and FSDP1, with and without mixed precision and
checkpointing."""

import contextlib
import functools
import importlib.util
import pathlib
import types
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import transformers
from helpers.cases import LINEARS
from helpers.kernelizing import explain, ours_in
from helpers.process_pair import FLAT, STEPS, Pair, trained
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer

pytestmark = [
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
    ),
    pytest.mark.xdist_group("distributed"),  # they share two processes
]


class Case(NamedTuple):
    """before: kernelized before it is wrapped; bf16: parameters in bfloat16; four_bit: an NF4 base, stored as
    float32."""

    wrapper: str
    before: bool = False
    dora: bool = False
    checkpointing: bool = False
    bf16: bool = False
    four_bit: bool = False

    def __str__(self):
        return ", ".join([self.wrapper, *(name for name in self._fields[1:] if getattr(self, name))])


CASES = (
    Case("ddp", before=True),
    Case("ddp", dora=True, checkpointing=True),
    Case("fsdp2", before=True),
    Case("fsdp2", dora=True, checkpointing=True),
    Case("fsdp2", checkpointing=True, bf16=True),
    Case("fsdp2", checkpointing=True, four_bit=True),
    Case("fsdp1", before=True, dora=True),
    Case("fsdp1", checkpointing=True, bf16=True),
    Case("fsdp1", before=True, dora=True, checkpointing=True, four_bit=True),
    Case(FLAT, before=True),
    Case(FLAT, checkpointing=True),
)


def llama(case: Case):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, use_cache=False,
    )  # fmt: skip
    options = dict(r=4, use_dora=case.dora, init_lora_weights=False, target_modules=LINEARS)
    base = transformers.LlamaForCausalLM(config)
    if case.four_bit:
        from helpers import quantized

        make = functools.partial(quantized.four_bit, compute=torch.float32, storage=torch.float32)
        quantized.replace(base, make, LINEARS)
    model = get_peft_model(base, LoraConfig(**options)).train()
    if case.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    return model


@contextlib.contextmanager
def entered(calls):
    """PEFT's own forwards that are entered, module by module."""
    check = LoraLayer._check_forward_args

    def counted(self, *args, **kwargs):
        calls.append(self)
        return check(self, *args, **kwargs)

    LoraLayer._check_forward_args = counted
    try:
        yield
    finally:
        LoraLayer._check_forward_args = check


def logits_of(model):
    return model(input_ids=torch.arange(14).view(2, 7)).logits


def assert_restored(lora_fused, model):
    """PEFT's own forward is all that runs, sharded or not."""
    own_calls = []
    lora_fused.restore(model)
    with entered(own_calls), lora_fused.record() as calls:
        logits_of(model).sum().backward()
    assert len({id(module) for module in own_calls}) == 14 and calls.fused == calls.own == 0


def assert_merged(lora_fused, model, theirs, unload):
    """Merged, both compute the same, with what is left of our forwards and without. A sharded model is not unloaded:
    its root, which gathers, would be gone."""
    for each in (model, theirs):
        each.merge_adapter()
    ours, plain = (each.merge_and_unload() if unload else each for each in (model, theirs))
    expected = logits_of(plain)
    torch.testing.assert_close(logits_of(ours), expected, rtol=1e-4, atol=1e-5)
    with lora_fused.record() as calls:
        torch.testing.assert_close(logits_of(lora_fused.restore(ours)), expected, rtol=1e-4, atol=1e-5)
    assert calls.fused == calls.own == 0 and ours_in(lora_fused, ours) == []


def calls_expected(case: Case) -> int:
    """Of four linears and the MLP in two layers, again where a checkpoint computes them again."""
    return STEPS * 2 * 5 * (1 + case.checkpointing)


def compare(lora_fused, counts: dict, case: Case, rank: int):
    """The same losses as with PEFT alone, what was computed, and what `explain` says before the first call and
    after."""
    theirs = llama(case)
    expected = trained(theirs, case, rank, lambda model: None)
    counts.clear()
    model, said, own_calls, logs, callback = llama(case), [], [], {}, lora_fused.LoraFusedCallback()

    def fuse_and_ask(given):
        if case.before:
            with lora_fused.use_peft_layers():
                kernelize(given, mode=Mode.TRAINING, device="cpu")
        else:  # as a trainer calls it, with the model that it has wrapped
            callback.on_train_begin(None, None, None, model=given)
        said.extend(explain(lora_fused, model))

    with entered(own_calls), lora_fused.record() as calls:
        losses = trained(model, case, rank, fuse_and_ask)
    callback.on_log(None, types.SimpleNamespace(log_history=[]), None, logs=logs, model=model)
    assert logs == ({} if case.before else {"lora_fused": float(case.wrapper != FLAT)})
    tolerance = 2e-2 if case.bf16 else 1e-5
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    rows = explain(lora_fused, model)
    assert len(rows) == len(said) == 14
    assert all(row.fused == (row.last == "fused") != bool(own_calls) for row in rows), str(rows)
    if case.wrapper == FLAT:
        assert counts == {} and calls.fused == 0 < calls.own
        return
    assert (calls.fused, calls.own) == (calls_expected(case), 0), str(calls)
    assert all(row.fused for row in said) or case.wrapper == "fsdp1", [row.reason for row in said]
    # q, k and v, o; the MLP. Two layers a step.
    assert counts.get("compute_group", 0) >= 2 * 2 * STEPS, counts
    assert counts.get("compute_gated", 0) >= 2 * STEPS, counts
    if case.wrapper in ("ddp", "fsdp2"):
        if case.before:
            assert_merged(lora_fused, model, theirs, unload=case.wrapper == "ddp")
        else:
            assert_restored(lora_fused, model)


@pytest.fixture(scope="module")
def pair(lora_fused):
    pair = Pair(pathlib.Path(lora_fused.__file__).resolve().parent.parent, compare)
    yield pair
    pair.stop()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_as_with_peft(pair, case):
    if case.four_bit and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    pair.run(case)
