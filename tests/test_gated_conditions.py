"""Gated MLPs that are one Function under a condition: their input's name, dropouts that drop nothing, one dtype."""

import copy
import functools
import inspect

import pytest
import torch
from helpers.cases import DEVICE, randomise_adapters, relative
from helpers.mlp_forwards import transformers_mlp
from helpers.mlps import assert_same, is_one_function, step
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn

pytestmark = pytest.mark.usefixtures("on_device")

OF_HIDDEN_STATE = (
    "qwen2_5_vl.Qwen2_5_VLMLP",
    "qwen2_5_omni.Qwen2_5OmniMLP",
    "glm4v.Glm4VisionMlp",
    "exaone4_5.Exaone4_5_MLP",
)
WITH_DROPOUT = ("t5.T5DenseGatedActDense", "umt5.UMT5DenseGatedActDense", "modernbert.ModernBertMLP")


def input_of(mlp):
    """What its forward calls its input; DINOv2's is x in some transformers."""
    return list(inspect.signature(type(mlp).forward).parameters)[1]


def test_that_name_is_among_them():
    assert [input_of(transformers_mlp(name)) for name in OF_HIDDEN_STATE].count("hidden_state") >= 4


class Named(nn.Module):
    """A gated MLP that drops before and after down."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.before, self.after = nn.Dropout(0.3), nn.Dropout(0.1)

    def forward(self, hidden_state):
        return self.after(self.c(self.before(nn.functional.silu(self.a(hidden_state)) * self.b(hidden_state))))


def pair(lora_fused, mlp, dtype=torch.float64, p=None, **config):
    """(kernelized, PEFT's) of one MLP, in training mode."""
    for module in mlp.modules():
        if p is not None and isinstance(module, nn.Dropout):
            module.p = p
    model = nn.Sequential()
    model.add_module("mlp", mlp)
    names = [name for name, module in mlp.named_modules() if isinstance(module, nn.Linear)]
    options = dict(r=4, lora_alpha=6, target_modules=names)
    plain = get_peft_model(model.to(dtype), LoraConfig(**{**options, **config}), autocast_adapter_dtype=False)
    randomise_adapters(plain, dtype)
    lora_fused.register_peft_layers()
    return kernelize(copy.deepcopy(plain.train()), mode=Mode.TRAINING, device=DEVICE), plain


def compare(ours, plain, one_function, dtype=torch.float64, tolerance=None):
    """Both draw from the same state."""
    x, results = torch.randn(3, 5, 16, dtype=dtype), []
    for model in (ours, plain):
        torch.manual_seed(5)
        results.append(step(model, x))
    if tolerance is None:
        assert_same(*results)
    else:
        mine, theirs = results
        for name, value in mine.items():
            assert value.dtype == theirs[name].dtype and max(relative(value, theirs[name])) <= tolerance, name
    assert is_one_function(results[0]["y"]) == one_function, results[0]["y"].grad_fn


@pytest.mark.parametrize("config", ({}, dict(use_dora=True), dict(lora_dropout=0.0, bias="all")), ids=str)
@pytest.mark.parametrize("name", OF_HIDDEN_STATE)
def test_an_input_of_another_name(lora_fused, name, config):
    ours, plain = pair(lora_fused, transformers_mlp(name), **config)
    compare(ours, plain, one_function=True)
    rows = lora_fused.explain(ours)
    assert len(rows) >= 2 and {row.group for row in rows} == {"base_model.model.mlp"}, str(rows)
    x = torch.randn(2, 16, dtype=torch.float64)
    mlp, own = ours.base_model.model.mlp, plain.base_model.model.mlp
    given = {input_of(own): x}
    torch.testing.assert_close(mlp(**given), own(**given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=str)
@pytest.mark.parametrize("name", (*WITH_DROPOUT, None))
def test_dropout_inside(lora_fused, name, config):
    """One Function while nothing is dropped; the module's own forward and torch's masks while something is."""
    ours, plain = pair(lora_fused, Named() if name is None else transformers_mlp(name), p=0.3, **config)
    for _ in range(2):
        compare(ours, plain, one_function=False)
    assert all(row.fused and row.group != "base_model.model.mlp" for row in lora_fused.explain(ours))
    ours.eval(), plain.eval()
    compare(ours, plain, one_function=True)
    assert {row.group for row in lora_fused.explain(ours)} == {"base_model.model.mlp"}
    ours.train(), plain.train()
    compare(ours, plain, one_function=False)
    for model in (ours, plain):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    compare(ours, plain, one_function=True)


class Double(nn.Dropout):
    def forward(self, x):
        return 2 * x


def a_hook(dropout):
    dropout.register_forward_hook(lambda module, args, y: 2 * y)


def a_pre_hook(dropout):
    dropout.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def a_backward_hook(dropout):
    dropout.register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],))


