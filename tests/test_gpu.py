"""What only a GPU can show: launches and allocations of a layer, CUDA graphs, no synchronisation, no TF32 that nobody
asked for."""

import collections

import pytest
import torch
from helpers.cases import DEVICE, Case, peft_linear, randomise_adapters, relative
from helpers.mlps import GLU
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
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
    def __init__(self, outputs=K):
        super().__init__()
        self.proj = nn.Linear(K, outputs, bias=False)

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
    # conversions 1, t 1, y 3, + t Bᵀ 3; conversions 1, all dt 1, dx 4, all dA and dB 1
    Group: (8, 7),
    # twice conversions and t 4, y 3, + t Bᵀ 3, h 1; down 1 + 1 + 2 + 1, the activation 1, gate and up 1 + 1 + 3 + 1
    MLP: (11, 12),
    Single: (4, 5),
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


def test_passes_over_dy_of_a_group_are_one_launch(lora_fused):
    model, x = build(lora_fused, Group, use_dora=True)
    ys = step(model, x)
    counted = launches(lambda: backward(ys, [torch.ones(ROWS, K, device="cuda", dtype=BF16)] * 3))
    assert sum(count for name, count in counted.items() if "scale_output_bwd_kernel" in name) == 1, counted
    assert sum(count for name, count in counted.items() if "add_shares_kernel" in name) == 1, counted


@pytest.mark.parametrize("dtype, pieces", ((BF16, 0), (torch.float32, 1)), ids=("product's", "another"))
def test_doras_norm_reads_what_the_product_dequantized(lora_fused, dtype, pieces):
    """A weight in four bits that was in the product's dtype becomes floating point once in a forward."""
    pytest.importorskip("bitsandbytes")
    from helpers import quantized

    model = quantized.replace(Single().to("cuda", dtype), lambda linear: quantized.four_bit(linear, BF16, "cuda"))
    model = get_peft_model(model, LoraConfig(r=16, target_modules=["proj"], use_dora=True)).train()
    randomise_adapters(model, torch.float32)
    assert all(row.fused for row in quantized.fuse(lora_fused, model, "cuda"))
    x = torch.randn(ROWS, K, device="cuda", dtype=BF16, requires_grad=True)
    step(model, x)
    counted = launches(lambda: step(model, x))
    assert sum(count for name, count in counted.items() if "dequantize_4bit" in name) == 1 + pieces, counted


hopper_alone = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="for Hopper GPUs alone"
)


@pytest.mark.own_architecture
@hopper_alone
def test_large_norms_of_a_group_are_three_launches(lora_fused):
    """A's parts, products and squares, and what is made of them."""
    shapes = ((4096, 4096), (1024, 4096), (1024, 4096))
    weights = [torch.randn(shape, device="cuda", dtype=BF16) for shape in shapes]
    a = [torch.randn(32, k, device="cuda") for _, k in shapes]
    b, magnitudes = (
        [torch.randn(n, 32, device="cuda") for n, _ in shapes],
        [torch.rand(n, device="cuda") for n, _ in shapes],
    )
    counted = launches(lambda: lora_fused.backends.select.dora_scales(weights, a, b, magnitudes, [1.0, 0.5, 2.0]))
    assert sum(counted.values()) <= 3, counted


@pytest.mark.own_architecture
@hopper_alone
@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=("LoRA", "DoRA"))
def test_one_mask_of_a_large_dx_is_drawn_in_its_product(lora_fused, config):
    """No pass over dx for the LoRA term, and for DoRA no second product."""
    config = LoraConfig(r=16, target_modules=["proj"], lora_dropout=0.1, **config)
    model = get_peft_model(Single(4096).to("cuda", BF16), config).train()
    randomise_adapters(model, torch.float32)
    lora_fused.register_peft_layers()
    kernelize(model, mode=Mode.TRAINING, device="cuda")
    x = torch.randn(8192, K, device="cuda", dtype=BF16, requires_grad=True)
    dy = torch.randn(8192, 4096, device="cuda", dtype=BF16)
    backward(step(model, x), [dy])
    clear(model, x)
    ys = step(model, x)
    counted = launches(lambda: backward(ys, [dy]))
    assert sum(count for name, count in counted.items() if "gemm_kernel" in name) == 1, counted
    assert not any("dropout" in name or "dropped_expand" in name for name in counted), counted


@pytest.mark.own_architecture
@hopper_alone
@pytest.mark.parametrize("p", (0.0, 0.3))
@pytest.mark.parametrize("make", LAUNCHES)
def test_float32_adapters_launch_no_more_without_autocast(lora_fused, make, p):
    """Their parts are added up inside the products."""
    model, x = build(lora_fused, make, lora_dropout=p)
    dys, counted = [torch.ones(ROWS, K, device="cuda", dtype=BF16)] * 3, {}
    for autocast in (True, False):
        clear(model, x)
        with torch.autocast("cuda", dtype=BF16, enabled=autocast):
            names = launches(lambda: backward(model(x), dys))
        counted[autocast] = {name: count for name, count in names.items() if "splitK" not in name}
    assert sum(counted[False].values()) <= sum(counted[True].values()), counted
    assert not any("hi_lo_sum" in name or "dropout" in name for name in counted[False]), counted[False]


