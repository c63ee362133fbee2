"""Wrong input of every public function, in one table: an error of one sentence that names the argument, what was seen
and what was expected, before anything is changed."""

import functools
import inspect
import re
import types
import warnings

import pytest
import torch
from helpers.cases import peft_llama, tiny_llama
from helpers.heads import heads
from helpers.kernelizing import explain, forwards
from kernels import Mode, kernelize
from torch import nn

X, WEIGHT, A, B = torch.ones(5, 32), torch.ones(16, 32), torch.ones(4, 32), torch.ones(16, 4)
IDS, TABLE, TABLE_A, TABLE_B = torch.tensor([1]), torch.ones(33, 24), torch.ones(5, 33), torch.ones(24, 5)
ROWS, INDEX, ROUTING = torch.ones(5, 16), torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)


def ia3():
    import peft

    return peft.get_peft_model(tiny_llama(), peft.IA3Config(task_type="CAUSAL_LM"))


def weights(lora_fused, n):
    return lora_fused.ExpertWeights(torch.ones(2, n, 16), None, torch.ones(2, 3, 16), torch.ones(2, n, 3), 1.0)


def begins(lora_fused, model, **options):
    """As a trainer calls it."""
    lora_fused.LoraFusedCallback(**options).on_train_begin(None, None, None, model=model)


def linear(lora_fused, **given):
    return lora_fused.lora_linear(**{**dict(x=X, weight=WEIGHT, lora_a=A, lora_b=B, scaling=1.0), **given})


def projection(lora_fused):
    return lora_fused.Projection(lora_fused.Operands(WEIGHT, lora_a=A, lora_b=B))


def group(lora_fused, projections):
    return lora_fused.lora_linear_group(X, projections)


def embedding(lora_fused, ids, **given):
    return lora_fused.lora_embedding(ids, TABLE, TABLE_A, TABLE_B, 1.0, **given)


def experts(lora_fused, **given):
    right = dict(x=ROWS, index=INDEX, routing=ROUTING, up=weights(lora_fused, 32), down=weights(lora_fused, 16))
    return lora_fused.lora_experts(**{**right, **given})


def recorded(lora_fused):
    with lora_fused.record() as calls:
        return calls


