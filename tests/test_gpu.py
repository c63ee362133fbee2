"""What only a GPU can show: launches of a layer, CUDA graphs, no synchronisation."""

import collections

import pytest
import torch
from cases import Case, peft_linear
from kernels import Mode, kernelize
from test_gated import glu, kernelized as kernelized_gated
from test_siblings import heads, inner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BF16 = torch.bfloat16


def group(lora_fused, **config):
    lora_fused.register_peft_layers()
    model = heads(torch.float32, **config).to("cuda", BF16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    model = kernelize(model, mode=Mode.TRAINING, device="cuda")
    return inner(model)


def mlp(lora_fused, **config):
    model = glu(torch.float32, **config).to("cuda", BF16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return kernelized_gated(lora_fused, model, "cuda").base_model.model


def single(lora_fused, **config):
    lora_fused.register_peft_layers()
    model, _ = peft_linear(Case((8,), 32, 32, 4), BF16, torch.float32, "cuda", **config)
    return kernelize(model, mode=Mode.TRAINING, device="cuda").base_model.model


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


# (forward, backward) of library products under autocast, fp32 adapters: what was counted, none more.
LAUNCHES = {
    # conversions 1, t 1, y 3, + t Bᵀ 3; dt 3, conversions 1, dx 4, dA 1, dB 3, conversions 1
    "group": (group, 8, 13),
    # conversions 2, t 2, y 3, + t Bᵀ 3, the product 1; besides down's and gate's and up's, the product again 1,
    # its gradient 1
    "mlp": (mlp, 11, 21),
    "single": (single, 4, 7),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_do_not_grow(lora_fused, name):
    make, forward, backward = LAUNCHES[name]
    model = make(lora_fused)
    x = torch.randn(64, 32, device="cuda", dtype=BF16, requires_grad=True)
    for _ in range(3):
        y = step(model, x)
        dy = torch.ones_like(y)
        y.backward(dy)
    for p in model.parameters():
        p.grad = None
    x.grad = None
    counted = launches(lambda: step(model, x))
    heads_cat = name == "group"  # the model's own concatenation of its three outputs
    assert sum(counted.values()) - heads_cat <= forward, counted
    y = step(model, x)
    counted = launches(lambda: y.backward(dy))
    own = 3 if heads_cat else 0  # the concatenation's backward gives contiguous parts at most once each
    assert sum(counted.values()) - own <= backward, counted


@pytest.mark.parametrize("make", (group, mlp, single))
@pytest.mark.parametrize("config", ({}, dict(lora_dropout=0.3), dict(use_dora=True)), ids=str)
def test_no_synchronisation(lora_fused, make, config):
    model = make(lora_fused, **config)
    x = torch.randn(64, 32, device="cuda", dtype=BF16, requires_grad=True)
    step(model, x).float().sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, x).float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("make", (group, mlp, single))
@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=str)
def test_cuda_graph_of_forward_and_backward(lora_fused, make, config):
    """A replay gives what a plain step gives, for new inputs and parameters changed in place."""
    model = make(lora_fused, **config)
    x = torch.randn(64, 32, device="cuda", dtype=BF16, requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, x).float().square().sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    for p in model.parameters():
        p.grad = None
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(model, x)
        y.float().square().sum().backward()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.25)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()
    x.grad.zero_()
    graph.replay()
    replayed = [y.clone(), x.grad.clone()] + [p.grad.clone() for p in model.parameters() if p.requires_grad]
    for p in model.parameters():
        p.grad = None
    x.grad = None
    plain = step(model, x)
    plain.float().square().sum().backward()
    expected = [plain, x.grad] + [p.grad for p in model.parameters() if p.requires_grad]
    for ours, theirs in zip(replayed, expected):
        torch.testing.assert_close(ours, theirs)


def test_a_graph_draws_a_new_mask_at_every_replay(lora_fused):
    model = single(lora_fused, lora_dropout=0.5)
    x = torch.randn(64, 32, device="cuda", dtype=BF16)
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        step(model, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = step(model, x)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)
