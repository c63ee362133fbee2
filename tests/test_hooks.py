"""Whoever watches the modules inside a layer, or all modules, sees the calls that PEFT makes."""

import copy

import pytest
import torch
from helpers.cases import Case, peft_linear, randomise_adapters
from helpers.kernelizing import explain, kernelize_in_place
from helpers.mlps import glu
from peft import LoraConfig, get_peft_model
from torch import nn

pytestmark = pytest.mark.usefixtures("on_device")
PARTS = ("base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default", "lora_magnitude_vector.default")
ON_A_PART = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
ON_ALL = (
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_module_full_backward_hook",
    "register_module_full_backward_pre_hook",
)


def linear():
    model, _ = peft_linear(Case((6,), 32, 16, 4), torch.float32, torch.float32, use_dora=True, lora_dropout=0.3)
    return model, torch.randn(6, 32, requires_grad=True)


def embedding():
    base = nn.Sequential()
    base.add_module("table", nn.Embedding(20, 8))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["table"], use_dora=True))
    randomise_adapters(model, torch.float32)
    return model, torch.arange(6)


def gated():
    return glu(torch.float32, use_dora=True), torch.randn(6, 32, requires_grad=True)


def step(model, x):
    """(y, gradients) of one pass, the same masks in each."""
    model.zero_grad()
    torch.manual_seed(5)
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("make,part", [*((linear, part) for part in PARTS), (embedding, PARTS[-1])])
@pytest.mark.parametrize("register", ON_A_PART)
def test_on_a_part(lora_fused, make, part, register):
    (model, x), seen = make(), []
    ours = kernelize_in_place(lora_fused, copy.deepcopy(model))
    assert explain(lora_fused, ours)[0].fused
    calls = []
    for each in (model, ours):
        layer = next(iter(each.base_model.model.children()))
        hook = getattr(layer.get_submodule(part), register)(lambda *_: seen.append(part))
        results = step(each, x)
        calls.append((len(seen), results))
        seen.clear()
        if each is ours:
            assert "hooks" in explain(lora_fused, ours)[0].reason
        hook.remove()
    (expected, theirs), (count, mine) = calls
    assert count == expected > 0
    assert all(map(torch.equal, mine, theirs))
    assert explain(lora_fused, ours)[0].fused


@pytest.mark.parametrize("make", (linear, embedding, gated))
@pytest.mark.parametrize("register", ON_ALL)
def test_on_all_modules(lora_fused, make, register):
    """As profilers set them."""
    (model, x), calls = make(), []
    ours = kernelize_in_place(lora_fused, copy.deepcopy(model))
    assert all(row.fused for row in explain(lora_fused, ours))
    for each in (model, ours):
        seen = []
        names = {module: name for name, module in each.named_modules()}
        hook = getattr(nn.modules.module, register)(lambda module, *_: seen.append(names[module]))
        try:
            calls.append((step(each, x), seen))
            assert each is model or all("hooks on all modules" in row.reason for row in explain(lora_fused, ours))
        finally:
            hook.remove()
    (theirs, expected), (mine, seen) = calls
    assert seen == expected and len(seen) > 3
    assert all(map(torch.equal, mine, theirs))
    assert all(row.fused for row in explain(lora_fused, ours))
