"""States and origins of adapters, before and after kernelizing: what is fused computes what PEFT does,
the rest is PEFT's own forward."""

import copy

import pytest
import torch
from helpers.cases import (
    DEVICE,
    LINEARS,
    Case,
    OwnForwards,
    assert_as_good,
    peft_linear,
    peft_llama,
    randomise_adapters,
    tiny_llama,
)
from helpers.heads import assert_same, heads, inner, learned, step
from helpers.kernelizing import assert_peft_runs, explain, fused_functions, kernelize_in_place
from helpers.llamas import tokens
from kernels import Mode, kernelize
from peft import EvaConfig, LoftQConfig, LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraModel
from peft.tuners.lora.config import BdLoraConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

pytestmark = pytest.mark.usefixtures("on_device")
CASE = Case((6,), 32, 16, 4, bias=True)


def losses(model, steps=4):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def assert_trains_as_peft(lora_fused, model):
    """All of a Llama's linears are fused, and so are the first steps."""
    model = model.double()
    ours = kernelize_in_place(lora_fused, copy.deepcopy(model).train())
    rows = explain(lora_fused, ours)
    assert len(rows) == 14 and all(row.fused for row in rows), str(rows)
    expected = losses(model.train())
    assert expected[-1] != expected[0]
    with OwnForwards() as calls:
        assert losses(ours) == pytest.approx(expected, rel=1e-9)
    assert not calls


INITIALISATIONS = {
    "gaussian": dict(init_lora_weights="gaussian"),
    "pissa": dict(init_lora_weights="pissa"),
    "pissa_niter_4": dict(init_lora_weights="pissa_niter_4"),
    "olora": dict(init_lora_weights="olora"),
    "orthogonal": dict(init_lora_weights="orthogonal"),
    "rslora": dict(use_rslora=True),
    "rank and alpha patterns": dict(
        rank_pattern={"q_proj": 3, "layers.1.mlp.up_proj": 9}, alpha_pattern={"down_proj": 1}, use_rslora=True
    ),
    "rank and alpha patterns, DoRA": dict(rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 1}, use_dora=True),
}
if DEVICE == "cuda":  # PEFT's LoftQ quantizes there
    INITIALISATIONS["loftq"] = dict(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4))


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_initialisation(lora_fused, name):
    options = dict(r=4, lora_alpha=8, target_modules=LINEARS, task_type="CAUSAL_LM")
    assert_trains_as_peft(lora_fused, get_peft_model(tiny_llama(), LoraConfig(**options, **INITIALISATIONS[name])))


def test_initialisation_from_activations_and_gradients(lora_fused):
    """CorDA and LoRA-GA prepare the base model, EVA the model that PEFT made."""
    options = dict(r=2, target_modules=LINEARS, task_type="CAUSAL_LM")

    def run(model):
        model(input_ids=tokens(), labels=tokens()).loss.backward()

    base, config = tiny_llama(), LoraConfig(**options, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(base, config, lambda: run(base))
    assert_trains_as_peft(lora_fused, get_peft_model(base, config))
    base, config = tiny_llama(), LoraConfig(**options, init_lora_weights="corda")
    preprocess_corda(base, config, run_model=lambda: base(input_ids=tokens()[:1]))
    assert_trains_as_peft(lora_fused, get_peft_model(base, config))


def test_eva_on_a_kernelized_model(lora_fused):
    """Its hooks on the base layers see every input; afterwards the layers are fused again."""
    options = dict(r=2, target_modules=LINEARS, task_type="CAUSAL_LM")
    config = LoraConfig(**options, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    plain = get_peft_model(tiny_llama(torch.float64), config)
    ours = kernelize_in_place(lora_fused, copy.deepcopy(plain))
    batch = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    for model in (plain, ours):
        initialize_lora_eva_weights(model, [batch] * 4, show_progress_bar=False)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], msg=name)
    assert all(row.fused for row in explain(lora_fused, ours))
    torch.testing.assert_close(ours(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)


def test_modules_to_save(lora_fused):
    model = peft_llama(modules_to_save=["lm_head", "norm"])
    assert any("modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)
    assert_trains_as_peft(lora_fused, model)


def several(first, second):
    """A layer with two active adapters."""
    model, _ = peft_linear(CASE, torch.float32, torch.float32, **first)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["proj"], **second))
    randomise_adapters(model, torch.float32)
    return model


