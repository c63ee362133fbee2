"""What only a GPU can show: launches of a layer, CUDA graphs, no synchronisation."""

import collections

import pytest
import torch
from cases import randomise_adapters
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from test_gated import GLU
from torch import nn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BF16, K, ROWS = torch.bfloat16, 512, 256


class Group(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, K, bias=False) for _ in range(3))

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(K, K, bias=False)

    def forward(self, x):
        return (self.proj(x),)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = GLU(K, 2 * K, K, bias=False)

    def forward(self, x):
        return (self.mlp(x),)


def build(lora_fused, make, **config):
    """Kernelized, bf16 base, fp32 adapters, groups settled; x."""
    model = make().to("cuda", BF16)
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    model = get_peft_model(model, LoraConfig(r=16, target_modules=targets, **config)).train()
    randomise_adapters(model, torch.float32)
    lora_fused.register_peft_layers()
    kernelize(model, mode=Mode.TRAINING, device="cuda")
    x = torch.randn(ROWS, K, device="cuda", dtype=BF16, requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            backward(step(model, x), [torch.ones(ROWS, K, device="cuda", dtype=BF16)] * 3)
    torch.cuda.current_stream().wait_stream(side)
    clear(model, x)
    return model, x


def clear(model, x):
    for tensor in (x, *model.parameters()):
        tensor.grad = None


def backward(ys, dys):
    torch.autograd.backward(ys, dys[: len(ys)])


def step(model, x):
    with torch.autocast("cuda", dtype=BF16):
        y = model(x)
    return y


def launches(run):
    """Names of the kernels that `run` launches."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return collections.Counter(name for name in events if not name.startswith(("Memcpy", "Memset")))


# (forward, backward) under autocast, fp32 adapters: the products and what stands between, none more.
LAUNCHES = {
    # conversions 1, t 1, y 3, + t Bᵀ 3; conversions 1, dt 3, dx 4, dA 1, dB 3, conversions 1
    Group: (8, 13),
    # twice conversions and t 4, y 3, + t Bᵀ 3, h 1; down 1 + 1 + 2 + 1 + 1 + 1, the activation 1, gate and up
    # 1 + 2 + 3 + 1 + 2 + 1
    MLP: (11, 18),
    Single: (4, 7),
}


@pytest.mark.parametrize("make", LAUNCHES)
def test_launches_do_not_grow(lora_fused, make):
    model, x = build(lora_fused, make)
    dys = [torch.ones(ROWS, K, device="cuda", dtype=BF16)] * 3
    forward, back = LAUNCHES[make]
    kept = []
    counted = launches(lambda: kept.extend(step(model, x)))
    counted = {name: count for name, count in counted.items() if "splitK" not in name}
    assert sum(counted.values()) <= forward, counted
    counted = launches(lambda: backward(kept, dys))
    counted = {name: count for name, count in counted.items() if "splitK" not in name}
    assert sum(counted.values()) <= back, counted


@pytest.mark.parametrize("make", LAUNCHES)
@pytest.mark.parametrize("config", ({}, dict(lora_dropout=0.3), dict(use_dora=True)), ids=str)
def test_no_synchronisation(lora_fused, make, config):
    model, x = build(lora_fused, make, **config)
    dys = [torch.ones(ROWS, K, device="cuda", dtype=BF16)] * 3
    torch.cuda.set_sync_debug_mode("error")
    try:
        backward(step(model, x), dys)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("make", LAUNCHES)
@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=str)
def test_cuda_graph_of_forward_and_backward(lora_fused, make, config):
    """A replay gives what a plain step gives, for new inputs and parameters changed in place."""
    model, x = build(lora_fused, make, **config)
    dys = [torch.randn(ROWS, K, device="cuda", dtype=BF16) for _ in range(3)]
    trained = [p for p in model.parameters() if p.requires_grad]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys = step(model, x)
        backward(ys, dys)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        for p in trained:
            p.mul_(1.25)
            p.grad.zero_()
        x.grad.zero_()
    graph.replay()
    replayed = [y.clone() for y in ys] + [t.grad.clone() for t in (x, *trained)]
    clear(model, x)
    plain = step(model, x)
    backward(plain, dys)
    for ours, theirs in zip(replayed, [*plain, *(t.grad for t in (x, *trained))]):
        torch.testing.assert_close(ours, theirs)


def test_a_graph_draws_a_new_mask_at_every_replay(lora_fused):
    model, x = build(lora_fused, Single, lora_dropout=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        (y,) = step(model, x)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)
