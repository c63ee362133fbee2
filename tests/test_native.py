"""The native ops of groups and gated MLPs against autograd through the formula in float64, members that differ in
everything, on this machine's device: masks given, memory poisoned, every gradient."""

import functools

import pytest
import torch
from helpers import formula
from helpers.cases import UNIT, relative
from helpers.native_ops import (
    GROUPS,
    backward,
    check_group,
    compare,
    draw,
    flat_on,
    operands_of,
    poison,
    projections_of,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# tokens, features in; whole tiles, parts of tiles, more tokens than a block has, columns that no kernel of
# masks in registers takes (33).
SHAPES = ((1, 64), (37, 200), (300, 1024), (70, 33), (1030, 96))
# Where the GPU has our own GEMM large enough for it, in the forward and in the backward: tiles on most of 132
# multiprocessors. A CPU has one path for all sizes, and may multiply half precision slowly.
LARGE = (4090, 1016) if torch.cuda.is_available() else (210, 1000)
# As many tokens and outputs as one read of dy takes for dt and dB on Hopper.
MANY = (15000, 40) if torch.cuda.is_available() else (1500, 40)
LARGE_GROUPS = {
    "plain": ((1032, 8, 0.0, False, False), (1024, 32, 0.0, False, True), (1000, 64, 0.0, False, False)),
    "DoRA": ((1032, 16, 0.0, True, False), (1024, 32, 0.0, True, True), (1000, 24, 0.0, False, False)),
    "masks": ((1032, 16, 0.2, True, False), (1024, 32, 0.1, False, True), (1000, 24, 0.0, False, False)),
    # More than a launch of masked sums has room for, together and alone.
    "ranks": ((72, 384, 0.1, False, False), (48, 672, 0.2, False, True), (64, 136, 0.3, False, False)),
}
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16))


@pytest.fixture
def three_threads():
    """More than a test's process has otherwise: rows and columns are dealt out."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype,adapter", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("m,k", SHAPES)
def test_group(lora_fused, device, m, k, group, dtype, adapter):
    """Given the rounded operands, every result is within a few roundings of the formula's in float64."""
    check_group(lora_fused, device, m, k, GROUPS[group], dtype, adapter)


@pytest.mark.parametrize("group", GROUPS)
def test_group_on_several_threads(lora_fused, three_threads, group):
    check_group(lora_fused, "cpu", 300, 1024, GROUPS[group], torch.float32, torch.float32)


@pytest.mark.parametrize("dtype,adapter", DTYPES[1:], ids=str)
@pytest.mark.parametrize("group", LARGE_GROUPS)
@pytest.mark.parametrize("m,k", (LARGE, MANY))
def test_large_group(lora_fused, device, m, k, group, dtype, adapter):
    check_group(lora_fused, device, m, k, LARGE_GROUPS[group], dtype, adapter)


# Float32 adapters beside bfloat16 without autocast, of which the ops multiply two parts each.
EXACT = ((72, 8, 0.0, False, False), (1024, 40, 0.0, False, True), (31, 5, 0.0, False, False))
EXACT_GROUPS = {
    "LoRA": EXACT,
    "one rank": ((72, 16, 0.0, False, False), (1024, 16, 0.0, False, True), (1000, 16, 0.0, False, False)),
    "one rank, other scalings": ((72, 16, 0.0, False, False), (40, 16, 0.0, False, True), (64, 16, 0.0, False, False)),
    "DoRA": ((1024, 16, 0.0, True, True), (72, 40, 0.0, False, False), (1000, 8, 0.0, True, False)),
    "masks": ((1024, 16, 0.3, False, True), (72, 16, 0.1, False, False), (1000, 8, 0.5, False, False)),
    "mixed": ((1024, 32, 0.0, True, True), (72, 24, 0.2, False, False), (1000, 16, 0.0, False, True)),
    "fours": (
        (72, 4, 0.0, False, False),
        (40, 4, 0.0, False, True),
        (64, 4, 0.0, False, False),
        (48, 4, 0.0, False, False),
    ),
    "odd": ((31, 5, 0.2, False, True), (17, 3, 0.0, False, False), (9, 7, 0.9, False, False)),
    "ranks": ((72, 136, 0.1, False, False), (48, 384, 0.0, False, False), (64, 200, 0.3, False, True)),
}
ADAPTER_UNIT = 2.0**-16


SEEDS = torch.tensor([5, 2**40 + 1, 77])


def exact_run(lora_fused, operands, group, x, dys, device, scalings):
    flat, own = (
        flat_on(operands, device, torch.bfloat16, torch.float32),
        x.detach().to(device, torch.bfloat16).requires_grad_(),
    )
    given = [dy.to(device, torch.bfloat16) for dy in dys]
    poison(device)
    projections = projections_of(lora_fused, flat, scalings, [lora_fused.ProjectionSpec(p) for _, _, p, _, _ in group])
    assert lora_fused.autograd.group_native.native_path(projections, torch.bfloat16, None, is_cuda=True) == (True, True)
    seeds = SEEDS.to(device) if any(p for _, _, p, _, _ in group) else None
    return backward(lora_fused.autograd.group_native.lora_group(own, projections, seeds, True), given, own, flat), flat


