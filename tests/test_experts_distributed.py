"""Adapted experts in two processes, against PEFT in the same setup: DistributedDataParallel, and FSDP2 of the decoder
layers and of the experts themselves."""

import pathlib
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers.experts import counted, explain, model_of
from helpers.process_pair import STEPS, Pair, trained
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard

pytestmark = [
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
    ),
    pytest.mark.xdist_group("distributed"),
]
LAYERS = 2


class Case(NamedTuple):
    """wrapper: as `process_pair.wrapped` has it. before: kernelized before it is wrapped. sharded: the experts
    module of each layer is sharded by itself, too."""

    wrapper: str
    before: bool = False
    sharded: bool = False
    checkpointing: bool = False
    bf16: bool = False  # of `wrapped`

    def __str__(self):
        return ", ".join([self.wrapper, *(name for name in self._fields[1:] if getattr(self, name))])


CASES = (
    Case("ddp", before=True),
    Case("ddp", checkpointing=True),
    Case("fsdp2", before=True),
    Case("fsdp2", checkpointing=True),
    Case("fsdp2", sharded=True),
)


def mixture(case: Case) -> nn.Module:
    torch.manual_seed(0)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(
        model_of("qwen3_moe", torch.float32), LoraConfig(r=3, target_modules=["q_proj"], target_parameters=names)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    if case.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    if case.sharded:
        for layer in model.base_model.model.model.layers:
            fully_shard(layer.mlp.experts.get_base_layer())
    return model.train()


def compare(lora_fused, counts: dict, case: Case, rank: int):
    """PEFT's losses, how often experts were computed, and what `explain` says."""
    model = mixture(case)

    def fuse(model):
        with lora_fused.use_peft_layers():
            kernelize(model, mode=Mode.TRAINING, device="cpu")

    with counted(lora_fused) as calls:
        if case.sharded:  # PEFT cannot train that, and so it is said
            for each, make in ((mixture(case), lambda model: None), (model, fuse)):
                with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
                    trained(each, case, rank, make)
        else:
            losses = trained(model, case, rank, fuse)
            expected = trained(mixture(case), case, rank, lambda model: None)
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
            assert losses[-1] != losses[0]
    rows = [row for row in explain(lora_fused, model) if "experts" in row.module]
    assert len(rows) == 2 * LAYERS
    if case.sharded:
        assert not calls and all("the experts module has hooks" in row.reason for row in rows), str(rows)
        return
    assert len(calls) == LAYERS * STEPS * (2 if case.checkpointing else 1)
    assert all(row.fused and row.last == "fused" for row in rows), str(rows)


@pytest.fixture(scope="module")
def pair(lora_fused):
    pair = Pair(pathlib.Path(lora_fused.__file__).resolve().parent.parent, compare)
    yield pair
    pair.stop()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_as_with_peft(pair, case):
    pair.run(case)
