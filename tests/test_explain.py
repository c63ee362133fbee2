"""`explain` against the truth: PEFT's own forward calls are counted, module by module."""

import copy
import pickle

import pytest
import torch
import transformers
from helpers.cases import DEVICE, LINEARS, peft_llama, tiny_llama
from helpers.kernelizing import explain, kernelize_in_place
from helpers.mlps import LigerSwiGLUMLP
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn

pytestmark = pytest.mark.usefixtures("on_device")
TOKENS = 18


@pytest.fixture
def own_calls(monkeypatch):
    """The modules whose own forward PEFT has entered."""
    entered, check = [], LoraLayer._check_forward_args

    def counted(self, *args, **kwargs):
        entered.append(self)
        return check(self, *args, **kwargs)

    monkeypatch.setattr(LoraLayer, "_check_forward_args", counted)
    return entered


def tokens():
    return torch.randint(0, 64, (2, TOKENS // 2), generator=torch.Generator(DEVICE).manual_seed(3))


def train(model):
    model.train()
    ids = tokens()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()


def evaluate(model):
    model.eval()
    with torch.no_grad():
        model(input_ids=tokens())


def under_autocast(model):
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        train(model)


def holds(lora_fused, model, own_calls, run=train, *, fused, again=True, rows=TOKENS, root=None):
    """What `explain` says of the next call and of the last one is what PEFT's forward has been entered for; `fused` is
    how many LoRA modules are. Asked of `root`, where the model that runs is another one's copy or wrapper."""
    root = model if root is None else root
    for _ in range(2 if again else 1):
        before = explain(lora_fused, root, rows)
        own_calls.clear()
        run(model)
    after = explain(lora_fused, root, rows)
    modules = dict(root.named_modules())
    entered = {id(module) for module in own_calls}
    assert len(after) == len(before) and len(after) > 0
    for row, earlier in zip(after, before):
        own = id(modules[row.module]) in entered
        if row.last != lora_fused.last_call.TRACED:  # by a graph, which tells nobody what it ran
            assert (row.last == "fused") != own, (row, own)
        assert row.fused != own, (row, own)
        assert row.fused == (row.reason is None) or row.backend == "fused delta", row
        if again:
            assert earlier.fused == row.fused, (earlier, row)
    assert sum(row.fused for row in after) == fused
    return after


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


def disable(model):
    model.base_model.disable_adapter_layers()


def add_adapter(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=LINEARS))
    model.base_model.set_adapter(["default", "other"])


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


# ---- torch.compile ----


def in_graphs(rows):
    return len(rows) > 0 and {(row.fused, row.backend) for row in rows} == {(True, "native, compiled")}


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


def test_trainer_that_compiles(lora_fused, own_calls, tmp_path, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(transformers.training_args, "enable_tf32", lambda enable: None)  # for the tests after this one
    model = kernelize_in_place(lora_fused, peft_llama(shape=dict(num_hidden_layers=1)))
    data = [{"input_ids": ids, "labels": ids} for ids in tokens().cpu()]
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        use_cpu=DEVICE == "cpu", torch_compile=True, torch_compile_backend="eager", disable_tqdm=True,
    )  # fmt: skip
    try:
        with torch.device("cpu"):
            transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False  # accelerate allows it where it compiles
    assert not own_calls
    assert in_graphs(explain(lora_fused, model))


# ---- what is not kernelized, and why ----


def test_modes_with_torch_compile(lora_fused, own_calls):
    """Our forwards are bound, which are traced, and serve eager calls as well."""
    lora_fused.register_peft_layers()
    for mode in (Mode.TRAINING | Mode.TORCH_COMPILE, Mode.INFERENCE | Mode.TORCH_COMPILE):
        model = kernelize(peft_llama(shape=dict(num_hidden_layers=1)), mode=mode, device=DEVICE)
        holds(lora_fused, model, own_calls, fused=7)
        torch.compiler.reset()
        assert in_graphs(holds(lora_fused, compile_in_place(model), own_calls, evaluate, fused=7))


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
