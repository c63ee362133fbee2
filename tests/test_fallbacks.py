"""Every state that is not fused gives PEFT's own result, bit for bit, and `explain` says why."""

import copy
import warnings

import pytest
import torch
from helpers.cases import DEVICE, Case, peft_linear, peft_llama
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import KasaConfig, MontecloraConfig, VeloraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("on_device")
CASE = Case((6,), 32, 16, 4, bias=True)


def kernelized(lora_fused, model):
    lora_fused.register_peft_layers()
    return kernelize(model, mode=Mode.TRAINING, device=DEVICE)


def explain(lora_fused, model, rows=8192):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lora_fused.explain(model, rows)


def assert_peft_runs(lora_fused, model, reason, inputs=None, **call):
    """Kernelized and plain give the same bits, the fused Function is not entered, explain agrees."""
    ours = kernelized(lora_fused, copy.deepcopy(model))
    rows = explain(lora_fused, ours)
    assert rows and not any(row.fused for row in rows), str(rows)
    assert all(reason in row.reason for row in rows), str(rows)
    inputs = torch.randn(6, 32) if inputs is None else inputs
    torch.manual_seed(3)
    expected = model(inputs, **call)
    torch.manual_seed(3)
    result = ours(inputs, **call)
    assert torch.equal(result, expected)
    if result.requires_grad:
        assert not uses_fused_function(result)