# Public name, call, model, error and how it begins.
NO_PEFT = "model: {} has no PEFT LoRA modules; adapt it first: get_peft_model"
OF_MODELS = [
    row
    for name, call in (("apply", lambda f, model, **options: f.apply(model, **options)), ("LoraFusedCallback", begins))
    for row in (
        (name, call, lambda: ["model"], TypeError, "model: list, expected a torch.nn.Module"),
        (name, call, lambda: None, TypeError, "model: NoneType, expected a torch.nn.Module"),
        (name, call, tiny_llama, ValueError, NO_PEFT.format("LlamaForCausalLM")),
        (name, call, ia3, ValueError, NO_PEFT.format("PeftModelForCausalLM")),
        (name, call, nn.Sequential, ValueError, NO_PEFT.format("Sequential")),
        (name, functools.partial(call, mode="training"), heads, TypeError, "mode: 'training', expected a kernels.Mode"),
        (name, functools.partial(call, mode=1), heads, TypeError, "mode: 1, expected a kernels.Mode"),
        (name, functools.partial(call, mode=Mode.TORCH_COMPILE), heads, ValueError,
         "mode: Mode.TORCH_COMPILE, expected one that contains Mode.TRAINING or Mode.INFERENCE"),
    )
] + [
    ("restore", lambda f, m: f.restore(m), lambda: ["model"], TypeError, "model: list, expected a torch.nn.Module"),
    ("restore", lambda f, m: f.restore(m), lambda: X, TypeError, "model: Tensor, expected a torch.nn.Module"),
    ("explain", lambda f, m: f.explain(m), lambda: ["model"], TypeError, "model: list, expected a torch.nn.Module"),
    ("restore", lambda f, m: f.restore(type(m)), heads, TypeError, "model: the class PeftModel, expected a torch.nn"),
    ("explain", lambda f, m: f.explain([m]), heads, TypeError,
     "model: list, expected a torch.nn.Module, as get_peft_model returns it; it holds modules (0): give them one by"),
    ("LoraFusedCallback", lambda f, m: f.LoraFusedCallback(m), heads, TypeError, "mode: PeftModel, expected a kernels"),
    ("record", lambda f, m: recorded(f).of("q"), heads, TypeError, "module: str, expected a torch.nn.Module"),
    ("record", lambda f, m: recorded(f).by_module([m]), heads, TypeError, "model: list, expected a torch.nn.Module"),
    ("Row", lambda f, m: f.Explanation([m]), heads, TypeError, "rows: list, expected a list of Rows"),
    ("Explanation", lambda f, m: f.Explanation(3), heads, TypeError, "rows: 3, expected a list of Rows"),
    ("Explanation", lambda f, m: explain(f, m).filter(fused=1), heads, TypeError, "fused: 1, expected True"),
    ("explain", lambda f, m: f.explain(m, "8"), heads, TypeError, "rows: '8', expected an int"),
    ("explain", lambda f, m: f.explain(m, -1), heads, ValueError, "rows: -1, expected at least 0"),
    ("explain", lambda f, m: f.explain(m, calls=3), heads, TypeError, "calls: int, expected what `with lora_fused"),
    ("Explanation", lambda f, m: explain(f, m).filter(3), heads, TypeError, "pattern: 3, expected a str"),
    ("Explanation", lambda f, m: explain(f, m).filter(fused="no"), heads, TypeError, "fused: 'no', expected True"),
    ("Explanation", lambda f, m: explain(f, m).filter(backend=3), heads, TypeError, "backend: 3, expected a str"),
    ("Explanation", lambda f, m: explain(f, m).filter(reason=[0]), heads, TypeError, "reason: [0], expected a str"),
]  # fmt: skip
# Public name, call, error and how it begins.
OF_TENSORS = [
    ("lora_linear", lambda f: linear(f, x=None), TypeError, "x: NoneType, expected a torch.Tensor"),
    ("lora_linear", lambda f: linear(f, scaling="1"), TypeError, "scaling: '1', expected a finite number"),
    ("lora_linear", lambda f: linear(f, lora_a=A.to("meta")), ValueError, "lora_a: on meta, expected cpu"),
    ("lora_linear", lambda f: linear(f, scaling=WEIGHT), TypeError, "scaling: Tensor, expected a finite number"),
    ("lora_linear", lambda f: linear(f, scaling=[0.5] * 99), TypeError, "scaling: list, expected a finite number"),
    ("lora_linear", lambda f: linear(f, dropout=X), ValueError, "dropout: Tensor, expected a probability"),
    ("lora_linear", lambda f: linear(f, backend=X), TypeError, "backend: Tensor, expected 'native', 'reference'"),
    ("Operands", lambda f: group(f, [f.Projection(f.Operands(WEIGHT, absmax=X))]), ValueError, "absmax: Tensor, expe"),
    ("ProjectionSpec", lambda f: group(f, [projection(f)._replace(spec=f.ProjectionSpec(quantized="nf4"))]),
     ValueError, "quantized: 'nf4', expected None"),
    ("lora_embedding", lambda f: embedding(f, IDS, padding_idx=TABLE), ValueError, "padding_idx: Tensor, expected one"),
    ("Gate", lambda f: experts(f, gate=nn.SiLU), TypeError, "gate: the class SiLU, expected a Gate or a function"),
    ("Gate", lambda f: experts(f, gate=f.Gate(gated="no")), TypeError, "gate: gated 'no', expected True or False"),
    ("Gate", lambda f: experts(f, gate=f.Gate(limit="7")), TypeError, "gate: limit: '7', expected a finite number"),
    ("Gate", lambda f: experts(f, gate=f.Gate(slope=None)), TypeError, "gate: slope: None, expected a finite number"),
    ("Gate", lambda f: experts(f, gate=f.Gate(slope=0.0)), ValueError, "gate: slope 0, expected another number"),
    ("Gate", lambda f: experts(f, gate=f.Gate(offset=X)), TypeError, "gate: offset: Tensor, expected a finite number"),
    ("lora_linear", lambda f: linear(f, backend="mine"), ValueError, "backend: 'mine' is unknown, expected"),
    ("lora_linear_group", lambda f: group(f, None), TypeError, "projections: NoneType, expected a list"),
    ("lora_linear_group", lambda f: group(f, []), ValueError, "projections: empty, expected at least one"),
    ("lora_linear_group", lambda f: group(f, projection(f)), TypeError, "projections: Projection, expected a list"),
    ("lora_linear_group", lambda f: group(f, [WEIGHT]), TypeError, "projections: Tensor, expected each to be a Pro"),
    ("Projection", lambda f: group(f, [f.Projection(WEIGHT)]), TypeError, "operands: Tensor, expected Operands"),
    ("Operands", lambda f: group(f, [f.Projection(f.Operands(None))]), TypeError, "weight: NoneType, expected a torch"),
    ("ProjectionSpec", lambda f: group(f, [projection(f)._replace(spec="dense")]), TypeError,
     "spec: str, expected a ProjectionSpec"),
    ("compile_options", lambda f: f.compile_options("fast"), ValueError, "mode: 'fast', expected None or one of"),
    ("compile_options", lambda f: f.compile_options(["fast"]), ValueError, "mode: ['fast'], expected None or one of"),
    ("row_norm", lambda f: f.row_norm([1.0], A, B, 1.0), TypeError, "weight: list, expected a torch.Tensor"),
    ("row_norm", lambda f: f.row_norm(WEIGHT, A, B.T, 1.0), ValueError, "lora_b: shape (4, 16), expected"),
    ("lora_embedding", lambda f: embedding(f, [1]), TypeError, "ids: list, expected a torch.Tensor"),
    ("lora_embedding", lambda f: embedding(f, IDS.float()), TypeError, "ids: dtype torch.float32, expected one of"),
    ("lora_experts", lambda f: experts(f, index=[0]), TypeError, "index: list, expected a torch.Tensor"),
    ("ExpertWeights", lambda f: experts(f, up=ROWS), TypeError, "up: Tensor, expected ExpertWeights"),
    ("ExpertWeights", lambda f: experts(f, down=None), TypeError, "down: NoneType, expected ExpertWeights"),
    ("Gate", lambda f: experts(f, gate="silu"), TypeError, "gate: str, expected a Gate or a function"),
    ("Gate", lambda f: experts(f, gate=f.Gate("swish")), ValueError, "gate: activation 'swish'"),
]  # fmt: skip


