"""Every way in which a parameter can change between two calls is seen: nothing is cached.

DoRA's norm depends on W, A, B and the scaling, so a stale one shows at the next output.
"""

import copy

import bitsandbytes
import pytest
import torch
from helpers.cases import Case, OwnForwards, peft_linear
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn

CASE = Case((6,), 32, 16, 4, bias=True)
OPTIMIZERS = {
    "sgd": dict(cls=torch.optim.SGD, lr=0.1),
    "adamw-foreach": dict(cls=torch.optim.AdamW, lr=0.1, foreach=True),
    "adamw-fused": dict(cls=torch.optim.AdamW, lr=0.1, fused=True),
    # 8 bits from 16 elements on; they write past the version counter.
    "adamw-8bit": dict(cls=bitsandbytes.optim.AdamW8bit, lr=0.1, min_8bit_size=16),
    "lion-8bit": dict(cls=bitsandbytes.optim.Lion8bit, lr=0.1, min_8bit_size=16),
}


@pytest.fixture(params=("dora", "lora"))
def pair(lora_fused, request, device):
    """(PEFT's model, the kernelized one, x); both see every change."""
    model, _ = peft_linear(CASE, torch.float32, torch.float32, device, use_dora=request.param == "dora")
    lora_fused.register_peft_layers()
    ours = kernelize(copy.deepcopy(model), mode=Mode.TRAINING, device=device)
    assert lora_fused.explain(ours)[0].fused
    return model, ours, torch.randn(6, 32, device=device)


@pytest.mark.parametrize("dropout", (0.0, 0.4))
def test_dora_changes_nothing_at_initialisation(lora_fused, device, dropout):
    """As with PEFT: a norm summed in another order gives no mag_norm_scale of 1 + 1e-7."""
    base = nn.Sequential()
    base.add_module("proj", nn.Linear(1000, 300).to(device))
    x = torch.randn(50, 1000, device=device)
    expected = base(x)
    model = get_peft_model(base, LoraConfig(target_modules=["proj"], use_dora=True, lora_dropout=dropout)).train()
    lora_fused.register_peft_layers()
    kernelize(model, mode=Mode.TRAINING, device=device)
    assert lora_fused.explain(model)[0].fused
    if device == "cpu" and not dropout:
        assert torch.equal(model(x), expected)
    mag_norm_scale = lora_fused.backends.native.mag_norm_scale(
        model.base_model.model.proj.lora_magnitude_vector["default"].weight.detach(), norm_of(lora_fused, model)
    )
    assert torch.equal(mag_norm_scale, torch.ones_like(mag_norm_scale))


def norm_of(lora_fused, model):
    layer = layer_of(model)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return lora_fused.row_norm(layer.base_layer.weight, a, b, layer.scaling["default"])


def test_gain_keeps_what_is_not_rounding(lora_fused, device):
    norm = torch.tensor([2.0, 2.0, 2.0, 2.0, 3.0], device=device)
    magnitude = torch.tensor([2.0, 2.0 + 2**-21, 2.000002, 0.0, -3.0], device=device)
    expected = torch.tensor([1.0, 1.0, 2.000002 / 2.0, 0.0, -1.0], device=device)
    assert torch.equal(lora_fused.backends.native.mag_norm_scale(magnitude, norm), expected)


def layer_of(model):
    return model.base_model.model.proj


