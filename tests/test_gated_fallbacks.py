"""What keeps a gated MLP from being one Function, then or later: its projections are fused alone, the rest is
PEFT's."""

import contextlib

import pytest
import torch
import transformers
from helpers.cases import OwnForwards, randomise_adapters
from helpers.kernelizing import kernelized
from helpers.mlps import CONFIGS, GLU, MLP_TARGETS, assert_same, glu, is_one_function, mlp_of, rows_by_projection, step
from peft import LoraConfig, get_peft_model
from torch import nn

pytestmark = pytest.mark.usefixtures("on_device")


def hook(module, args, output):
    return output * 2


def hook_on(part):
    return lambda mlp: getattr(mlp, part).register_forward_hook(hook)


def disabled(mlp):
    mlp.w1.enable_adapters(False)


def forward_around(mlp):
    before = mlp.w3.forward
    mlp.w3.forward = lambda x: 2 * before(x)


def other_forward(mlp):
    own = mlp.w3
    own.forward = lambda x: 2 * type(own).forward(own, x)


def second_adapter(mlp):
    mlp.w2.lora_B["default"].register_forward_hook(hook)


@pytest.mark.parametrize(
    "change,alone",
    (
        (hook_on("w1"), {"w1": True, "w2": True, "w3": True}),
        (hook_on("w2"), {"w1": True, "w2": True, "w3": True}),
        (disabled, {"w1": False, "w2": True, "w3": True}),
        (lambda mlp: mlp.w2.merge(), {"w1": True, "w2": False, "w3": True}),
        (forward_around, {"w1": True, "w2": True, "w3": True}),
        (other_forward, {"w1": True, "w2": True, "w3": False}),
        (second_adapter, {"w1": True, "w2": False, "w3": True}),
    ),
    ids=("hook", "hook on down", "disabled", "merged", "forward around ours", "another tool's forward", "hook inside"),
)
def test_a_projection_falls_back_alone(lora_fused, change, alone):
    model, x = glu(), torch.randn(5, 32, dtype=torch.float64)
    ours = kernelized(lora_fused, model)
    change(mlp_of(model)), change(mlp_of(ours))
    result = step(ours, x)
    assert not is_one_function(result["y"])
    assert_same(result, step(model, x))
    rows = rows_by_projection(lora_fused, ours)
    assert {name: row.fused for name, row in rows.items()} == alone
    assert all(row.layer != "LoraGatedMLP" for row in rows.values())


class WithOption(GLU):
    def forward(self, hidden_states, scale=None):
        y = super().forward(hidden_states)
        return y if scale is None else scale * y


def test_an_option_of_the_forward_stays(lora_fused):
    """Its projections are fused alone, with the option and without."""
    model, x = nn.Sequential(), torch.randn(5, 32, dtype=torch.float64)
    model.add_module("mlp", WithOption())
    model = get_peft_model(
        model.double(), LoraConfig(r=4, target_modules=["w1", "w2", "w3"]), autocast_adapter_dtype=False
    )
    randomise_adapters(model, torch.float64)
    ours = kernelized(lora_fused, model)
    for given in ((x,), (x, 3.0)):
        with OwnForwards() as calls:
            y = mlp_of(ours)(*given)
        assert not calls
        torch.testing.assert_close(y, mlp_of(model)(*given))


def test_a_product_that_broadcasts(lora_fused):
    """Up gives one number a token: the module's own forward multiplies, the projections are fused alone."""
    model, x = nn.Sequential(), torch.randn(5, 32, dtype=torch.float64)
    model.add_module("mlp", GLU())
    model.mlp.w3 = nn.Linear(32, 1)
    model = get_peft_model(
        model.double(), LoraConfig(r=4, target_modules=["w1", "w2", "w3"]), autocast_adapter_dtype=False
    )
    randomise_adapters(model, torch.float64)
    ours = kernelized(lora_fused, model.train())
    with OwnForwards() as calls:
        result = step(ours, x)
    assert not calls and not is_one_function(result["y"])
    assert_same(result, step(model, x))


def llama():
    base = transformers.AutoModelForCausalLM.from_config(CONFIGS["Llama"]).double()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=MLP_TARGETS), autocast_adapter_dtype=False)
    randomise_adapters(model, torch.float64)
    return model


def set_activation(model, act):
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = act


@contextlib.contextmanager
def count_gated(lora_fused):
    """A list that grows with every gated MLP that is computed as one."""
    own, calls = lora_fused.functional.dispatch.compute_gated, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            lora_fused.functional.dispatch,
            "compute_gated",
            lambda *args, **options: calls.append(0) or own(*args, **options),
        )
        yield calls


def test_another_activation_later(lora_fused):
    plain = llama()
    ours = kernelized(lora_fused, plain)
    tokens = torch.randint(1, 64, (2, 9))
    for act, known in ((nn.GELU(), True), (nn.SiLU(), True), (nn.Softplus(), False)):
        set_activation(plain, act), set_activation(ours, act)
        with count_gated(lora_fused) as calls:
            logits = ours(input_ids=tokens).logits
        assert len(calls) == (2 if known else 0)
        torch.testing.assert_close(logits, plain(input_ids=tokens).logits)


def test_explain_after_an_activation_that_is_not_known(lora_fused):
    ours = kernelized(lora_fused, llama())
    set_activation(ours, nn.Softplus())
    rows = lora_fused.explain(ours)
    assert len(rows) == 6 and all(row.fused and row.layer == "LoraLinear" for row in rows), str(rows)


def test_a_known_activation_after_one_that_is_not(lora_fused):
    ours, tokens = kernelized(lora_fused, llama()), torch.randint(1, 64, (2, 9))
    for act in (nn.Softplus(), nn.SiLU()):
        set_activation(ours, act)
        with count_gated(lora_fused) as calls:
            ours(input_ids=tokens)
    assert len(calls) == 2


def test_an_mlp_without_adapters_is_left_alone(lora_fused):
    model = get_peft_model(
        transformers.AutoModelForCausalLM.from_config(CONFIGS["Llama"]), LoraConfig(r=2, target_modules=["q_proj"])
    )
    ours = kernelized(lora_fused, model)
    assert not any("forward" in module.__dict__ for name, module in ours.named_modules() if name.endswith("mlp"))
