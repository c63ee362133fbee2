"""`explain` against the truth: PEFT's own forward calls are counted, module by module."""

import copy
import pickle

import pytest
import torch
from helpers.cases import DEVICE, LINEARS, peft_llama, tiny_llama
from helpers.explained import TOKENS, add_adapter, disable, evaluate, holds, in_graphs, train
from helpers.kernelizing import explain, kernelize_in_place
from helpers.mlps import LigerSwiGLUMLP
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn

pytestmark = pytest.mark.usefixtures("on_device")


def under_autocast(model):
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        train(model)


@pytest.mark.parametrize("dora", (False, True))
@pytest.mark.parametrize("run", (train, evaluate, under_autocast))
def test_eager(lora_fused, own_calls, run, dora):
    rows = holds(lora_fused, kernelize_in_place(lora_fused, peft_llama(use_dora=dora)), own_calls, run, fused=14)
    assert {row.backend for row in rows} == {"native"}


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing(lora_fused, own_calls, reentrant):
    model = kernelize_in_place(lora_fused, peft_llama(lora_dropout=0.1))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    holds(lora_fused, model, own_calls, fused=14)


def test_before_the_first_call(lora_fused):
    rows = explain(lora_fused, kernelize_in_place(lora_fused, peft_llama()))
    assert all(row.fused and row.last is None for row in rows)


def test_small_batches(lora_fused, own_calls, monkeypatch):
    monkeypatch.setattr(lora_fused.peft.small_batch, "_SMALL_ANYWHERE", True)
    monkeypatch.setattr(lora_fused.peft.small_batch, "SMALL_ROWS", 512)
    monkeypatch.setattr(lora_fused.peft.small_batch, "FEW_TRACED_ROWS", 64)
    model = kernelize_in_place(lora_fused, peft_llama())
    with torch.no_grad():
        rows = holds(lora_fused, model, own_calls, evaluate, fused=0)
    assert {row.reason for row in rows} == {lora_fused.peft.small_batch.SMALL}
    model.compile(backend="eager")  # a graph does not wait for the host
    with torch.no_grad():
        few, more = (explain(lora_fused, model, rows) for rows in (TOKENS, 65))
    assert {row.reason for row in few} == {lora_fused.peft.small_batch.FEW_TRACED} and in_graphs(more)


def hook(model):
    for layer in model.base_model.model.model.layers:
        layer.self_attn.q_proj.lora_A.default.register_forward_hook(lambda *_: None)
        layer.mlp.up_proj.base_layer.register_forward_hook(lambda *_: None)


def replace_forward(model):
    for layer in model.base_model.model.model.layers:
        down = layer.mlp.down_proj
        down.lora_dropout.default.forward = lambda x: x


def drop_a_forward(model):
    """As a model that gets another adapter after it was kernelized."""
    for layer in model.base_model.model.model.layers:
        del layer.self_attn.k_proj.forward


@pytest.mark.parametrize(
    "change,fused",
    (
        (disable, 0),
        (lambda m: m.merge_adapter(), 0),
        (add_adapter, 0),
        (hook, 10),
        (replace_forward, 12),
        (drop_a_forward, 12),
    ),
    ids=("disabled", "merged", "several", "hooks", "another's forward", "not kernelized"),
)
def test_fallbacks(lora_fused, own_calls, change, fused):
    model = kernelize_in_place(lora_fused, peft_llama())
    train(model)
    change(model)
    run = evaluate if fused == 0 else train
    rows = holds(lora_fused, model, own_calls, run, fused=fused)
    assert all(row.fused or row.reason for row in rows)


def test_a_state_that_has_changed_since_the_last_call_shows(lora_fused, own_calls):
    model = kernelize_in_place(lora_fused, peft_llama())
    disable(model)
    evaluate(model)
    model.base_model.enable_adapter_layers()
    rows = explain(lora_fused, model)
    assert all(row.fused and row.last == "adapters are disabled" for row in rows)
    assert "last call: adapters are disabled" in str(rows)


# ---- what is not kernelized, and why ----