@pytest.mark.parametrize("names", (["default", "second"], ["second", "default"]), ids="-".join)
@pytest.mark.parametrize("first", (False, True), ids=("lora", "dora"))
@pytest.mark.parametrize("second", (False, True), ids=("lora", "dora"))
def test_several_active_adapters(lora_fused, names, first, second):
    """Summed in PEFT's order: without dropout, DoRA scales what the adapters before it added."""
    model = several(dict(use_dora=first), dict(use_dora=second))
    model.base_model.set_adapter(names)
    assert_peft_runs(lora_fused, model, f"several active adapters ({', '.join(names)})")
    if first != second:
        x = torch.randn(6, 32)
        y = model(x)
        model.base_model.set_adapter(names[::-1])
        assert not torch.allclose(model(x), y)


def test_one_of_several_by_name(lora_fused):
    """set_adapter switches; an adapter that is not on a layer does not count there."""
    model, x = several({}, dict(use_dora=True)), torch.randn(6, 32)
    ours = kernelize_in_place(lora_fused, copy.deepcopy(model))
    for name in ("second", "default", "second"):
        model.set_adapter(name), ours.set_adapter(name)
        assert fused_functions(ours(x))
        torch.testing.assert_close(ours(x), model(x))


def test_mixed_batches(lora_fused):
    """adapter_names through the whole model."""
    model = several({}, {}).eval()
    ours, x = kernelize_in_place(lora_fused, copy.deepcopy(model)), torch.randn(6, 32)
    names = ["default", "second", "__base__"] * 2
    assert torch.equal(ours(x, adapter_names=names), model(x, adapter_names=names))
    ours.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        ours(x, adapter_names=names)
    with pytest.raises(ValueError, match="DoRA"):
        several(dict(use_dora=True), {}).eval()(x, adapter_names=names)


def test_disabling_while_merged_unmerges(lora_fused):
    model, layer = peft_linear(CASE, torch.float32, torch.float32)
    ours, x = kernelize_in_place(lora_fused, copy.deepcopy(model)), torch.randn(6, 32)
    for each in (model, ours):
        each.merge_adapter()
        each.base_model.disable_adapter_layers()
    assert torch.equal(ours(x), model(x))
    assert not inner(ours).proj.merged and not layer.merged
    for each in (model, ours):
        each.base_model.enable_adapter_layers()
    assert fused_functions(ours(x))
    torch.testing.assert_close(ours(x), model(x))


def test_adapters_added_to_other_modules(lora_fused):
    """New LoRA layers run PEFT's forward, as explain says, until kernelized as well."""
    model, x = heads(target_modules=["q"], rank_pattern={}, alpha_pattern={}), torch.randn(5, 32, dtype=torch.float64)
    ours = kernelize_in_place(lora_fused, copy.deepcopy(model))
    for each in (model, ours):
        torch.manual_seed(7)
        each.add_adapter("second", LoraConfig(r=3, target_modules=["q", "v"], init_lora_weights=False))
        each.double().set_adapter("second")
    assert_same(step(ours, x), step(model, x))
    rows = {row.module.rpartition(".")[2]: row for row in explain(lora_fused, ours)}
    assert rows["q"].fused and "not kernelized" in rows["v"].reason
    kernelize(ours, mode=Mode.TRAINING, device=DEVICE)
    assert_same(step(ours, x), step(model, x))
    assert all(row.fused for row in explain(lora_fused, ours))
    for each in (model, ours):
        each.delete_adapter("second")
        each.set_adapter("default")
    assert_same(step(ours, x), step(model, x))
    reasons = {row.module.rpartition(".")[2]: row.reason for row in explain(lora_fused, ours)}
    assert reasons == {"q": None, "v": "no active adapter on this layer"}


