"""What may happen between two siblings of a group, none of which may change a result."""

import gc
import sys
import threading

import pytest
import torch
from helpers.cases import DEVICE
from helpers.heads import Heads, assert_same, heads, inner, learned, step
from helpers.kernelizing import fused_functions, kernelized
from torch import nn

pytestmark = pytest.mark.usefixtures("on_device")


def in_place_on_x(module, name, x):
    if name == "q":
        x.data.mul_(1.0)  # .data hides it from the version
        with torch.no_grad():
            x.mul_(2.0)


def replaced_data_of_x(module, name, x):
    if name == "q":
        x.data = x.data * 2  # the version is the same


def in_place_on_a_weight(module, name, x):
    if name == "q":
        with torch.no_grad():
            module.k.lora_A["default"].weight.mul_(2.0)


def replaced_weight(module, name, x):
    if name == "q":
        module.k.base_layer.weight = nn.Parameter(module.k.base_layer.weight.data * 2, requires_grad=False)


def replaced_data(module, name, x):
    if name == "q":
        for parameter in (module.k.base_layer.weight, module.v.lora_B["default"].weight):
            parameter.data = parameter.data * 2  # the version is the same


def changed_scaling(module, name, x):
    if name == "q":
        module.k.scaling["default"] *= 2


def disabled(module, name, x):
    module.k.enable_adapters(name == "v")


def merged(module, name, x):
    if name == "q":
        module.k.merge()


@pytest.mark.parametrize(
    "between", (in_place_on_a_weight, replaced_weight, replaced_data, changed_scaling, disabled, merged)
)
def test_changes_between_siblings_are_seen(lora_fused, between):
    """The second sibling's own state at its call decides, not that of when the group was computed."""
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    with torch.no_grad():  # autograd refuses what changed after it was used, for PEFT's forward as well
        torch.testing.assert_close(inner(ours)(x, between=between), inner(model)(x, between=between))
        torch.testing.assert_close(inner(ours)(x), inner(model)(x))