def test_a_device_without_layers(lora_fused):
    lora_fused.register_peft_layers()
    model = kernelize(peft_llama(), mode=Mode.TRAINING, device="xpu")
    assert all("kernelize() without our layers" in row.reason for row in explain(lora_fused, model))


@pytest.mark.parametrize("register", (True, False))
def test_not_kernelized_yet(lora_fused, register):
    (lora_fused.register_peft_layers if register else lora_fused.unregister_peft_layers)()
    (said,) = explain(lora_fused, peft_llama()).to_dict()["reasons"]
    assert said["reason"] == "not kernelized: no forward of this kernel is bound"
    assert said["suggestion"] == "run lora_fused.apply(model)"


def test_another_build_of_this_kernel(lora_fused, own_calls):
    import types

    model = peft_llama()
    source = "def forward(self, x, *args, **kwargs):\n    return type(self).forward(self, x, *args, **kwargs)\n"
    names = {"__name__": "_lora_fused_cpu_1234567.layers"}
    exec(source, names)
    names["forward"].__qualname__ = "LoraLinear.forward"
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = types.MethodType(names["forward"], module)
    rows = holds(lora_fused, model, own_calls, fused=0)
    assert {row.reason for row in rows} == {"kernelized by another build of this kernel, _lora_fused_cpu_1234567"}


def test_a_shallow_copy_is_bound_to_its_original(lora_fused):
    model = kernelize_in_place(lora_fused, peft_llama())
    attention = model.base_model.model.model.layers[0].self_attn
    attention.q_proj = copy.copy(attention.q_proj)
    rows = explain(lora_fused, model)
    assert [row.fused for row in rows].count(False) == 1
    assert "bound to another module" in next(row.reason for row in rows if not row.fused)
    assert all(row.fused for row in explain(lora_fused, kernelize_in_place(lora_fused, model)))


def test_a_pickled_model(lora_fused, own_calls):
    model = kernelize_in_place(
        lora_fused, get_peft_model(nn.Sequential(nn.Linear(16, 16)), LoraConfig(r=4, target_modules=["0"]))
    )
    loaded = pickle.loads(pickle.dumps(model))
    rows = holds(lora_fused, loaded, own_calls, lambda each: each(torch.randn(3, 16)), fused=0)
    assert all("as pickle and kernelize" in row.reason for row in rows)
    assert all(row.fused for row in explain(lora_fused, kernelize_in_place(lora_fused, loaded)))


def test_gated_mlps_that_are_not_one_function(lora_fused, own_calls):
    base = tiny_llama()
    base.model.layers[0].mlp = LigerSwiGLUMLP(base.model.layers[0].mlp)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=LINEARS, task_type="CAUSAL_LM"))
    rows = holds(lora_fused, kernelize_in_place(lora_fused, model), own_calls, fused=14)
    assert sum(row.mlp is not None for row in rows) == 3
    assert all(("layers.0.mlp" in row.module) == (row.mlp is not None) for row in rows)
    assert "its MLP is not one Function: " in str(rows)
    assert {row.layer for row in rows if "layers.1.mlp" in row.module} == {"LoraGatedMLP"}


def test_fused_delta(lora_fused, own_calls):
    pytest.importorskip("bitsandbytes")
    from helpers.quantized import eight_bit, replace

    base = replace(tiny_llama(torch.bfloat16), lambda linear: eight_bit(linear, DEVICE), LINEARS)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=LINEARS, task_type="CAUSAL_LM"))
    rows = holds(lora_fused, kernelize_in_place(lora_fused, model), own_calls, fused=14)
    assert {row.backend for row in rows} == {"fused delta"}


def test_what_is_forgotten(lora_fused):
    """Notes go with their modules."""
    import gc

    notes = lora_fused.last_call.notes
    model = kernelize_in_place(lora_fused, peft_llama())
    train(model)
    known = {id(module) for module in model.modules()} & notes.keys()
    assert len(known) > 8
    del model
    gc.collect()
    assert not known & notes.keys()