def uses_fused_function(result):
    seen, queue = set(), [result.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        if "LoraLinearFunction" in node.name() or "NativeGroupFunction" in node.name():
            return True
        seen.add(node)
        queue.extend(parent for parent, _ in node.next_functions)
    return False


def test_the_probe_sees_the_fused_function(lora_fused):
    model, _ = peft_linear(CASE, torch.float32, torch.float32)
    assert uses_fused_function(kernelized(lora_fused, model)(torch.randn(6, 32)))


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
    ours = kernelized(lora_fused, model)
    x = torch.randn(6, 32)
    with plain.disable_adapter():
        expected = plain(x)
    with ours.disable_adapter():
        assert torch.equal(ours(x), expected)
    plain.merge_adapter(), ours.merge_adapter()
    assert torch.equal(ours(x), plain(x))
    plain.unmerge_adapter(), ours.unmerge_adapter()
    assert uses_fused_function(ours(x))
    torch.testing.assert_close(ours(x), plain(x))
    for each in (plain, ours):
        torch.manual_seed(5)
        each.add_adapter("second", LoraConfig(r=3, target_modules=["proj"], init_lora_weights=False))
        each.set_adapter("second")
    assert uses_fused_function(ours(x))
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
    ours = kernelized(lora_fused, copy.deepcopy(model)).eval()
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
    ours, x = kernelized(lora_fused, copy.deepcopy(model)), torch.randn(32)
    assert torch.equal(ours(x), model(x)) and not uses_fused_function(ours(x))


def test_dora_on_a_trained_conv1d(lora_fused):
    """PEFT wraps the transposed weight as a new parameter, which detaches a part of its gradient."""
    model, layer = peft_linear(Case((6,), 32, 16, 4, conv1d=True), torch.float32, torch.float32, use_dora=True)
    layer.base_layer.requires_grad_(True)
    assert_peft_runs(lora_fused, model, "DoRA on a trained Conv1D")


def test_dropout_is_fused_in_eval(lora_fused):
    model, _ = peft_linear(CASE, torch.float32, torch.float32, lora_dropout=0.3)
    plain = copy.deepcopy(model).eval()
    ours = kernelized(lora_fused, model).eval()
    x = torch.randn(6, 32)
    assert uses_fused_function(ours(x))
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
        assert explain(lora_fused, kernelized(lora_fused, model))[0].fused


def test_forward_of_another_tool(lora_fused):
    model, layer = peft_linear(CASE, torch.float32, torch.float32)
    layer.base_layer.forward = lambda x: x[..., :16] * 2
    ours = kernelized(lora_fused, model)
    assert "forward of its own" in explain(lora_fused, ours)[0].reason
    x = torch.randn(6, 32)
    assert torch.equal(ours(x), type(layer).forward(layer, x))


def test_meta_and_sharded(lora_fused):
    model, layer = peft_linear(CASE, torch.float32, torch.float32)
    ours = kernelized(lora_fused, model)
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
    ours = kernelized(lora_fused, copy.deepcopy(model))
    with pytest.raises(RuntimeError) as theirs:
        model(torch.randn(6, 32))
    with pytest.raises(RuntimeError) as mine:
        ours(torch.randn(6, 32))
    assert str(mine.value) == str(theirs.value)


def test_explain_covers_every_module_and_prints(lora_fused):
    model = peft_llama()
    with pytest.warns(UserWarning, match="not kernelized"):
        assert not any(row.fused for row in lora_fused.explain(model))
    rows = lora_fused.explain(kernelized(lora_fused, model))
    names = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {row.module for row in rows} == names and len(rows) == 14
    assert all(row.fused and row.backend == "native" and row.group for row in rows)
    text = str(rows)
    assert text.startswith("14 of 14 LoRA modules fused") and "q_proj" in text


@pytest.fixture
def computed(lora_fused, monkeypatch):
    """Names of the fused computations that run; this device is taken to wait for the host as a GPU does."""
    monkeypatch.setattr(lora_fused.peft.small_batch, "_SMALL_ANYWHERE", True)
    monkeypatch.setattr(lora_fused.peft.small_batch, "SMALL_ROWS", 512)
    names = []

    def spy(name):
        own = getattr(lora_fused.functional.dispatch, name)

        def call(*args, **kwargs):
            names.append(name)
            return own(*args, **kwargs)

        monkeypatch.setattr(lora_fused.functional.dispatch, name, call)

    spy("compute_group")
    spy("compute_gated")
    return names


@pytest.mark.parametrize(
    "rows,adapter,config,mode,own",
    [
        (512, torch.bfloat16, {}, "", True),
        (0, torch.bfloat16, {"lora_dropout": 0.1}, "", True),
        (513, torch.bfloat16, {}, "", False),
        (512, torch.bfloat16, {}, "grad", False),
        (512, torch.bfloat16, {}, "autocast", False),
        (1, torch.bfloat16, {}, "training", False),
        (1, torch.bfloat16, {"use_dora": True}, "", False),
        (4, torch.float32, {}, "", True),
        (5, torch.float32, {}, "", False),
    ],
)
def test_small_work_without_a_gradient(lora_fused, computed, rows, adapter, config, mode, own):
    model, layer = peft_linear(CASE, torch.bfloat16, adapter, **config)
    ours, x = kernelized(lora_fused, model).train(mode == "training"), torch.randn(rows, 32).bfloat16()
    grad, autocast = mode == "grad", mode == "autocast"
    with torch.set_grad_enabled(grad), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        torch.manual_seed(3)
        expected = type(layer).forward(layer, x)
        torch.manual_seed(3)
        result = ours(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = lora_fused.explain(ours, rows=rows)[0]
    assert computed == ([] if own else ["compute_group"])
    assert row.fused != own and (row.reason == lora_fused.peft.small_batch.SMALL) == own, row
    if own:
        assert torch.equal(result, expected)


@pytest.mark.parametrize(
    "rows,config,adapter,own",
    [
        (512, {}, torch.bfloat16, True),
        (513, {}, torch.bfloat16, False),
        (1, {}, torch.float32, False),
        (1, {"lora_dropout": 0.1}, torch.bfloat16, False),
        (1, {"use_dora": True}, torch.bfloat16, False),
    ],
)
def test_small_training_of_a_linear_alone(lora_fused, computed, rows, config, adapter, own):
    """From the call on at which it is known to be alone, with PEFT's own results."""
    model, layer = peft_linear(CASE, torch.bfloat16, adapter, **config)
    ours, x = kernelized(lora_fused, model), torch.randn(rows, 32).bfloat16().requires_grad_()
    for _ in range(2):
        ours(x.detach().clone().requires_grad_()).sum().backward()
    assert computed == ["compute_group"] * 2
    result = ours(x)
    assert len(computed) == (2 if own else 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = lora_fused.explain(ours, rows=rows)[0]
    assert row.fused != own and (row.reason == lora_fused.peft.small_batch.SMALL_ALONE) == own, row
    if own:
        assert torch.equal(result, type(layer).forward(layer, x))
    ours(torch.randn(513, 32).bfloat16())
    assert len(computed) == (3 if own else 4)


@pytest.mark.parametrize("reentrant", (True, False))
def test_small_training_alone_is_computed_again_as_it_was(lora_fused, computed, reentrant):
    """Two graphs wait, the first of a call before the linear was known to be alone: each saves what it saved."""
    ours = kernelized(lora_fused, peft_linear(CASE, torch.bfloat16, torch.bfloat16)[0])
    layer = ours.base_model.model.proj
    ys, expected = [], []
    for i in range(5):
        x = torch.randn(6, 32).bfloat16().requires_grad_()
        ys.append((x, checkpoint(ours, x, use_reentrant=reentrant)))
        with torch.no_grad():
            expected.append(type(layer).forward(layer, x))
        if i == 2:
            ys[0][1].sum().backward()
            ys[1][1].sum().backward()
            ys[2][1].sum().backward()
    for _, y in ys[3:]:
        y.sum().backward()
    for (x, y), truth in zip(ys, expected):
        torch.testing.assert_close(y, truth, rtol=2**-6, atol=2**-6)
        assert x.grad.any()
    assert 0 < len(computed) < 10  # the last calls are PEFT's


def test_small_training_of_siblings_stays_a_group(lora_fused, computed):
    """Those that run alone in the model are PEFT's, q, k and v are not."""
    ours, ids = kernelized(lora_fused, peft_llama()), torch.arange(8)[None]
    for _ in range(3):
        ours(ids).logits.sum().backward()
    computed.clear()
    ours(ids)
    layers = ours.base_model.model.model.layers
    assert sorted(computed) == ["compute_gated"] * len(layers) + ["compute_group"] * len(layers)


def test_a_reentrant_checkpoint_keeps_its_masks(lora_fused, computed):
    """Its forward has no gradient, what it computes again has: y = J x + b and dx = Jᵀ dy with one mask in J."""
    ours = kernelized(lora_fused, peft_linear(CASE, torch.float32, torch.float32, lora_dropout=0.5)[0])
    x, dy = torch.randn(6, 32, requires_grad=True), torch.randn(6, 16)
    y = checkpoint(ours, x, use_reentrant=True)
    y.backward(dy)
    bias = ours.base_model.model.proj.base_layer.bias
    torch.testing.assert_close(((y - bias) * dy).sum(), (x * x.grad).sum())
    assert len(computed) == 2


@pytest.mark.parametrize("tokens,own", ((512, True), (513, False)))
def test_a_small_model_without_a_gradient(lora_fused, computed, tokens, own):
    model = peft_llama().eval()
    ours, ids = kernelized(lora_fused, copy.deepcopy(model)), torch.arange(tokens)[None] % 50
    with torch.no_grad():
        expected, result = model(ids).logits, ours(ids).logits
    assert bool(computed) != own and ("compute_gated" in computed) != own
    assert torch.equal(result, expected) == own
    torch.testing.assert_close(result, expected)
    computed.clear()
    ours(ids)
    assert {"compute_group", "compute_gated"} <= set(computed)


def test_a_sibling_that_peft_computes_is_not_computed_ahead(lora_fused, computed, monkeypatch):
    model = peft_llama()
    for name, parameter in model.named_parameters():
        if "q_proj.lora" in name:
            parameter.data = parameter.data.bfloat16()
    ours, ids = kernelized(lora_fused, model).eval(), torch.arange(8)[None]
    for _ in range(2):
        ours(ids)
    sizes, own = [], lora_fused.functional.dispatch.compute_group
    monkeypatch.setattr(
        lora_fused.functional.dispatch,
        "compute_group",
        lambda x, group, **_: sizes.append(len(group)) or own(x, group, **_),
    )
    ours(ids)
    assert max(sizes) == 3
    sizes.clear()
    with torch.no_grad():
        ours(ids)
    assert sizes == [1, 1]  # the queries of both layers


def test_nothing_fused_is_reported(lora_fused):
    with pytest.warns(UserWarning, match="no PEFT LoRA modules"):
        lora_fused.explain(nn.Linear(2, 2))
    model, _ = peft_linear(CASE, torch.float32, torch.float32, init_lora_weights="mica")
    with pytest.warns(UserWarning, match="none of the 1 LoRA modules is fused.*MiCA"):
        lora_fused.explain(kernelized(lora_fused, model))
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
