"""The dropout mask: its statistics, one mask from every backend, reproducible and replayed."""

import copy
import math

import pytest
import torch
from helpers.cases import Case, OwnForwards, SeededDropout, peft_linear
from helpers.philox import mask_bits, philox
from kernels import Mode, kernelize

M, K = 512, 1024


def test_philox_known_answers():
    """Of Random123's kat_vectors, philox4x32 of 7 and 10 rounds."""
    assert philox(0, 0, 0) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert philox(0, 0, 0, rounds=10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.fixture
def mask_of(lora_fused, device):
    """mask(seed, p, shape): what the native op makes of ones, on this machine's device."""

    def draw(seed, p, shape=(M, K), dtype=torch.float32):
        out = torch.full(shape, math.nan, dtype=dtype, device=device)
        ones = torch.ones(shape, dtype=dtype, device=device)
        lora_fused._ops.ops.dropout(ones, torch.tensor([seed], device=device), p, out)
        return out.cpu()

    return draw


@pytest.mark.parametrize("seed", (0, 1, 2**62 + 12345, 2**63 - 1))
def test_native_mask_is_philox(mask_of, seed):
    shape, p = (5, 11), 0.4
    expected = [[mask_bits(seed, row, col) >= round(p * 2**16) for col in range(11)] for row in range(5)]
    assert torch.equal(mask_of(seed, p, shape) != 0, torch.tensor(expected))


@pytest.mark.parametrize("p", (0.0, 0.05, 0.5, 0.9, 1.0))
def test_rate_and_scale(mask_of, p):
    mask = mask_of(7, p)
    assert set(mask.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - p)).item() if p < 1 else 0.0}
    sigma = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs((mask == 0).double().mean().item() - p) <= 5 * sigma
    rows = (mask == 0).double().mean(1)
    assert (rows - p).abs().max() <= 6 * sigma * M**0.5
    columns = (mask == 0).double().mean(0)
    assert (columns - p).abs().max() <= 6 * sigma * K**0.5


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].abs().item()


def test_independence(mask_of):
    """Across seeds, near ones included, and across neighbouring rows and columns."""
    mask, bound = mask_of(1000, 0.5), 5 / (M * K) ** 0.5
    for other in (1001, 1002, 1000 + 2**32, 5):
        assert correlation(mask, mask_of(other, 0.5)) < bound
    for shift in (1, 2, 3, 4, 64):
        assert correlation(mask[shift:], mask[:-shift]) < bound
        assert correlation(mask[:, shift:], mask[:, :-shift]) < bound


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_one_mask_for_every_dtype(mask_of, dtype):
    assert torch.equal(mask_of(3, 0.3, (70, 33), dtype) == 0, mask_of(3, 0.3, (70, 33)) == 0)


@pytest.mark.parametrize("shape", ((1, 1), (3, 4), (70, 130), (65, 257), (0, 8), (4, 0)), ids=str)
def test_triton_draws_the_same(lora_fused, device, mask_of, shape):
    pytest.importorskip("triton")
    rows, columns = shape
    mask = lora_fused.specs.Mask(torch.tensor([99], device=device), 0.35)
    x, eye = torch.ones(shape, device=device), torch.eye(max(columns, 1), columns, device=device)
    kernels = lora_fused.backends.select.get("triton")
    expected = mask_of(99, 0.35, shape)
    torch.testing.assert_close(kernels.shrink(x, eye, 1.0, mask=mask).cpu()[:, :columns], expected)
    t = torch.ones(rows, 1, device=device)
    zero = torch.zeros(rows, 16, device=device)
    up = kernels.linear_expand(
        zero, torch.zeros(columns, 16, device=device), t, torch.ones(columns, 1, device=device), mask=mask
    )
    torch.testing.assert_close(up.cpu(), expected)


def trained(lora_fused, device, **config):
    model, layer = peft_linear(Case((64,), 32, 16, 4), torch.float32, torch.float32, device, lora_dropout=0.5, **config)
    lora_fused.register_peft_layers()
    return kernelize(model, mode=Mode.TRAINING, device=device)


@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=str)
def test_reproducible_under_manual_seed_and_new_at_every_step(lora_fused, device, config):
    model, x = trained(lora_fused, device, **config), torch.randn(64, 32, device=device)
    torch.manual_seed(1)
    first, second = model(x), model(x)
    torch.manual_seed(1)
    again = model(x)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(model.eval()(x), model(x))


