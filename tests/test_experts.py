"""One mixture's adapted experts, kernelized, against PEFT: values, gradients, precision, routing, what PEFT does with
adapters."""

import copy
import itertools

import pytest
import torch
from helpers.cases import DEVICE, FACTOR
from helpers.experts import (
    MODELS,
    adapt,
    block_of,
    counted,
    error,
    example,
    explain,
    kernelized,
    names_of,
    results,
)  # fmt: skip
from torch import nn

pytestmark = pytest.mark.usefixtures("on_device")

DECORATED = [name for name in MODELS if name != "llama4"]
WHICH = {"both": (0, 1), "first": (0,), "second": (1,)}
# Its own forward sums in the dtype of its router, float32; the oracle's sums are in float64.
SUMS_IN_FLOAT32 = ("nemotron_h",)


def assert_same(seen, expected, tolerance=1e-12):
    assert seen.keys() == expected.keys()
    assert len(seen) > 3
    for name in expected:
        assert error(seen[name], expected[name]) <= tolerance, name


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", DECORATED)
def test_as_peft_in_float64(lora_fused, name, which):
    """y, dx, dA, dB and all that the router learns from."""
    implementations = ("batched_mm",) if name in SUMS_IN_FLOAT32 else ("eager", "batched_mm")
    for implementation in implementations:
        block = block_of(name, implementation=implementation)
        model = adapt(block, [names_of(block)[i] for i in WHICH[which]])
        ours = kernelized(lora_fused, model)
        x, dy = example()
        expected = results(model, x, dy)
        with counted(lora_fused) as calls:
            seen = results(ours, x, dy)
        assert len(calls) == 1
        assert_same(seen, expected)
        assert any("mixture.gate" in key or "mixture.router" in key for key in seen)
        rows = explain(lora_fused, ours)
        assert len(rows) == len(WHICH[which])
        assert all(row.fused and row.last == "fused" and row.layer == "LoraExperts" for row in rows)


def test_there_are_enough_models():
    assert len(DECORATED) >= 15


def errors_of_one_call(lora_fused, name, implementation, dtype, adapter_dtype):
    """Squared relative errors against float64, of ours and of PEFT's, over all that a call gives; same weights and
    routing."""
    block = block_of(name, dtype, implementation)
    model = adapt(block, adapter_dtype=adapter_dtype)
    exact = copy.deepcopy(model).double()
    exact.base_model.model.mixture.experts.get_base_layer().config._experts_implementation = "batched_mm"
    each = [m.base_model.model.mixture.experts for m in (kernelized(lora_fused, model), model, exact)]
    x, dy, index, routing = torch.randn(40, 32), torch.randn(40, 32), torch.randint(0, 4, (40, 2)), torch.rand(40, 2)
    found = []
    for experts, wide in zip(each, (dtype, dtype, torch.float64)):
        given = [t.to(dtype).to(wide).requires_grad_() for t in (x, routing)]
        parameters = [p for p in experts.parameters() if p.requires_grad]
        y = experts(given[0], index, given[1])
        assert y.dtype == wide
        found.append([y, *torch.autograd.grad(y, [*given, *parameters], dy.to(dtype).to(wide))])
    assert len(found[2]) == 7
    return [
        sum(
            ((seen.double() - expected).norm() / expected.norm()).item() ** 2
            for seen, expected in zip(values, found[2])
        )
        for values in found[:2]
    ]


@pytest.mark.parametrize("implementation", ("eager", "batched_mm", "grouped_mm"))
@pytest.mark.parametrize(
    "dtype,adapter_dtype",
    (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ),
    ids=lambda dtype: str(dtype)[6:],
)
def test_no_less_precise_than_peft(lora_fused, implementation, dtype, adapter_dtype):
    """Over four kinds of gates. Of one gate alone either may come out a little ahead: PEFT rounds W + s·B·A, ours x
    Wᵀ. In float32 nothing is stored in fewer bits, and the order of sums alone differs: `FACTOR`, as of linears."""
    bound = FACTOR if dtype == torch.float32 else 1.05
    names = ("qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h")
    errors = [errors_of_one_call(lora_fused, name, implementation, dtype, adapter_dtype) for name in names]
    ours, peft = (sum(each) ** 0.5 for each in zip(*errors))
    assert 0 < ours <= bound * peft, (ours, peft)
    assert all(seen**0.5 <= max(bound, 1.3) * expected**0.5 for seen, expected in errors), errors


# --- routing ---


def experts_of(lora_fused, name="qwen3_moe", **options):
    """(ours, PEFT's) wrapped experts in float64."""
    model = adapt(block_of(name), **options)
    return [each.base_model.model.mixture.experts for each in (kernelized(lora_fused, model), model)]