def assert_follows(pair, change):
    """Outputs and gradients agree before and after `change(layer)` and move with it; what follows it is fused."""
    plain, ours, x = pair
    before = ours(x).detach()
    torch.testing.assert_close(before, plain(x))
    for model in (plain, ours):
        change(layer_of(model))
    results = []
    for model in (plain, ours):
        model.zero_grad()
        with OwnForwards() as calls:
            y = model(x)
        assert bool(calls) == (model is plain)
        if y.requires_grad:
            y.square().sum().backward()
        results.append((y, {name: p.grad for name, p in model.named_parameters()}))
    (expected, grads), (y, our_grads) = results
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(y, expected)
    for name, grad in our_grads.items():
        torch.testing.assert_close(grad, grads[name], msg=name, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_step(pair, name):
    options = dict(OPTIMIZERS[name])
    cls = options.pop("cls")

    def step(layer):
        parameters = [p for p in layer.parameters() if p.requires_grad]
        torch.manual_seed(4)
        for p in parameters:
            p.grad = torch.randn(p.shape).to(p.device)
        cls(parameters, **options).step()

    assert_follows(pair, step)


@pytest.mark.parametrize("part", ("base_layer", "lora_A", "lora_B"))
def test_update_through_data(pair, part):
    """As PEFT hot-swaps adapters: the tensor's version does not move."""

    def update(layer):
        inner = getattr(layer, part)
        inner = inner if part == "base_layer" else inner["default"]
        inner.weight.data.copy_(2 * inner.weight.data + 0.1)

    assert_follows(pair, update)


def test_loaded_state_dict(pair):
    def load(layer):
        generator = torch.Generator().manual_seed(4)
        state = {k: torch.randn(v.shape, generator=generator) for k, v in layer.state_dict().items()}
        layer.load_state_dict(state)

    assert_follows(pair, load)


def test_changed_scaling(pair):
    assert_follows(pair, lambda layer: layer.scaling.update(default=2.5))
    assert_follows(pair, lambda layer: layer.set_scale("default", 3.0))


def test_replaced_weight(pair):
    def replace(layer):
        weight = layer.base_layer.weight
        layer.base_layer.weight = nn.Parameter(weight.data * 1.5 + 0.1, requires_grad=False)

    assert_follows(pair, replace)


def test_merged_and_unmerged(pair):
    plain, ours, x = pair
    for model in (plain, ours):
        model.merge_adapter()
    torch.testing.assert_close(ours(x), plain(x))

    def change_and_unmerge(layer):
        layer.unmerge()
        layer.lora_B["default"].weight.data.mul_(2)

    assert_follows(pair, change_and_unmerge)


def test_another_adapter(pair):
    plain, ours, x = pair
    for model in (plain, ours):
        torch.manual_seed(6)
        model.add_adapter("second", LoraConfig(r=3, use_dora=True, target_modules=["proj"], init_lora_weights=False))
    assert_follows(pair, lambda layer: layer.set_adapter("second"))
    assert_follows(pair, lambda layer: layer.set_adapter("default"))


def test_flags_are_where_they_are_read(pair):
    """A call reads the module's dictionary, and PEFT's properties say what is in force."""
    _, ours, _ = pair
    layer = layer_of(ours)
    ours.add_adapter("second", LoraConfig(r=3, use_dora=True, target_modules=["proj"]))
    seen = set()
    for disabled, active in ((False, "default"), (True, "default"), (False, "second")):
        layer.enable_adapters(not disabled)
        layer.set_adapter(active)
        held = vars(layer)["_disable_adapters"], tuple(vars(layer)["_active_adapter"])
        assert held == (layer.disable_adapters, tuple(layer.active_adapter)) == (disabled, (active,))
        seen.add(held)
    assert len(seen) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_moved_to_another_device(pair):
    plain, ours, x = pair
    for device in ("cpu", "cuda"):
        plain, ours, x = plain.to(device), ours.to(device), x.to(device)
        with OwnForwards() as calls:
            y = ours(x)
        assert not calls
        torch.testing.assert_close(y, plain(x))


def test_moved_to_another_dtype(pair):
    plain, ours, x = pair
    plain, ours, x = plain.double(), ours.double(), x.double()
    with OwnForwards() as calls:
        y = ours(x)
    assert not calls
    torch.testing.assert_close(y, plain(x), rtol=1e-12, atol=1e-12)


def test_hot_swapped_adapter(lora_fused, device, tmp_path):
    """PEFT swaps LoRA weights in place, through `.data`; DoRA it refuses to swap."""
    from peft.utils.hotswap import hotswap_adapter

    plain, _ = peft_linear(CASE, torch.float32, torch.float32, device)
    lora_fused.register_peft_layers()
    ours = kernelize(copy.deepcopy(plain), mode=Mode.TRAINING, device=device)
    saved = copy.deepcopy(plain)
    for p in saved.parameters():
        if p.requires_grad:
            p.data.mul_(1.5).add_(0.05)
    saved.save_pretrained(tmp_path)

    def swap(layer):
        model = plain if layer is layer_of(plain) else ours
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device=device)

    assert_follows((plain, ours, torch.randn(6, 32, device=device)), swap)
