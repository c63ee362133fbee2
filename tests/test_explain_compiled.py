"""`explain` of models that torch.compile traces: what a graph has, against the calls of PEFT's own forward."""

import pytest
import torch
import transformers
from helpers.cases import DEVICE, peft_llama
from helpers.explained import add_adapter, disable, evaluate, holds, in_graphs, tokens, train
from helpers.kernelizing import explain, kernelize_in_place
from kernels import Mode, kernelize

pytestmark = pytest.mark.usefixtures("on_device")


def compile_model(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def compile_layers(model):
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="eager")
    return model


def compile_regions(model):
    from accelerate.utils import compile_regions

    return compile_regions(model, backend="eager")


def compile_the_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize(
    "compiled",
    (compile_model, compile_in_place, compile_layers, compile_regions, compile_the_forward),
    ids=lambda f: f.__name__,
)
def test_compiled(lora_fused, own_calls, compiled):
    """What runs is asked of the model that was kernelized, which may not know who compiles it."""
    torch.compiler.reset()
    model = kernelize_in_place(lora_fused, peft_llama(shape=dict(num_hidden_layers=1)))
    evaluate(model)
    wrapped = compiled(model)
    if wrapped is model and compiled is not compile_the_forward:  # it shows before the first call
        assert in_graphs(explain(lora_fused, model))
    rows = holds(lora_fused, wrapped, own_calls, evaluate, again=False, fused=7, root=model)
    assert in_graphs(rows) and {row.group for row in rows} == {None, "base_model.model.model.layers.0.mlp"}
    evaluate(wrapped)  # no trace, and what is said stays
    assert in_graphs(explain(lora_fused, model)) and in_graphs(explain(lora_fused, wrapped))
    assert {row.last for row in explain(lora_fused, model)} == {lora_fused.last_call.TRACED}
    if wrapped is not model and compiled is compile_model:
        rows = holds(lora_fused, model, own_calls, fused=7)  # called past the compiler
        assert {row.backend for row in rows} == {"native"}


def test_a_compiled_function(lora_fused, own_calls):
    torch.compiler.reset()
    model = kernelize_in_place(lora_fused, peft_llama(shape=dict(num_hidden_layers=1)))
    rows = holds(lora_fused, model, own_calls, torch.compile(train, backend="eager"), again=False, fused=7)
    assert in_graphs(rows)


@pytest.mark.parametrize("change", (disable, lambda model: model.merge_adapter(), add_adapter))
def test_compiled_fallbacks(lora_fused, own_calls, change):
    """What a graph has of PEFT's own, and the reason of an eager call; fused again when it is called past the graph."""
    torch.compiler.reset()
    model = kernelize_in_place(lora_fused, peft_llama(shape=dict(num_hidden_layers=1)))
    model.compile(backend="eager")
    evaluate(model)
    assert in_graphs(explain(lora_fused, model))
    change(model)
    rows = holds(lora_fused, model, own_calls, evaluate, fused=0)
    assert len({row.reason for row in rows}) == 1 and not rows[0].reason.startswith("torch.compile")


def test_what_a_graph_does_not_have(lora_fused, own_calls):
    """A gated MLP whose activation Dynamo could not guard: its projections are fused alone."""
    torch.compiler.reset()
    model = kernelize_in_place(lora_fused, peft_llama(shape=dict(num_hidden_layers=1)))
    model.base_model.model.model.layers[0].mlp.act_fn.extra = torch.zeros(())
    assert all(row.mlp is None for row in holds(lora_fused, model, own_calls, evaluate, fused=7))
    model.compile(backend="eager")
    rows = holds(lora_fused, model, own_calls, evaluate, fused=7)
    assert [row.mlp for row in rows[4:]] == ["torch.compile: act_fn holds more than numbers and text"] * 3
    assert {row.group for row in rows} == {None} and all("torch.compile: act_fn" in str(rows) for _ in rows)


def test_another_model_that_is_compiled_changes_nothing(lora_fused, own_calls):
    torch.compiler.reset()
    model, other = (kernelize_in_place(lora_fused, peft_llama()) for _ in range(2))
    train(model)
    train(compile_model(other))
    assert all(row.fused and row.last == "fused" for row in explain(lora_fused, model))


def test_a_compiler_that_is_switched_off(lora_fused, own_calls):
    torch.compiler.reset()
    model = kernelize_in_place(lora_fused, peft_llama())
    compiled = compile_in_place(model)
    with torch._dynamo.config.patch(disable=True):
        holds(lora_fused, compiled, own_calls, fused=14)


def test_one_graph_serves_all_layers(lora_fused):
    """The note of a trace asks Dynamo for nothing that differs between the layers of a model."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    shape = dict(num_hidden_layers=4, use_cache=False)
    plain, model = peft_llama(shape=shape), kernelize_in_place(lora_fused, peft_llama(shape=shape))
    frames = []
    for each in (plain, model):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        evaluate(compile_layers(each))
        frames.append(dict(torch._dynamo.utils.counters["frames"]))
    assert frames[0] == frames[1] and frames[0]["ok"] < 4
    assert in_graphs(explain(lora_fused, model))


def test_trainer_that_compiles(lora_fused, own_calls, tmp_path):
    torch.compiler.reset()
    model = kernelize_in_place(lora_fused, peft_llama(shape=dict(num_hidden_layers=1)))
    data = [{"input_ids": ids, "labels": ids} for ids in tokens().cpu()]
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        use_cpu=DEVICE == "cpu", torch_compile=True, torch_compile_backend="eager", disable_tqdm=True,
    )  # fmt: skip
    with torch.device("cpu"):
        transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    assert not own_calls
    assert in_graphs(explain(lora_fused, model))


def test_modes_with_torch_compile(lora_fused, own_calls):
    """Our forwards are bound, which are traced, and serve eager calls as well."""
    lora_fused.register_peft_layers()
    for mode in (Mode.TRAINING | Mode.TORCH_COMPILE, Mode.INFERENCE | Mode.TORCH_COMPILE):
        model = kernelize(peft_llama(shape=dict(num_hidden_layers=1)), mode=mode, device=DEVICE)
        holds(lora_fused, model, own_calls, fused=7)
        torch.compiler.reset()
        assert in_graphs(holds(lora_fused, compile_in_place(model), own_calls, evaluate, fused=7))