def test_an_input_that_changes_between_siblings(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    with torch.no_grad():
        torch.testing.assert_close(inner(ours)(x.clone(), in_place_on_x), inner(model)(x.clone(), in_place_on_x))
    with torch.inference_mode():  # where tensors keep no version
        torch.testing.assert_close(inner(ours)(x.clone(), in_place_on_x), inner(model)(x.clone(), in_place_on_x))


def test_an_input_whose_memory_is_replaced_between_siblings(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    inner(ours)(x.clone())  # now they run as a group
    with torch.no_grad():
        y, expected = inner(ours)(x.clone(), replaced_data_of_x), inner(model)(x.clone(), replaced_data_of_x)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("skipped", (False, True), ids=("", "skipped"))
@pytest.mark.parametrize("gradient", (False, True), ids=("no_grad", ""))
def test_writes_through_data_between_passes(lora_fused, gradient, skipped):
    """They move no version, as an 8-bit optimizer's; x is the same tensor in every pass, in one of which siblings are
    skipped."""
    model, x = heads(use_dora=True), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    inner(ours)(x.clone())
    for change in (
        lambda layer: layer.base_layer.weight.data.mul_(1.5),
        lambda layer: layer.lora_A["default"].weight.data.add_(0.5),
        lambda layer: layer.lora_B["default"].weight.data.copy_(layer.lora_B["default"].weight.data * 2),
        lambda layer: layer.lora_magnitude_vector["default"].weight.data.mul_(0.5),
        lambda layer: x.data.mul_(1.25) if layer is inner(ours).k else None,
    ):
        with torch.set_grad_enabled(gradient):
            if skipped:
                inner(ours)(x, names=("q",))
            before = inner(ours)(x)
            for each in (model, ours):
                change(inner(each).k)
            y, expected = inner(ours)(x), inner(model)(x)
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            assert not torch.allclose(before, y)


@pytest.mark.parametrize("scope", (torch.no_grad, torch.enable_grad))
def test_another_grad_mode_for_one_sibling(lora_fused, scope):
    class Mixed(Heads):
        def forward(self, x):
            q = self.q(x)
            with scope():
                k = self.k(x)
            return torch.cat([q, k, self.v(x)], -1)

    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    inner(model).__class__ = Mixed
    ours = kernelized(lora_fused, model)
    for _ in range(3):
        assert_same(step(ours, x), step(model, x))


def test_autocast_for_one_sibling(lora_fused):
    class Mixed(Heads):
        def forward(self, x):
            q = self.q(x)
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                k = self.k(x)
            return torch.cat([q, k.float(), self.v(x)], -1)

    model, x = heads(torch.float32), torch.randn(5, 32)
    inner(model).__class__ = Mixed
    ours = kernelized(lora_fused, model)
    for _ in range(3):
        y, y_peft = inner(ours)(x), inner(model)(x)
        torch.testing.assert_close(y, y_peft, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(y[:, :16], y_peft[:, :16])


def test_an_exception_between_siblings(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)

    def fails(module, name, x):
        if name == "k":
            raise KeyError(name)

    for _ in range(2):
        with pytest.raises(KeyError):
            step(ours, x, between=fails)
    for _ in range(3):
        result = step(ours, x)
        assert_same(result, step(model, x))
    assert fused_functions(result[0]) == 1


def test_a_hook_that_raises_between_siblings(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)

    def fails(module, args, y):
        raise KeyError("k")

    handle = inner(ours).k.register_forward_hook(fails)
    for _ in range(2):
        with pytest.raises(KeyError):
            step(ours, x)
    handle.remove()
    other = torch.randn(5, 32, dtype=torch.float64)
    for each in (x, other, x):
        result = step(ours, each)
        assert_same(result, step(model, each))
    assert fused_functions(result[0]) == 1


def test_a_pre_hook_keeps_a_sibling_out(lora_fused):
    """What it does to the sibling's parameters happens at the sibling's call, not before."""
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)

    def grow(module, args):
        module.lora_A["default"].weight.data.mul_(1.5)

    for each in (model, ours):
        inner(each).k.register_forward_pre_hook(grow)
    for _ in range(3):
        result = step(ours, x)
        assert_same(result, step(model, x))
    assert fused_functions(result[0]) == 2


def test_a_forward_of_another_tool_keeps_a_sibling_out(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    layer = inner(ours).k
    before = layer.forward
    layer.forward = lambda *args, **kwargs: 3 * before(*args, **kwargs)
    inner(model).k.register_forward_hook(lambda module, args, y: 3 * y)
    for _ in range(3):
        assert_same(step(ours, x), step(model, x))


def test_an_output_that_is_not_used(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)

    def first_only(each):
        each.zero_grad()
        inner(each)(x)[:, :16].sum().backward()
        return {name: p.grad for name, p in each.named_parameters()}

    expected = first_only(model)
    for name, grad in first_only(ours).items():
        if expected[name] is None or not expected[name].any():
            assert grad is None or not grad.any()
        else:
            torch.testing.assert_close(grad, expected[name])


def test_cross_attention(lora_fused):
    """The query has an input of its own, keys and values share the other one."""

    class Cross(Heads):
        def forward(self, x):
            return torch.cat([self.q(x.flip(0)), self.k(x), self.v(x)], -1)

    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    inner(model).__class__ = Cross
    ours = kernelized(lora_fused, model)
    for _ in range(3):
        result = step(ours, x)
        assert_same(result, step(model, x))
    assert fused_functions(result[0]) == 2
    assert [row.group for row in lora_fused.explain(ours)] == ["single", "k+v", "k+v"]


def test_a_collection_while_a_thread_begins(lora_fused, monkeypatch):
    """Making what is kept of a thread's calls starts the garbage collection, which looks for them."""
    shared_input, raised = lora_fused.shared_input, []

    class Collecting(shared_input._Calls):
        def __init__(self):
            gc.collect()
            super().__init__()

    monkeypatch.setattr(shared_input, "_Calls", Collecting)
    monkeypatch.setattr(sys, "unraisablehook", lambda each: raised.append(each.exc_value))
    made = []
    thread = threading.Thread(target=lambda: made.append(shared_input._threads.calls))
    thread.start()
    thread.join()
    assert isinstance(made[0], Collecting) and not raised