def test_masks_of_two_steps_are_independent(lora_fused, device):
    """As are its rows, in a layer that shows its mask."""
    model, x = trained(lora_fused, device), torch.ones(4096, 32, device=device)
    layer = model.base_model.model.proj
    layer.base_layer.weight.data.zero_()
    layer.lora_A["default"].weight.data = torch.eye(4, 32, device=device)
    layer.lora_B["default"].weight.data = torch.eye(16, 4, device=device)
    steps = [model(x)[:, :4] != 0 for _ in range(4)]
    bound = 5 * 0.5 / steps[0].numel() ** 0.5
    for i, kept in enumerate(steps):
        assert abs(kept.double().mean().item() - 0.5) < bound
        for other in steps[:i]:
            assert abs((kept == other).double().mean().item() - 0.5) < bound
        for shift in (1, 2, 7):
            assert abs((kept[shift:] == kept[:-shift]).double().mean().item() - 0.5) < 1.1 * bound


def test_the_generator_that_torch_restores_is_the_one_used(lora_fused, device):
    """fork_rng and checkpoint restore the device's generator; Python's own does not matter."""
    import random

    model, x = trained(lora_fused, device), torch.randn(64, 32, device=device)
    with torch.random.fork_rng():
        random.seed(1)
        first = model(x)
    random.seed(2)
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=str)
def test_backward_replays_the_mask(lora_fused, device, config):
    """Where the adapter's input was dropped, no gradient comes back through it."""
    model, x = trained(lora_fused, device, **config), torch.randn(64, 32, device=device, requires_grad=True)
    layer = model.base_model.model.proj
    layer.base_layer.weight.data.zero_()
    torch.manual_seed(2)
    seed = torch.randint(0, 2**63 - 1, (1,), device=device)
    kept = torch.empty(64, 32, device=device)
    lora_fused._ops.ops.dropout(torch.ones_like(kept), seed, 0.5, kept)
    torch.manual_seed(2)
    model(x).sum().backward()
    assert torch.equal(x.grad != 0, kept != 0)


@pytest.mark.parametrize("dropout", (False, True), ids=("eval", "train"))
@pytest.mark.parametrize("layer", (False, True), ids=("in eval", "in train"))
@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=("lora", "dora"))
def test_both_training_flags_are_asked(lora_fused, device, dropout, layer, config):
    """The dropout's own, and of DoRA the layer's too: they differ where a user switches one of them."""
    model, _ = peft_linear(Case((64,), 32, 16, 4), torch.float32, torch.float32, device, lora_dropout=0.5, **config)
    proj = model.base_model.model.proj
    proj.training = layer
    proj.lora_dropout["default"].training = dropout
    lora_fused.register_peft_layers()
    ours = kernelize(copy.deepcopy(model), mode=Mode.TRAINING, device=device)
    assert SeededDropout.replace_all(lora_fused, model) == 1
    results, x = [], torch.randn(64, 32, device=device, requires_grad=True)
    for each in (model, ours):
        torch.manual_seed(5)
        with OwnForwards() as calls:
            y = each(x)
        assert bool(calls) == (each is model)
        results.append(
            [y, *torch.autograd.grad(y.square().sum(), [x, *(p for p in each.parameters() if p.requires_grad)])]
        )
    for mine, peft in zip(*reversed(results)):
        torch.testing.assert_close(mine, peft, rtol=1e-4, atol=1e-4)
    torch.manual_seed(6)
    assert torch.equal(ours(x), results[1][0]) != (dropout and (layer or not config))


@pytest.mark.parametrize("make", (torch.nn.AlphaDropout, torch.nn.FeatureAlphaDropout), ids=lambda make: make.__name__)
def test_another_kind_of_dropout_is_peft_s(lora_fused, device, make):
    model, x = trained(lora_fused, device), torch.randn(64, 32, device=device)
    layer = model.base_model.model.proj
    layer.lora_dropout["default"] = make(0.5)
    with pytest.warns(UserWarning, match=f"dropout layer {make.__name__}"):
        lora_fused.explain(model)
    results = []
    for forward in (model, lambda x: type(layer).forward(layer, x)):
        torch.manual_seed(5)
        results.append(forward(x))
    assert torch.equal(*results)


def test_expectation_is_that_without_dropout(lora_fused, device):
    model, x = trained(lora_fused, device), torch.randn(64, 32, device=device)
    with torch.no_grad():
        mean = torch.stack([model(x) for _ in range(2000)]).mean(0)
        expected = model.eval()(x)
    assert (mean - expected).abs().mean() < 0.05 * expected.abs().mean()