@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=("lora", "dora"))
@pytest.mark.parametrize("part", ("lora_A", "lora_B"))
def test_tied_adapters(lora_fused, part, config):
    """One A or B for several projections of a group: its gradient is the sum."""
    model = heads(rank_pattern={}, alpha_pattern={}, **config)
    body = inner(model)
    if part == "lora_B":
        body.v = copy.deepcopy(body.q)
    shared = getattr(body.q, part)["default"]
    for name in ("k", "v") if part == "lora_A" else ("v",):
        getattr(getattr(body, name), part)["default"].weight = shared.weight
    x = torch.randn(5, 32, dtype=torch.float64)
    ours = kernelize_in_place(lora_fused, copy.deepcopy(model))
    for _ in range(3):
        result = step(ours, x)
        assert_same(result, step(model, x))
    assert fused_functions(result[0]) == 1


@pytest.mark.parametrize("config", ({}, dict(use_dora=True), dict(lora_bias=True), dict(bias="all")), ids=str)
def test_members_with_adapters_of_several_dtypes(lora_fused, config):
    """Gradients in each parameter's own dtype, beside a sibling without an adapter."""
    model = heads(torch.float32, target_modules=["q", "v"], rank_pattern={}, alpha_pattern={}, **config)
    body, x = inner(model), torch.randn(5, 32)
    for name, parameter in body.q.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    ours = kernelize_in_place(lora_fused, copy.deepcopy(model))
    y_true, truth = step(copy.deepcopy(model).double(), x.double())
    y_peft, theirs = step(model, x)
    for _ in range(3):
        y, grads = step(ours, x)
        assert_as_good("y", y[:, :24], y_peft[:, :24], y_true[:, :24], torch.bfloat16)
        assert_as_good("y of v", y[:, 24:], y_peft[:, 24:], y_true[:, 24:], torch.float32)
        for name, grad in grads.items():
            unit = torch.float32 if ".v." in name else torch.bfloat16
            assert_as_good(name, grad, theirs[name], truth[name], unit)
    assert fused_functions(y) == 1


def test_frozen_adapters_and_inputs_without_gradient(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    for each in (model, ours):
        body = inner(each)
        body.q.requires_grad_(False)
        body.k.lora_A["default"].requires_grad_(False)
        body.v.lora_B["default"].requires_grad_(False)
    for _ in range(2):
        assert_same(step(ours, x), step(model, x))
    results = []
    for each in (model, ours):
        each.zero_grad()
        y = inner(each)(x)  # x needs no gradient
        y.sum().backward()
        results.append({name: p.grad for name, p in each.named_parameters() if p.requires_grad})
    assert x.grad is None and len(results[0]) == 2
    for name, grad in results[1].items():
        torch.testing.assert_close(grad, results[0][name])


def test_inference(lora_fused):
    """eval(), inference_mode and a model that asks for no gradient at all."""
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x).eval()
    model.eval()
    with torch.inference_mode():
        for _ in range(3):
            with OwnForwards() as calls:
                y = inner(ours)(x)
            assert not calls
            torch.testing.assert_close(y, inner(model)(x))
    ours.requires_grad_(False)
    with OwnForwards() as calls:
        y = inner(ours)(x)
    assert not calls and not y.requires_grad
    torch.testing.assert_close(y, inner(model)(x))


@pytest.mark.parametrize("base,adapter", ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)), ids=str)
def test_input_casting_switched_off(lora_fused, base, adapter):
    """Then PEFT multiplies x as it is: what it refuses stays refused, in PEFT's words."""
    model, _ = peft_linear(CASE, base, adapter)
    ours, x = kernelize_in_place(lora_fused, copy.deepcopy(model)), torch.randn(6, 32).to(base)
    assert fused_functions(ours(x))
    with disable_input_dtype_casting(model), disable_input_dtype_casting(ours):
        assert "input casting" in explain(lora_fused, ours)[0].reason
        with pytest.raises(RuntimeError) as theirs:
            model(x)
        with pytest.raises(RuntimeError) as mine:
            ours(x)
    assert str(mine.value) == str(theirs.value)
    same, _ = peft_linear(CASE, base, base)
    ours = kernelize_in_place(lora_fused, same)
    with disable_input_dtype_casting(ours):
        assert fused_functions(ours(x))