def a_forward(dropout):
    dropout.forward = lambda x: 2 * x


def another_class(dropout):
    dropout.__class__ = Double


def training_alone(dropout):
    dropout.train()


@pytest.mark.parametrize("change", (a_hook, a_pre_hook, a_backward_hook, a_forward, another_class, training_alone))
@pytest.mark.parametrize("which", ("before", "after"))
def test_what_happens_to_a_dropout_afterwards(lora_fused, which, change):
    ours, plain = (model.eval() for model in pair(lora_fused, Named()))
    compare(ours, plain, one_function=True)
    for model in (ours, plain):
        change(getattr(model.base_model.model.mlp, which))
    compare(ours, plain, one_function=False)


def test_a_dropout_that_is_replaced(lora_fused):
    ours, plain = (model.eval() for model in pair(lora_fused, Named()))
    for model in (ours, plain):
        model.base_model.model.mlp.before = Double(0.5)
    compare(ours, plain, one_function=False)


T5 = WITH_DROPOUT[0]


def test_dtypes_that_change(lora_fused):
    """T5 casts to the dtype of its last weight, which some keep in float32."""
    ours, plain = pair(lora_fused, transformers_mlp(T5), p=0.0)
    compare(ours, plain, one_function=True)
    for model in (ours, plain):
        model.float()
    compare(ours, plain, one_function=True, dtype=torch.float32, tolerance=2e-6)
    for model in (ours, plain):
        for name in ("wi_0", "wi_1"):
            getattr(model.base_model.model.mlp, name).double()
    compare(ours, plain, one_function=False, tolerance=2e-6)
    for model in (ours, plain):
        model.double()
    compare(ours, plain, one_function=True)


def test_autocast_with_a_cast_inside(lora_fused):
    ours, plain = pair(lora_fused, transformers_mlp(T5), dtype=torch.float32, p=0.0)
    x = torch.randn(6, 16)
    with torch.autocast(x.device.type, torch.bfloat16):
        y, expected = ours(x), plain(x)
    assert not is_one_function(y) and y.dtype == expected.dtype
    truth = plain.double()(x.double())
    assert relative(y, truth)[0] <= 2 * relative(expected, truth)[0] + 2**-7


def test_an_attribute_of_an_activation_that_changes(lora_fused):
    """The module and its class stay; what it computes is another function."""
    ours, plain = pair(lora_fused, transformers_mlp(T5), p=0.0)
    for model in (ours, plain):
        model.base_model.model.mlp.act = nn.GELU()
    compare(ours, plain, one_function=True)
    for model in (ours, plain):
        model.base_model.model.mlp.act.approximate = "tanh"
    compare(ours, plain, one_function=True)


# ---- functions that an activation holds ----


def test_an_activation_s_function_is_exchanged(lora_fused):
    """Gemma's holds `F.gelu` with keywords: what it holds at the call is computed."""
    ours, plain = pair(lora_fused, transformers_mlp("gemma.GemmaMLP"))
    for approximate in ("tanh", "none", "tanh"):
        for model in (ours, plain):
            (mlp,) = [module for name, module in model.named_modules() if name.endswith("mlp")]
            mlp.act_fn.act = functools.partial(nn.functional.gelu, approximate=approximate)
        compare(ours, plain, one_function=True)
