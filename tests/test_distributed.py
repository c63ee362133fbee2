"""Two processes: DistributedDataParallel, FSDP2 (`fully_shard`) and FSDP1, with and without mixed precision and
checkpointing."""

import functools
import os
import pathlib
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
import transformers
from kernels import Mode, get_local_kernel, kernelize
from peft import LoraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORLD, STEPS = 2, 3
FLAT = "fsdp1, flat parameters"  # as PEFT's documentation sets it up: each matrix of an adapter is wrapped by itself
# wrapper, kernelized before it, DoRA, checkpointing, parameters in bfloat16
CASES = (
    ("ddp", True, False, False, False),
    ("ddp", False, True, True, False),
    ("fsdp2", True, False, False, False),
    ("fsdp2", False, True, True, False),
    ("fsdp2", False, False, True, True),
    ("fsdp1", True, True, False, False),
    ("fsdp1", False, False, True, True),
    (FLAT, True, False, False, False),
    (FLAT, False, False, True, False),
)


def llama(dora: bool, checkpointing: bool):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, use_cache=False,
    )  # fmt: skip
    options = dict(r=4, use_dora=dora, init_lora_weights=False, target_modules=LINEARS)
    model = get_peft_model(transformers.LlamaForCausalLM(config), LoraConfig(**options)).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    return model


def wrapped(model, wrapper: str, bf16: bool):
    if wrapper == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if wrapper in ("fsdp1", FLAT):
        whole_layers = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=fsdp_auto_wrap_policy(model) if wrapper == FLAT else whole_layers,
            use_orig_params=wrapper != FLAT,
            mixed_precision=MixedPrecision(param_dtype=torch.bfloat16) if bf16 else None,
            device_id=torch.device("cpu"),
        )
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def trained(model, case, rank: int, fuse):
    """Losses of some steps; the model is kernelized by `fuse`, before it is wrapped or after."""
    wrapper, before, _, _, bf16 = case
    if before:
        fuse(model)
    outer = wrapped(model, wrapper, bf16)
    if not before:
        fuse(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(10 * step + rank)
        ids = torch.randint(0, 64, (2, 7))
        loss = outer(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def compare(rank: int, build: pathlib.Path, port: int):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "LlamaDecoderLayer"  # of PEFT's policy
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    lora_fused = get_local_kernel(build)
    functional, counts = lora_fused.functional, {}
    for name in ("compute_group", "compute_gated"):

        def counted(*args, own=getattr(functional, name), name=name, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return own(*args, **kwargs)

        setattr(functional, name, counted)

    def fuse(model):
        with lora_fused.use_peft_layers():
            kernelize(model, mode=Mode.TRAINING, device="cpu")

    for case in CASES:
        expected = trained(llama(*case[2:4]), case, rank, lambda model: None)
        counts.clear()
        model = llama(*case[2:4])
        losses = trained(model, case, rank, fuse)
        tolerance = 2e-2 if case[4] else 1e-5
        torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{case}: {text}")
        if case[0] == FLAT:
            assert counts == {}
            assert not any(row.fused for row in lora_fused.explain(model))
            continue
        # q, k and v, o; the MLP. Two layers a step.
        assert counts.get("compute_group", 0) >= 2 * 2 * STEPS, (case, counts)
        assert counts.get("compute_gated", 0) >= 2 * STEPS, (case, counts)
        if case[0] != "ddp":  # at rest
            reasons = {row.reason for row in lora_fused.explain(model)}
            assert all(reason and "shard" in reason for reason in reasons), reasons
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_training_as_with_peft(lora_fused):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    build = pathlib.Path(lora_fused.__file__).resolve().parent.parent
    processes.spawn(compare, args=(build, port), nprocs=WORLD)