@pytest.mark.parametrize(
    "config,reason",
    (
        (dict(alora_invocation_tokens=[1], task_type="CAUSAL_LM"), "variant ALoraLinearVariant"),
        (dict(use_bdlora=BdLoraConfig(target_modules_bd_a=["proj"], nblocks=2)), "variant BdLoraLinearVariant"),
    ),
    ids=("alora", "bdlora"),
)
def test_variants(lora_fused, config, reason):
    """Others are in test_fallbacks; Arrow takes trained adapters, PEFT's own tests of it run in `make conformance`."""
    base = nn.Sequential()
    base.add_module("proj", nn.Linear(32, 16))
    model = LoraModel(base, LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False, **config), "default")
    assert_peft_runs(lora_fused, model, reason)


def test_arguments_of_variants_are_peft_s(lora_fused):
    model, layer = peft_linear(CASE, torch.float32, torch.float32)
    ours, x = kernelize_in_place(lora_fused, copy.deepcopy(model)), torch.randn(6, 32)
    y = inner(ours).proj(x, alora_offsets=None)
    assert torch.equal(y, layer(x, alora_offsets=None)) and not fused_functions(y)


@pytest.mark.parametrize("dropout", (0.0, 0.4))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_a_gain_near_one_is_not_lost(lora_fused, dtype, dropout):
    """Gain and norm are float32: (g - 1) of 2⁻¹² rounds to nothing in half precision, and DoRA's part of
    the gradient with it."""
    model, layer = peft_linear(Case((64,), 64, 32, 4), dtype, torch.float32, use_dora=True, lora_dropout=dropout)
    for part in (layer.lora_A, layer.lora_B):
        part["default"].weight.data.zero_()  # y - x Wᵀ is (g - 1)·d(x) Wᵀ alone
    norm = layer.base_layer.weight.double().norm(dim=1)
    layer.lora_magnitude_vector["default"].weight.data = (norm * (1 + 2**-12)).float()
    ours, x = kernelize_in_place(lora_fused, model), torch.randn(64, 64).to(dtype)
    seen = []

    def watched(name, op):
        def call(*args):
            result = op(*args)
            if name == "mag_norm_scale":
                seen.append(result)
            elif name == "dora_scales" or args[1][4] is not None:  # made by the op, its last results
                seen.extend(result[-1])
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("mag_norm_scale", "dora_scales", "lora_forward"):
            patch.setattr(lora_fused.backends.native, name, watched(name, getattr(lora_fused.backends.native, name)))
        ours(x)
    assert seen and all(g.dtype == torch.float32 for g in seen)
    torch.testing.assert_close(seen[0] - 1, torch.full_like(seen[0], 2**-12), rtol=0.01, atol=0)


def test_a_norm_of_zero_is_divided_by(lora_fused):
    """PEFT adds no epsilon: a row of zeros gives inf or nan there, and so it does here."""
    model, layer = peft_linear(CASE, torch.float32, torch.float32, use_dora=True)
    layer.base_layer.weight.data[:2].zero_()
    layer.lora_B["default"].weight.data[:2].zero_()
    layer.lora_magnitude_vector["default"].weight.data[0] = 0
    ours, x = kernelize_in_place(lora_fused, copy.deepcopy(model)), torch.randn(6, 32)
    assert explain(lora_fused, ours)[0].fused
    y, expected = ours(x), model(x)
    assert expected[:, :2].isnan().all()
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_an_adapter_that_does_not_fit_gets_peft_s_error(lora_fused):
    model, layer = peft_linear(CASE, torch.float32, torch.float32)
    layer.lora_B["default"].weight = nn.Parameter(torch.randn(16, 5))
    ours, x = kernelize_in_place(lora_fused, copy.deepcopy(model)), torch.randn(6, 32)
    assert "do not fit" in explain(lora_fused, ours)[0].reason
    with pytest.raises(RuntimeError) as theirs:
        model(x)
    with pytest.raises(RuntimeError) as mine:
        ours(x)
    assert str(mine.value) == str(theirs.value)