def run(experts, x, index, routing, dy):
    experts.zero_grad()
    x, routing = x.clone().requires_grad_(), routing.clone().requires_grad_()
    y = experts(x, index, routing)
    parameters = {name: p for name, p in experts.named_parameters() if p.requires_grad}
    leaves = [x, routing, *parameters.values()]
    grads = torch.autograd.grad(y, leaves, dy, allow_unused=True) if y.requires_grad else [None] * len(leaves)
    grads = [torch.zeros_like(t) if grad is None else grad for grad, t in zip(grads, leaves)]
    return dict(zip(("y", "x", "routing", *parameters), (y.detach(), *grads)))


ROUTINGS = {
    "every expert": torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]]),
    "empty experts": torch.tensor([[1, 1], [1, 3], [3, 1], [3, 3], [1, 1]]),
    "one expert": torch.full((5, 2), 2),
    "the last expert": torch.full((5, 2), 3),
    "left out": torch.tensor([[0, 4], [4, 4], [3, 4], [1, 2], [4, 2]]),
    "all left out": torch.full((5, 2), 4),
    "int32": torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]], dtype=torch.int32),
}


@pytest.mark.parametrize("routed", ROUTINGS)
def test_routings(lora_fused, routed):
    ours, theirs = experts_of(lora_fused)
    index = ROUTINGS[routed].to(DEVICE)
    x, routing, dy = torch.randn(5, 32).double(), torch.rand(5, 2).double(), torch.randn(5, 32).double()
    with counted(lora_fused) as calls:
        seen = run(ours, x, index, routing, dy)
    # Without a row PEFT's parameters have no gradient, so its own forward runs; on a GPU nobody waits to see that.
    assert len(calls) == (0 if routed == "all left out" and DEVICE == "cpu" else 1)
    assert_same(seen, run(theirs, x, index.long(), routing, dy))
    if routed == "empty experts":
        by_expert = seen["lora_A.default.weight"].view(4, 3, -1)
        assert by_expert[1].any() and not by_expert[0].any() and not by_expert[2].any()


def test_no_tokens(lora_fused):
    ours, _ = experts_of(lora_fused)
    seen = run(
        ours,
        torch.empty(0, 32).double(),
        torch.empty(0, 2).long(),
        torch.empty(0, 2).double(),
        torch.empty(0, 32).double(),
    )
    assert seen["y"].shape == (0, 32)
    assert not any(seen[name].any() for name in seen)


def test_negative_indices_name_the_module(lora_fused):
    """On the CPU: a GPU would be waited for."""
    with torch.device("cpu"):
        model = kernelized(lora_fused, adapt(block_of("qwen3_moe")), "cpu")
        x, routing = torch.randn(5, 32).double(), torch.rand(5, 2).double()
        with pytest.raises(ValueError, match=r"mixture\.experts: the index has -2"):
            model.base_model.model.mixture.experts(x, torch.tensor([[0, -2]] * 5), routing)


def test_arguments_by_name(lora_fused):
    for name, names in (
        ("qwen3_moe", ("top_k_index", "top_k_weights")),
        ("gpt_oss", ("router_indices", "routing_weights")),
    ):
        ours, theirs = experts_of(lora_fused, name)
        given = dict(zip(names, (torch.randint(0, 4, (5, 2)), torch.rand(5, 2).double())))
        x = torch.randn(5, 32).double()
        with counted(lora_fused) as calls:
            assert error(ours(x, **given), theirs(x, **given)) <= 1e-12
        assert len(calls) == 1


# --- adapters ---


@pytest.mark.parametrize("name", ("qwen3_moe", "gpt_oss"))
@pytest.mark.parametrize(
    "options",
    (
        dict(use_rslora=True),
        dict(rank_pattern={"experts.gate_up_proj": 5}, alpha_pattern={"experts.down_proj": 9}),
        dict(bias="all"),
        dict(lora_alpha=1e-3),
        dict(r=16),
    ),
    ids=str,
)
def test_configurations(lora_fused, name, options):
    model = adapt(block_of(name), **options)
    for key, parameter in model.named_parameters():
        if "proj_bias" in key and "bias" in options:  # which this PEFT does not count as biases
            parameter.requires_grad_(True)
    ours = kernelized(lora_fused, model)
    x, dy = example()
    with counted(lora_fused) as calls:
        seen = results(ours, x, dy)
    assert len(calls) == 1
    assert_same(seen, results(model, x, dy))
    if "bias" in options and name == "gpt_oss":
        assert sum("proj_bias" in key for key in seen) == 2


FROZEN = {
    "A": ("lora_A",), "B": ("lora_B",), "one parameter": ("experts.lora",), "the router": ("router",),
    "all before the second product": ("router", "base_layer.lora"),
}  # fmt: skip


@pytest.mark.parametrize("needs_dx", (True, False))
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parts(lora_fused, frozen, needs_dx):
    model = adapt(block_of("gpt_oss"))
    for name, parameter in model.named_parameters():
        if any(part in name for part in FROZEN[frozen]):
            parameter.requires_grad_(False)
    ours = kernelized(lora_fused, model)
    x, dy = example()
    found = []
    for each in (ours, model):
        each.zero_grad()
        y = each(x.requires_grad_(needs_dx))
        y.backward(dy)
        grads = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), **grads, **({"dx": x.grad} if needs_dx else {})})
        x.grad = None
    seen, expected = found
    assert seen.keys() == expected.keys() and len(seen) > 2
    assert all(error(seen[name], expected[name]) <= 1e-12 for name in expected)