def formula_run(lora_fused, operands, group, x, dys, scalings):
    flat, own = flat_on(operands, "cpu", torch.float64, torch.float64), x.clone().requires_grad_()
    of, dropouts = lora_fused.specs.unflatten(flat), [p for _, _, p, _, _ in group]
    return backward(formula.group(lora_fused, own, of, scalings, dropouts, SEEDS), dys, own, flat)


@pytest.mark.parametrize("m,k", (*SHAPES, LARGE, MANY))
@pytest.mark.parametrize("group", EXACT_GROUPS)
def test_float32_adapters_keep_their_precision(lora_fused, device, m, k, group):
    """Outputs within bfloat16's rounding, gradients of a LoRA adapter within that of its two parts."""
    generator = torch.Generator().manual_seed(m)
    scalings = (0.5,) * 4 if group in ("one rank", "fours") else (0.5, 0.7, 0.5)
    group = EXACT_GROUPS[group]
    operands = [operands_of(generator, k, n, r, dora, bias) for n, r, _, dora, bias in group]
    for each in operands:
        each[:2] = [None if t is None else t.bfloat16().double() for t in each[:2]]
        each[2:] = [None if t is None else t.float().double() for t in each[2:]]
    x, *dys = [draw(generator, m, n).bfloat16().double() for n in (k, *(n for n, *_ in group))]
    ours, flat = exact_run(lora_fused, operands, group, x, dys, device, scalings)
    truth = formula_run(lora_fused, operands, group, x, dys, scalings)
    trained = [tensor for tensor in flat if tensor is not None and tensor.requires_grad]
    assert len(ours) == len(truth) == len(group) + 1 + len(trained)
    adapters = {id(grad) for i, (*_, dora, _) in enumerate(group) if not dora for grad in
                (flat[10 * i + 2].grad, flat[10 * i + 3].grad)}  # fmt: skip
    assert adapters
    for value, exact in zip(ours, truth):
        unit = ADAPTER_UNIT if id(value) in adapters else UNIT[torch.bfloat16]
        error, peak = relative(value, exact)
        bound = 4 * unit + exact.numel() ** 0.5 * 2.0**-24
        assert error <= bound and peak <= 8 * bound, f"shape {tuple(exact.shape)}: {error:.3g}, {peak:.3g}"


@pytest.mark.parametrize("elsewhere", ((16,), (16, 24), ()), ids=str)
def test_norms_made_by_the_forward_and_elsewhere(lora_fused, device, monkeypatch, elsewhere):
    """Triton makes norms of large ranks on a GPU; those of the other members are the forward's own."""
    generator = torch.Generator().manual_seed(3)
    group = (
        (72, 16, 0.0, True, True),
        (40, 24, 0.0, True, False),
        (64, 8, 0.0, False, True),
        (48, 4, 0.0, True, False),
    )
    operands = [operands_of(generator, 96, n, r, dora, bias) for n, r, _, dora, bias in group]
    x, dys = draw(generator, 37, 96).float(), [draw(generator, 37, n).float().to(device) for n, *_ in group]
    native = lora_fused.backends.select.norm_is_native

    def run():
        flat, own = flat_on(operands, device, torch.float32, torch.float32), x.to(device).requires_grad_()
        projections = projections_of(lora_fused, flat, (0.5,) * 4, [lora_fused.ProjectionSpec()] * 4)
        return backward(lora_fused.autograd.group_native.lora_group(own, projections, None), dys, own, flat)

    expected = run()
    asked = []

    def refusing(weight, lora_a, lora_b, quantized):
        asked.append(lora_a.shape[0])
        return lora_a.shape[0] not in elsewhere and native(weight, lora_a, lora_b, quantized)

    monkeypatch.setattr(lora_fused.backends.select, "norm_is_native", refusing)
    for value, exact in zip(run(), expected):
        torch.testing.assert_close(value, exact)
    assert {16, 24, 4} <= set(asked)


