"""What a sibling's call depends on besides values, changed between two siblings; and a group that changes while a
reentrant checkpoint waits."""

import pytest
import torch
from helpers.cases import SeededDropout
from helpers.heads import NAMES, heads, inner, learned, masked_heads, step
from helpers.kernelizing import fused_functions
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("on_device")


def x_of(rows=5, **options):
    return torch.randn(rows, 32, dtype=torch.float64, **options)


def frozen(module, name, x):
    if name == "q":
        module.k.lora_A["default"].weight.requires_grad_(False)


def trained(module, name, x):
    """It is frozen when q runs."""
    if name == "q":
        module.k.lora_B["default"].weight.requires_grad_(True)


def wrapped_anew(module, name, x):
    """Another parameter over the same memory."""
    if name == "q":
        for layer in (module.k.lora_A["default"], module.v.lora_B["default"]):
            layer.weight = nn.Parameter(layer.weight.data)


@pytest.mark.parametrize("between", (frozen, trained, wrapped_anew))
def test_gradients_are_those_of_the_parameters_at_the_call(lora_fused, between):
    model, x = heads(), x_of()
    inner(model).k.lora_B["default"].weight.requires_grad_(between is not trained)
    ours, found = learned(lora_fused, model, x), []
    for each in (ours, model):
        y, _ = step(each, x, between=between)
        found.append({name: p.grad for name, p in each.named_parameters()})
    mine, peft = found
    there = {name for name, grad in peft.items() if grad is not None}
    assert there == {name for name, grad in mine.items() if grad is not None}
    assert len(there) == (5 if between is frozen else 6)
    for name in there:
        torch.testing.assert_close(mine[name], peft[name], rtol=1e-11, atol=1e-11, msg=name)


def test_an_input_that_is_trained_from_the_second_sibling_on(lora_fused):
    model, x = heads(), x_of()
    ours, found = learned(lora_fused, model, x), []

    def trained(module, name, x):
        x.requires_grad_()

    for each in (model, ours):
        leaf = x.clone()
        inner(each)(leaf, between=trained).square().sum().backward()
        found.append(leaf.grad)
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("change", (lambda drop: drop.eval(), lambda drop: setattr(drop, "p", 0.9)), ids=("eval", "p"))
def test_a_dropout_that_changes_between_siblings(lora_fused, change):
    """k, computed ahead with the old one, is computed again."""
    model, x = heads(lora_dropout=0.3), x_of(300)
    ours = learned(lora_fused, model, x)
    assert fused_functions(step(ours, x)[0]) == 1
    assert SeededDropout.replace_all(lora_fused, model) == 3

    def between(module, name, x):
        if name == "q":
            change(module.k.lora_dropout["default"])
            torch.manual_seed(11)

    parts = []
    for each in (model, ours):
        torch.manual_seed(5)
        parts.append(inner(each)(x, between=between, names=("q", "k"))[:, 16:])
    torch.testing.assert_close(*reversed(parts))


@pytest.mark.parametrize("masked", (NAMES, ("v",)), ids="+".join)
@pytest.mark.parametrize("later", (("q",), ("q", "k")), ids="+".join)
def test_no_member_leaves_while_a_reentrant_checkpoint_waits(lora_fused, monkeypatch, masked, later):
    """Its forward drew one seed a member at once, which its recomputation must do as well: y = J x + b and dx = Jᵀ dy
    with the same masks in J."""
    ours, b = masked_heads(lora_fused, monkeypatch, masked)

    def run(names):
        x = x_of(requires_grad=True)
        return x, checkpoint(lambda x: inner(ours)(x, names=names), x * 1, use_reentrant=True)

    for _ in range(3):
        run(NAMES)[1].sum().backward()
    x, y = run(NAMES)
    waiting = [run(later) for _ in range(3)]
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(((y - b) * dy).sum(), (x * x.grad).sum())
    for _, other in waiting:
        other.sum().backward()