@pytest.mark.own_architecture
@hopper_alone
@pytest.mark.parametrize("tokens, products", ((2047, 0), (2048, 1)))
def test_a_large_dy_is_read_once_for_both_products(lora_fused, tokens, products):
    model = get_peft_model(Single(8192).to("cuda", BF16), LoraConfig(r=16, target_modules=["proj"])).train()
    randomise_adapters(model, torch.float32)
    lora_fused.register_peft_layers()
    kernelize(model, mode=Mode.TRAINING, device="cuda")
    x = torch.randn(tokens, K, device="cuda", dtype=BF16, requires_grad=True)
    dy = torch.randn(tokens, 8192, device="cuda", dtype=BF16)
    backward(step(model, x), [dy])
    clear(model, x)
    ys = step(model, x)
    counted = launches(lambda: backward(ys, [dy]))
    assert sum(count for name, count in counted.items() if "dt_db_kernel" in name) == products, counted
    # Conversions, dt, two for dx, dA and dB; from one read, the sums of dt's and dB's parts as well.
    assert sum(count for name, count in counted.items() if "splitK" not in name) <= 5 + products, counted


def allocations(run):
    """How often `run` asks the caching allocator for memory."""
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    run()
    return torch.cuda.memory_stats()["allocation.all.allocated"] - before


# (forward, backward) as LAUNCHES: what is returned or kept, and the adapters in x's dtype, none more. Autograd takes
# gradients as they are. Backward converts the adapters again instead of keeping them.
ALLOCATIONS = {
    # adapters 1, t 1, y 3; adapters 1, dt 1, dx 1, dA's below each other 1, dB 3
    Group: (5, 7),
    # gate and up: adapters, t 2, y 2; h 1; down: adapters, t, y 3. h and dh 2; down: adapters, dt, dA, dB 4; dgate and
    # dup 2; gate and up: adapters, dt, dx, dA 4, dB 2
    MLP: (8, 14),
    # adapters, t, y; adapters, dt, dx, dA, dB
    Single: (3, 5),
}


@pytest.mark.parametrize("make", ALLOCATIONS)
def test_allocations_do_not_grow(lora_fused, make):
    model, x = build(lora_fused, make)
    dys = [torch.ones(ROWS, K, device="cuda", dtype=BF16)] * 3
    backward(step(model, x), dys)  # every stream has a workspace for products, which it allocates once
    clear(model, x)
    forward, back = ALLOCATIONS[make]
    kept = []
    assert 0 < allocations(lambda: kept.extend(step(model, x))) <= forward
    assert 0 < allocations(lambda: backward(kept, dys)) <= back


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


@pytest.mark.own_architecture
@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")
def test_explain_names_the_gemm(lora_fused):
    model, _ = peft_linear(Case((4,), 4096, 4096, 16), torch.bfloat16, torch.bfloat16)
    lora_fused.register_peft_layers()
    kernelize(model, mode=Mode.TRAINING, device=DEVICE)
    assert [lora_fused.explain(model, rows)[0].backend for rows in (8192, 600)] == ["native, Hopper GEMM", "native"]


BACKENDS = ("native", "reference", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", ("lora", "dora", "dora-dropout"))
def test_float32_does_not_use_tf32(lora_fused, backend, config):
    """Forward and every gradient are within float32's rounding; TF32 is off by 3e-4."""
    assert not torch.backends.cuda.matmul.allow_tf32
    shapes = dict(x=(256, 2048), weight=(384, 2048), lora_a=(32, 2048), lora_b=(384, 32))
    if "dora" in config:
        shapes["magnitude"] = (384,)
    given = {name: torch.randn(shape, device="cuda") for name, shape in shapes.items()}
    dy = torch.randn(256, 384, device="cuda")

    def run(cast, **options):
        torch.manual_seed(3)
        tensors = {name: cast(t).requires_grad_() for name, t in given.items()}
        y = lora_fused.lora_linear(**tensors, scaling=0.5, dropout=0.3 if "dropout" in config else 0.0, **options)
        y.backward(cast(dy))
        return {"y": y, **{name: t.grad for name, t in tensors.items()}}

    truth = run(lambda t: t.double(), backend="reference")
    for name, value in run(lambda t: t.clone(), backend=backend).items():
        assert relative(value, truth[name])[0] < 5e-6, name


def test_tf32_is_seen_by_that_test():
    x, w = torch.randn(256, 2048, device="cuda"), torch.randn(384, 2048, device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert relative(x @ w.t(), x.double() @ w.double().t())[0] > 5e-5
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
