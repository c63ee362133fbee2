"""Every state that is not fused gives PEFT's own result, bit for bit, and `explain` says why."""

import copy

import pytest
import torch
from helpers.cases import DEVICE, Case, peft_linear, peft_llama
from helpers.kernelizing import assert_peft_runs, explain, fused_functions, kernelize_in_place
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import KasaConfig, MontecloraConfig, VeloraConfig
from torch import nn

pytestmark = pytest.mark.usefixtures("on_device")
CASE = Case((6,), 32, 16, 4, bias=True)


def test_the_probe_sees_the_fused_function(lora_fused):
    model, _ = peft_linear(CASE, torch.float32, torch.float32)
    assert fused_functions(kernelize_in_place(lora_fused, model)(torch.randn(6, 32)))


def test_merged(lora_fused):
    model, layer = peft_linear(CASE, torch.float32, torch.float32)
    layer.merge()
    assert_peft_runs(lora_fused, model, "merged")


def test_disabled(lora_fused):
    model, layer = peft_linear(CASE, torch.float32, torch.float32)
    layer.enable_adapters(False)
    assert_peft_runs(lora_fused, model, "disabled")


def test_states_change_after_kernelizing(lora_fused):
    model, layer = peft_linear(CASE, torch.float32, torch.float32)
    plain = copy.deepcopy(model)
    ours = kernelize_in_place(lora_fused, model)
    x = torch.randn(6, 32)
    with plain.disable_adapter():
        expected = plain(x)
    with ours.disable_adapter():
        assert torch.equal(ours(x), expected)
    plain.merge_adapter(), ours.merge_adapter()
    assert torch.equal(ours(x), plain(x))
    plain.unmerge_adapter(), ours.unmerge_adapter()
    assert fused_functions(ours(x))
    torch.testing.assert_close(ours(x), plain(x))
    for each in (plain, ours):
        torch.manual_seed(5)
        each.add_adapter("second", LoraConfig(r=3, target_modules=["proj"], init_lora_weights=False))
        each.set_adapter("second")
    assert fused_functions(ours(x))
    torch.testing.assert_close(ours(x), plain(x))
    plain.delete_adapter("second"), ours.delete_adapter("second")
    torch.testing.assert_close(ours(x), plain(x))


def test_several_active_adapters(lora_fused):
    model, _ = peft_linear(CASE, torch.float32, torch.float32)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_peft_runs(lora_fused, model, "several active adapters (default, second)")


def test_no_adapter_active_here(lora_fused):
    model, layer = peft_linear(CASE, torch.float32, torch.float32)
    layer._active_adapter = "elsewhere"
    assert_peft_runs(lora_fused, model, "no active adapter")


def test_adapter_names(lora_fused):
    model, layer = peft_linear(CASE, torch.float32, torch.float32)
    ours = kernelize_in_place(lora_fused, copy.deepcopy(model)).eval()
    model.eval()
    x = torch.randn(6, 32)
    names = ["default", "__base__"] * 3
    inner, plain = ours.base_model.model.proj, layer
    assert torch.equal(inner(x, adapter_names=names), plain(x, adapter_names=names))
    with pytest.raises(ValueError, match="adapter_names"):
        inner(x, adapter_names=names[:2])


@pytest.mark.parametrize(
    "config,reason",
    (
        (dict(init_lora_weights="mica"), "variant MiCALinearVariant"),
        (dict(velora_config=VeloraConfig()), "variant VeloraLinearVariant"),
        (dict(monteclora_config=MontecloraConfig()), "variant MontecloraLinearVariant"),
        (dict(kasa_config=KasaConfig()), "variant KasaLinearVariant"),
    ),
    ids=("mica", "velora", "monteclora", "kasa"),
)
def test_configurations(lora_fused, config, reason):
    model, _ = peft_linear(CASE, torch.float32, torch.float32, **config)
    assert_peft_runs(lora_fused, model.train(), reason)


def test_dora_of_a_vector(lora_fused):
    """PEFT gives [1, N] there."""
    model, _ = peft_linear(CASE, torch.float32, torch.float32, use_dora=True)
    ours, x = kernelize_in_place(lora_fused, copy.deepcopy(model)), torch.randn(32)
    assert torch.equal(ours(x), model(x)) and not fused_functions(ours(x))


def test_dora_on_a_trained_conv1d(lora_fused):
    """PEFT wraps the transposed weight as a new parameter, which detaches a part of its gradient."""
    model, layer = peft_linear(Case((6,), 32, 16, 4, conv1d=True), torch.float32, torch.float32, use_dora=True)
    layer.base_layer.requires_grad_(True)
    assert_peft_runs(lora_fused, model, "DoRA on a trained Conv1D")