def test_merged_disabled_switched(lora_fused):
    """Seen at the next call, in both directions."""
    model = adapt(block_of("qwen3_moe"))
    from peft import LoraConfig

    options = dict(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model.add_adapter("second", LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "second" in name:
            nn.init.normal_(parameter, std=0.3)
    ours = kernelized(lora_fused, model)
    x, _ = example()

    def check(reason):
        with counted(lora_fused) as calls:
            seen = ours(x)
        assert error(seen, model(x)) <= 1e-12
        rows = explain(lora_fused, ours)
        assert len(rows) == 2 and len(calls) == (reason is None)
        for row in rows:
            assert row.fused == (reason is None) and (reason is None or reason in row.reason), str(row)

    check(None)
    first = model(x)
    for each in (ours, model):
        each.set_adapter("second")
    check(None)
    assert error(model(x), first) > 1e-2
    for each in (ours, model):
        each.base_model.set_adapter(["default", "second"])
    check("several active adapters")
    for each in (ours, model):
        each.base_model.set_adapter("default")
        each.base_model.disable_adapter_layers()
    check("disabled")
    for each in (ours, model):
        each.base_model.enable_adapter_layers()
        each.merge_adapter()
    check("merged")
    for each in (ours, model):
        each.unmerge_adapter()
    check(None)


# --- autocast, determinism ---


@pytest.mark.parametrize(
    "implementation,base,fused",
    (
        ("grouped_mm", torch.float32, True), ("grouped_mm", torch.bfloat16, True), ("eager", torch.bfloat16, True),
        ("batched_mm", torch.bfloat16, True), ("eager", torch.float32, False), ("batched_mm", torch.float32, False),
    ),
)  # fmt: skip
@pytest.mark.parametrize("x_dtype", (torch.float32, torch.bfloat16))
def test_autocast(lora_fused, implementation, base, fused, x_dtype):
    """As PEFT's in dtypes; a float32 weight under autocast, of which eager experts make a copy, is PEFT's."""
    model = adapt(block_of("qwen3_moe", base, implementation))
    ours = kernelized(lora_fused, model)
    experts = [each.base_model.model.mixture.experts for each in (ours, model)]
    given = torch.randn(9, 32).to(x_dtype), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    found = []
    for each in experts:
        x = given[0].clone().requires_grad_()
        parameters = [p for p in each.parameters() if p.requires_grad]
        with torch.autocast(DEVICE, torch.bfloat16), counted(lora_fused) as calls:
            y = each(x, *given[1:])
            if each is experts[0]:
                assert len(calls) == fused and [row.fused for row in explain(lora_fused, ours)] == [fused] * 2
        found.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *parameters])])
    for seen, expected in zip(*found):
        assert seen.dtype == expected.dtype and error(seen, expected) < 0.05


def test_x_of_another_dtype(lora_fused):
    """transformers' grouped forward casts x to the weight's dtype, its others do not."""
    model = adapt(block_of("qwen3_moe", torch.bfloat16, "grouped_mm"))
    ours = kernelized(lora_fused, model).base_model.model.mixture.experts
    given = torch.randn(9, 32), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    with counted(lora_fused) as calls:
        y = ours(*given)
    assert len(calls) == 1 and y.dtype == torch.float32
    assert error(y, model.base_model.model.mixture.experts(*given)) < 0.05
    ours.get_base_layer().config._experts_implementation = "batched_mm"
    with pytest.raises(RuntimeError, match="expected scalar type|same dtype"):
        ours(*given)


def test_twice_the_same_bits(lora_fused):
    ours = kernelized(lora_fused, adapt(block_of("mixtral", torch.bfloat16, "grouped_mm")))
    x, dy = example((4, 33), torch.bfloat16)
    first, second = results(ours, x, dy), results(ours, x, dy)
    assert len(first) > 5 and all(torch.equal(first[name], second[name]) for name in first)


def test_double_backward_says_so(lora_fused):
    ours = kernelized(lora_fused, adapt(block_of("mixtral")))
    x = torch.randn(2, 5, 32).double().requires_grad_()
    (dx,) = torch.autograd.grad(ours(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        dx.sum().backward()


def test_all_pairs_of_choices(lora_fused):
    """One token, every pair of experts, also the same one twice: the sum of its two choices."""
    ours, theirs = experts_of(lora_fused)
    x, routing, dy = torch.randn(1, 32).double(), torch.rand(1, 2).double(), torch.randn(1, 32).double()
    for pair in itertools.product(range(5), repeat=2):
        index = torch.tensor([pair])
        assert_same(run(ours, x, index, routing, dy), run(theirs, x, index, routing, dy))