def says(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}")


@pytest.mark.parametrize("name,call,make,error,message", OF_MODELS)
def test_of_models(lora_fused, name, call, make, error, message):
    model = make()
    before = forwards(model) if isinstance(model, nn.Module) else None
    with says(error, message) as raised:
        call(lora_fused, model)
    assert "\n" not in str(raised.value)
    assert before is None or forwards(model) == before


@pytest.mark.parametrize("name,call,error,message", OF_TENSORS)
def test_of_tensors(lora_fused, name, call, error, message):
    with says(error, message) as raised:
        call(lora_fused)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("call", (linear, lambda f, **backend: embedding(f, IDS, **backend)))
def test_triton_on_a_cpu(lora_fused, monkeypatch, call):
    """Which is its interpreter's in these tests."""
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with says(ValueError, "backend: 'triton' takes tensors on a GPU, these are on cpu"):
        call(lora_fused, backend="triton")


def test_what_is_right_raises_nothing(lora_fused):
    assert linear(lora_fused).shape == group(lora_fused, [projection(lora_fused)])[0].shape == (5, 16)
    assert embedding(lora_fused, IDS).shape == (1, 24) and experts(lora_fused).shape == (5, 16)
    assert all(row.fused for row in lora_fused.explain(lora_fused.apply(heads())))