def test_dropout_is_fused_in_eval(lora_fused):
    model, _ = peft_linear(CASE, torch.float32, torch.float32, lora_dropout=0.3)
    plain = copy.deepcopy(model).eval()
    ours = kernelize_in_place(lora_fused, model).eval()
    x = torch.randn(6, 32)
    assert fused_functions(ours(x))
    torch.testing.assert_close(ours(x), plain(x))


def test_subclass_of_the_base_layer(lora_fused):
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential()
    model.add_module("proj", Doubling(32, 16))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False))
    assert_peft_runs(lora_fused, model, "unknown base layer Doubling")


def test_subclass_of_the_lora_layer(lora_fused):
    from peft.tuners.lora import Linear

    class Tripling(Linear):
        def forward(self, x, *args, **kwargs):
            return 3 * super().forward(x, *args, **kwargs)

    model, layer = peft_linear(CASE, torch.float32, torch.float32)
    layer.__class__ = Tripling
    assert_peft_runs(lora_fused, model, "no fused layer for")


def test_convolution_has_a_row(lora_fused):
    model = nn.Sequential()
    model.add_module("conv", nn.Conv1d(4, 8, 3))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False))
    assert_peft_runs(lora_fused, model, "no fused layer for", torch.randn(2, 4, 6))


def test_hooks_and_replaced_forwards(lora_fused):
    for part in ("base_layer", "lora_A", "lora_B"):
        model, layer = peft_linear(CASE, torch.float32, torch.float32)
        inner = getattr(layer, part)
        inner = inner if part == "base_layer" else inner["default"]
        handle = inner.register_forward_hook(lambda module, args, output: 2 * output)
        assert_peft_runs(lora_fused, model, f"{part} has hooks")
        handle.remove()
        assert explain(lora_fused, kernelize_in_place(lora_fused, model))[0].fused


def test_forward_of_another_tool(lora_fused):
    model, layer = peft_linear(CASE, torch.float32, torch.float32)
    layer.base_layer.forward = lambda x: x[..., :16] * 2
    ours = kernelize_in_place(lora_fused, model)
    assert "forward of its own" in explain(lora_fused, ours)[0].reason
    x = torch.randn(6, 32)
    assert torch.equal(ours(x), type(layer).forward(layer, x))


def test_meta_and_sharded(lora_fused):
    model, layer = peft_linear(CASE, torch.float32, torch.float32)
    ours = kernelize_in_place(lora_fused, model)
    layer.base_layer.weight = nn.Parameter(torch.empty(16, 32, device="meta"))
    assert "meta" in explain(lora_fused, ours)[0].reason
    layer.base_layer.weight = nn.Parameter(torch.empty(0))
    assert "sharded or replaced" in explain(lora_fused, ours)[0].reason

    class Sharded(torch.Tensor):
        pass

    layer.base_layer.weight = nn.Parameter(torch.randn(16, 32).as_subclass(Sharded))
    assert "Sharded" in explain(lora_fused, ours)[0].reason


def test_dtypes_that_peft_refuses_stay_refused(lora_fused):
    model, _ = peft_linear(CASE, torch.bfloat16, torch.float32)
    ours = kernelize_in_place(lora_fused, copy.deepcopy(model))
    with pytest.raises(RuntimeError) as theirs:
        model(torch.randn(6, 32))
    with pytest.raises(RuntimeError) as mine:
        ours(torch.randn(6, 32))
    assert str(mine.value) == str(theirs.value)


def test_explain_covers_every_module_and_prints(lora_fused):
    model = peft_llama()
    with pytest.warns(UserWarning, match="not kernelized"):
        assert not any(row.fused for row in lora_fused.explain(model))
    rows = lora_fused.explain(kernelize_in_place(lora_fused, model))
    names = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {row.module for row in rows} == names and len(rows) == 14
    assert all(row.fused and row.backend == "native" and row.group for row in rows)
    text = str(rows)
    assert text.startswith("14 of 14 LoRA modules fused") and "q_proj" in text


def test_nothing_fused_is_reported(lora_fused):
    with pytest.warns(UserWarning, match="no PEFT LoRA modules"):
        lora_fused.explain(nn.Linear(2, 2))
    model, _ = peft_linear(CASE, torch.float32, torch.float32, init_lora_weights="mica")
    with pytest.warns(UserWarning, match="none of the 1 LoRA modules is fused.*MiCA"):
        lora_fused.explain(kernelize_in_place(lora_fused, model))
    with pytest.raises(TypeError, match="^model: str"):
        lora_fused.explain("model")


def test_use_peft_layers_restores_the_class(lora_fused):
    from peft.tuners.lora import Linear

    before = {name: Linear.__dict__.get(name) for name in ("kernel_layer_name", "kernel_condition")}
    model, _ = peft_linear(CASE, torch.float32, torch.float32)
    with lora_fused.use_peft_layers():
        model = kernelize(model, mode=Mode.TRAINING, device=DEVICE)
    assert {name: Linear.__dict__.get(name) for name in before} == before
    assert explain(lora_fused, model)[0].fused
