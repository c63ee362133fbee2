"""Two processes that share a model's layers: tensor parallelism as transformers and PEFT do it and as torch does,
expert parallelism, and x that is sharded along its tokens. Where weights or x are sharded PEFT's own forward runs."""

import os
import pathlib
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
import transformers
from helpers.cases import tiny_llama
from helpers.kernelizing import explain
from kernels import Mode, get_local_kernel, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WORLD = 2
PLAN = {f"model.layers.*.{name}": "colwise" for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj")}
PLAN |= {f"model.layers.*.{name}": "colwise" for name in ("self_attn.k_proj", "self_attn.v_proj")}
PLAN |= {f"model.layers.*.{name}": "rowwise" for name in ("self_attn.o_proj", "mlp.down_proj")}
PLAN |= {"model.embed_tokens": "embedding_rowwise"}


def local(value):
    return value.to_local() if isinstance(value, DTensor) else value


def randomise(model):
    """The same values in every process, and in every copy."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                values = 0.3 * torch.randn(parameter.shape, dtype=parameter.dtype)
                if isinstance(parameter, DTensor):
                    values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
                parameter.copy_(values)


def assert_as_peft(lora_fused, make, run):
    """Two passes of a kernelized model and of PEFT's; gives the kernelized one."""
    ours, theirs = make(), make()
    for model in (ours, theirs):
        randomise(model)
    with lora_fused.use_peft_layers():
        kernelize(ours, mode=Mode.TRAINING, device="cpu")
    for _ in range(2):
        for model in (ours, theirs):
            model.zero_grad()
        results = [run(model) for model in (ours, theirs)]
        for result in results:
            local(result).sum().backward()
        torch.testing.assert_close(*map(local, results), rtol=1e-12, atol=1e-12)
        trained = [(n, p, q) for (n, p), q in zip(ours.named_parameters(), theirs.parameters()) if p.requires_grad]
        assert len(trained) >= 4 and any(p.grad is not None for _, p, _ in trained)
        for name, p, q in trained:
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(local(p.grad), local(q.grad), rtol=1e-11, atol=1e-12, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(*(local(run(model)) for model in (ours, theirs)), rtol=1e-12, atol=1e-12)
    return ours


def language_model(folder, **options):
    def make():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options["load"])
        return get_peft_model(model, LoraConfig(r=4, **options["lora"])).train()

    return make


def loss(model):
    ids = torch.arange(14).view(2, 7)
    return model(input_ids=ids, labels=ids).loss


def assert_tensor_parallel(rows, count, part):
    assert len(rows) == count and not any(row.fused for row in rows), str(rows)
    for row in rows:
        if row.module.endswith("embed_tokens"):
            assert "shard" in row.reason, row
        else:
            parts = part, "base_layer"  # whichever PEFT's version hooks first
            assert row.reason.startswith(tuple(f"{each} has a forward of its own" for each in parts)), row
            assert "DTensors" in row.reason, row


def tensor_parallel(lora_fused, folder):
    """transformers' plan, and PEFT's hooks on the adapters of its layers, whose outputs are sharded."""
    lora = dict(target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens"])
    make = language_model(f"{folder}/llama", load=dict(tp_plan=PLAN), lora=lora)
    assert_tensor_parallel(explain(lora_fused, assert_as_peft(lora_fused, make, loss)), 11, "lora_B")


def tensor_parallel_of_inputs(lora_fused, folder):
    """The same of layers whose inputs are sharded; some transformers break that for PEFT, and then so for us."""
    make = language_model(f"{folder}/llama", load=dict(tp_plan=PLAN), lora=dict(target_modules=["o_proj", "down_proj"]))
    ours, theirs = make(), make()
    for model in (ours, theirs):
        randomise(model)
    with lora_fused.use_peft_layers():
        kernelize(ours, mode=Mode.TRAINING, device="cpu")
    assert_tensor_parallel(explain(lora_fused, ours), 4, "lora_A")
    outcomes = []
    for model in (ours, theirs):
        try:
            outcomes.append(loss(model).item())
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def expert_parallel(lora_fused, folder):
    """Attention is whole in every process and fused; experts are shared out and call nothing of ours."""
    config = transformers.distributed.DistributedConfig(tp_size=WORLD, enable_expert_parallel=True)
    lora = dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    load = dict(distributed_config=config, experts_implementation="batched_mm")
    model = assert_as_peft(lora_fused, language_model(f"{folder}/mixtral", load=load, lora=lora), loss)
    rows = explain(lora_fused, model)
    assert len(rows) == 8 and all(row.fused for row in rows), str(rows)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def mlp():
    torch.manual_seed(1)
    model = nn.Sequential()
    model.add_module("mlp", Mlp())
    names = ["gate", "up", "down"]
    return get_peft_model(model.double(), LoraConfig(r=4, target_modules=names), autocast_adapter_dtype=False).train()


def tokens():
    torch.manual_seed(2)
    return torch.randn(4, 16, dtype=torch.float64)


def torchs_tensor_parallel(lora_fused, folder):
    """torch's styles put hooks on the layers that they shard."""
    mesh = init_device_mesh("cpu", (WORLD,))

    def make():
        model = mlp()
        plan = {}
        for name in ("gate", "up"):
            plan |= {f"{name}.base_layer": ColwiseParallel(), f"{name}.lora_B.default": ColwiseParallel()}
        plan |= {"down.base_layer": RowwiseParallel(), "down.lora_A.default": RowwiseParallel()}
        parallelize_module(model.base_model.model.mlp, mesh, plan)
        return model

    rows = explain(lora_fused, assert_as_peft(lora_fused, make, lambda model: model(tokens())))
    assert len(rows) == 3 and not any(row.fused for row in rows), str(rows)
    assert all("has hooks" in row.reason and "DTensors" in row.reason for row in rows), str(rows)


def sharded_tokens(lora_fused, folder):
    """x is sharded along its tokens, as context parallelism has it, on weights that every process has."""
    mesh = init_device_mesh("cpu", (WORLD,))
    x = distribute_tensor(tokens(), mesh, [Shard(0)])
    model = assert_as_peft(lora_fused, lambda: distribute_module(mlp(), mesh), lambda model: model(x))
    rows = explain(lora_fused, model)
    assert len(rows) == 3 and all("is a DTensor" in row.reason for row in rows), str(rows)
    assert isinstance(model(x), DTensor)


def sharded_x_alone(lora_fused, folder):
    """PEFT's error where weights are no DTensors; on a DTensor of the whole x, too."""
    mesh = init_device_mesh("cpu", (WORLD,))
    ours, theirs = mlp(), mlp()
    with lora_fused.use_peft_layers():
        kernelize(ours, mode=Mode.TRAINING, device="cpu")
    assert all(row.fused for row in lora_fused.explain(ours))
    for placement in (Shard(0), Replicate()):
        x, messages = distribute_tensor(tokens(), mesh, [placement]), []
        for model in (ours, theirs):
            with pytest.raises(RuntimeError) as raised:
                model(x)
            messages.append(str(raised.value))
        assert messages[0] == messages[1] and "mixed torch.Tensor and DTensor" in messages[0]


def local_tokens(lora_fused, folder):
    """Each process has tokens of its own as a plain tensor, and gradients are summed: fused, as on one process."""
    x = tokens()
    ours, whole = mlp(), mlp()
    for model in (ours, whole):
        randomise(model)
    with lora_fused.use_peft_layers():
        kernelize(ours, mode=Mode.TRAINING, device="cpu")
    assert all(row.fused for row in lora_fused.explain(ours))
    ours(x.chunk(WORLD)[dist.get_rank()]).square().sum().backward()
    whole(x).square().sum().backward()
    trained = [(p, q) for p, q in zip(ours.parameters(), whole.parameters()) if p.requires_grad]
    assert len(trained) == 6
    for p, q in trained:
        dist.all_reduce(p.grad)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-12)


CASES = (
    tensor_parallel, tensor_parallel_of_inputs, expert_parallel, torchs_tensor_parallel, sharded_tokens,
    sharded_x_alone, local_tokens,
)  # fmt: skip


def run_all(rank: int, build: pathlib.Path, folder: pathlib.Path, port: int):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(WORLD))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    lora_fused = get_local_kernel(build)
    for case in CASES:
        case(lora_fused, folder)
        (folder / f"{case.__name__}.{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_as_peft_in_two_processes(lora_fused, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # transformers gives each process a GPU of its own
    tiny_llama().save_pretrained(tmp_path / "llama")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    build = pathlib.Path(lora_fused.__file__).resolve().parent.parent
    processes.spawn(run_all, args=(build, tmp_path, port), nprocs=WORLD)
    for case in CASES:
        for rank in range(WORLD):
            assert (tmp_path / f"{case.__name__}.{rank}").exists()