def test_what_the_ops_take(lora_fused):
    bf16, fp32, fp16 = torch.bfloat16, torch.float32, torch.float16

    def taken(dtype, *adapters, autocast=None, p=0.0, is_cuda=True, weight=None, magnitude=None):
        projections = [
            lora_fused.Projection(
                lora_fused.Operands(
                    torch.zeros(3, 4, dtype=weight or dtype),
                    None,
                    torch.zeros(2, 4, dtype=a),
                    torch.zeros(3, 2, dtype=b),
                    None,
                    magnitude,
                ),
                1.0,
                lora_fused.ProjectionSpec(p if i == len(adapters) - 1 else 0.0),
            )
            for i, (a, b) in enumerate(adapters)
        ]
        return tuple(lora_fused.autograd.group_native.native_path(projections, dtype, autocast, is_cuda))

    assert taken(bf16, (bf16, bf16), p=0.1) == taken(fp32, (fp32, fp32), is_cuda=False) == (True, False)
    assert taken(bf16, (fp32, fp32), autocast=bf16, p=0.1) == (True, False)
    assert taken(bf16, (fp32, fp32)) == taken(bf16, (fp32, fp32), (bf16, bf16)) == (True, True)
    refused = (False, False)
    # Masks, on either kind of member; not with DoRA.
    assert taken(bf16, (fp32, fp32), p=0.1) == taken(bf16, (fp32, fp32), (bf16, bf16), p=0.1) == (True, True)
    assert taken(bf16, (fp32, fp32), p=0.1, magnitude=torch.zeros(3)) == refused
    assert taken(bf16, (fp32, fp32), magnitude=torch.zeros(3)) == (True, True)
    assert taken(bf16, (fp32, fp32), is_cuda=False) == refused
    assert taken(fp16, (fp32, fp32)) == taken(bf16, (bf16, fp32)) == taken(bf16, (fp32, bf16)) == refused
    assert taken(bf16, (bf16, bf16), weight=fp32) == taken(fp32, (bf16, bf16)) == refused


@pytest.mark.parametrize("dtype,adapter", DTYPES, ids=str)
@pytest.mark.parametrize("gate_half", (None, 0, 1))
@pytest.mark.parametrize("dora", (False, True))
@pytest.mark.parametrize("p", (0.0, 0.3))
def test_gated(lora_fused, device, three_threads, p, dora, gate_half, dtype, adapter):
    generator = torch.Generator().manual_seed(1)
    m, k, i, n = 130, 96, 136, 72
    outs = (i, i) if gate_half is None else (2 * i,)
    operands = [operands_of(generator, k, out, 16, dora, dora) for out in outs]
    operands.append(operands_of(generator, i, n, 8, dora, False))
    operands = [[None if t is None else t.to(dtype).double() for t in each] for each in operands]
    specs = [lora_fused.ProjectionSpec(p)] * len(operands)
    x, dy = (draw(generator, m, c).to(dtype).double() for c in (k, n))
    seeds = torch.tensor([5, 2**40 + 1, 77])[: len(operands)]

    scalings = (0.5, 0.7, 0.4)[: len(specs)]

    def run(compute, device, dtype, adapter):
        flat, own = flat_on(operands, device, dtype, adapter), x.detach().to(device, dtype).requires_grad_()
        given = dy.to(device, dtype)
        poison(device)
        return backward([compute(own, flat)], [given], own, flat)

    def native(x, flat, bf16x3=False):
        projections = projections_of(lora_fused, flat, scalings, specs)
        return lora_fused.autograd.gated_mlp_native.gated_mlp(
            x, projections, (0, gate_half or 0), seeds.to(x.device), bf16x3
        )

    def formulated(x, flat):
        of = lora_fused.specs.unflatten(flat)
        return formula.gated(lora_fused, x, of, scalings, [p] * len(specs), seeds, gate_half)

    truth = run(formulated, "cpu", torch.float64, torch.float64)
    compare(run(native, device, dtype, adapter), truth, dtype, stored=8)
    compare(run(native, "cpu", torch.float64, torch.float64), truth, torch.float64, stored=64)
    if not (p and dora) and (dtype, adapter) == (torch.bfloat16, torch.float32):
        compare(run(functools.partial(native, bf16x3=True), device, dtype, adapter), truth, dtype, stored=8)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("activation", range(5))
def test_gates_of_zero_and_far_from_it(lora_fused, device, activation, dtype):
    """Values and slopes are those of autograd, which has 0 where ReLU has none, and nothing overflows on the way: y =
    f(x)."""
    maths, eye = lora_fused.backends.reference.activations, torch.eye(6, device=device, dtype=dtype)
    up = lora_fused.Operands(torch.zeros_like(eye), torch.ones(6, device=device, dtype=dtype))
    far = 1e3 if maths.ACTIVATIONS[activation] == "relu2" else 1e25
    x = torch.tensor([[0.0, 1.0, -1.0, 35.0, -35.0, far]], device=device, dtype=dtype, requires_grad=True)
    projections = [lora_fused.Projection(each) for each in (lora_fused.Operands(eye), up, lora_fused.Operands(eye))]
    y = lora_fused.autograd.gated_mlp_native.gated_mlp(x, projections, (activation, 0), None)
    truth = x.detach().double().requires_grad_()
    value = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda g: torch.nn.functional.gelu(g, approximate="tanh"),
        "relu": torch.relu,
        "relu2": lambda g: torch.relu(g).square(),
    }[maths.ACTIVATIONS[activation]](truth)
    (slope,) = torch.autograd.grad(value.sum(), truth)
    y.sum().backward()
    torch.testing.assert_close(y.double(), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), slope, rtol=1e-5, atol=1e-6)