def test_the_table_has_every_public_name(lora_fused):
    """But for the layers, which are PEFT's modules' forwards, and what takes no argument."""
    without = {name for name in lora_fused.__all__ if name.endswith("_peft_layers")}
    assert all(not inspect.signature(getattr(lora_fused, name)).parameters for name in without) and len(without) == 3
    assert {row[0] for row in (*OF_MODELS, *OF_TENSORS)} == {*lora_fused.__all__} - without - {"layers"}


@pytest.mark.parametrize("make", (tiny_llama, nn.Sequential, ia3))
def test_explain_says_that_there_is_nothing(lora_fused, make):
    model = make()
    with pytest.warns(UserWarning, match=f"^lora_fused: {type(model).__name__} has no PEFT LoRA modules, .*: get_peft"):
        assert len(lora_fused.explain(model)) == 0


def of_another_build(model):
    names = {"__name__": "_lora_fused_cpu_1234567.layers"}
    exec("def forward(self, x, *args, **kwargs):\n    raise AssertionError('another build')\n", names)
    names["forward"].__qualname__ = "LoraLinear.forward"
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.forward = types.MethodType(names["forward"], module)
    return model


STATES = {
    "not kernelized": (lambda lora_fused, model: model, "not kernelized: no forward of this kernel"),
    "another build": (lambda lora_fused, model: of_another_build(model), "kernelized by another build of this kernel"),
    "meta": (lambda lora_fused, model: lora_fused.apply(model).to("meta"), "its tensors are on the meta device"),
}


@pytest.mark.parametrize("change,reason", STATES.values(), ids=STATES)
def test_explain_says_what_to_do(lora_fused, change, reason):
    """One reason for all modules, with a suggestion in what is printed."""
    model = change(lora_fused, peft_llama())
    with pytest.warns(UserWarning, match=reason) as warned:
        found = lora_fused.explain(model)
    assert str(warned[0].message).endswith(f"{found[0].reason}; {found[0].suggestion}")
    assert len(found) == 14 and {row.fused for row in found} == {False}
    (said,) = found.to_dict()["reasons"]
    assert said["modules"] == 14 and said["suggestion"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert said["suggestion"] in str(found)


# ---- another device, as a Mac's: rehearsed by the meta device, said to be one ----

ON_MPS = "on mps, a device without layers of this kernel"


@pytest.fixture
def no_cpu(lora_fused, monkeypatch):
    assert lora_fused.backends.select.device_reason(torch.device("mps")) == ON_MPS
    assert lora_fused.backends.select.device_reason(torch.device("meta")) == "on the meta device"
    monkeypatch.setattr(lora_fused.backends.select, "device_reason", lambda device: ON_MPS)


def says_mps(lora_fused, model, reason, modules):
    with pytest.warns(UserWarning, match=reason):
        found = lora_fused.explain(model).to_dict()
    assert found["fused"] == 0 and {row["reason"] for row in found["rows"]} == {reason}
    assert len(found["rows"]) == modules and len(found["reasons"]) == 1
    assert found["reasons"][0]["suggestion"].startswith("move the model to a CPU or a CUDA GPU")


def test_a_model_that_moves_to_a_device_without_layers(lora_fused, no_cpu):
    """PEFT's forward runs there, not an op that the device has not."""
    model = lora_fused.apply(peft_llama())
    says_mps(lora_fused, model.to("meta"), f"its tensors are {ON_MPS}", 14)
    with lora_fused.record() as calls:
        model(input_ids=torch.zeros(1, 3, dtype=torch.int64, device="meta"))
    assert calls.fused == 0 and set(calls.total) >= {f"its tensors are {ON_MPS}"}


def test_a_model_kernelized_on_a_device_without_layers(lora_fused, no_cpu):
    """`kernelize` has bound the class's own forward by then. What is on a CPU here is not said to be."""
    model = peft_llama()
    with lora_fused.use_peft_layers():
        kernelize(model, mode=Mode.TRAINING, device="mps")
    for parameter in model.parameters():
        parameter.__class__ = OnMps
    says_mps(lora_fused, model, f"not kernelized: its tensors are {ON_MPS}", 14)


class OnMps(nn.Parameter):
    is_cpu = is_cuda = is_meta = False
