"""`apply` and `restore`: one call that binds our forwards, one that leaves none; what is logged; bad input."""

import copy
import logging
import types
import warnings

import pytest
import torch
from helpers.cases import DEVICE, LINEARS, OwnForwards, peft_llama, tiny_llama
from helpers.heads import heads, inner
from helpers.kernelizing import explain, forwards, kernelize_in_place, ours_in
from helpers.llamas import passed, same_bits, tokens
from kernels import Mode, kernelize, use_kernel_mapping
from kernels.layer.globals import _KERNEL_MAPPING
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

pytestmark = pytest.mark.usefixtures("on_device")
TARGETS = [*LINEARS, "embed_tokens"]
MARKED = (BaseTuner, PreTrainedModel, lora.Linear, lora.Embedding, LlamaMLP)


@pytest.fixture
def unregistered(monkeypatch):
    """A process in which nothing is kernelize_in_place, before and after."""
    for cls in MARKED:
        for name in ("kernel_layer_name", "kernel_condition"):
            monkeypatch.delattr(cls, name, raising=False)
    token = _KERNEL_MAPPING.set({})
    yield
    _KERNEL_MAPPING.reset(token)


def marks():
    return [(vars(cls).get("kernel_layer_name"), vars(cls).get("kernel_condition")) for cls in MARKED]


@pytest.mark.parametrize("mode", (None, Mode.TRAINING, Mode.INFERENCE, Mode.TRAINING | Mode.TORCH_COMPILE))
def test_applied(lora_fused, unregistered, mode):
    model = peft_llama(torch.float64, target_modules=TARGETS)
    ours, state = copy.deepcopy(model), list(model.state_dict())
    before = marks()
    assert lora_fused.apply(ours, *(() if mode is None else (mode,))) is ours
    rows = explain(lora_fused, ours)
    assert len(rows) == 15 and all(row.fused for row in rows)
    for _ in range(2):
        torch.testing.assert_close(passed(ours, tokens()), passed(model, tokens()), rtol=1e-11, atol=1e-11)
    assert marks() == before and _KERNEL_MAPPING.get() == {}
    assert list(ours.state_dict()) == state
    assert len(ours_in(lora_fused, ours)) == len(forwards(ours)) == 17


def test_one_line_is_logged_and_nothing_else(lora_fused, caplog):
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        lora_fused.apply(peft_llama())
        rest = [r for r in caplog.records if r.name != "lora_fused" and r.levelno >= logging.INFO]
    (record,) = [r for r in caplog.records if r.name == "lora_fused"]
    assert record.levelno == logging.INFO and rest == []
    assert record.getMessage() == (
        "14 of 14 LoRA modules fused, 100.0% of the adapter parameters (native 14); 2 gated MLPs, one Function each"
    )


def test_a_warning_where_nothing_is_fused(lora_fused, caplog):
    model = peft_llama()
    model.base_model.disable_adapter_layers()
    with caplog.at_level(logging.WARNING):
        lora_fused.apply(model)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("lora_fused", logging.WARNING)
    assert record.getMessage().startswith("0 of 14 LoRA modules fused, 0.0%")
    assert record.getMessage().endswith("PEFT's own forward: 14, adapters are disabled")


def test_loading_sets_up_no_handler(lora_fused):
    log = logging.getLogger("lora_fused")
    assert log.handlers == [] and log.level == logging.NOTSET


def test_applying_leaves_logging_to_the_user(lora_fused, monkeypatch, capsys):
    """`kernels` gives the root logger a handler, after which `basicConfig` would do nothing."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    lora_fused.apply(peft_llama())
    assert root.handlers == [] and capsys.readouterr().err == ""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    lora_fused.apply(peft_llama())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lora_fused: 14 of 14 LoRA modules fused")


@pytest.mark.parametrize(
    "bind", (lambda lora_fused, model: lora_fused.apply(model), kernelize_in_place), ids=("apply", "kernelize")
)
@pytest.mark.parametrize("dora", (False, True), ids=("LoRA", "DoRA"))
def test_restored(lora_fused, bind, dora):
    model = peft_llama(use_dora=dora, target_modules=TARGETS)
    ours = bind(lora_fused, copy.deepcopy(model))
    passed(ours, tokens())
    assert len(ours_in(lora_fused, ours)) == 17 and not same_bits(ours, model)
    assert lora_fused.restore(ours) is ours
    assert ours_in(lora_fused, ours) == [] and same_bits(ours, model)
    with OwnForwards() as calls:
        passed(ours, tokens())
    assert sum(calls.values()) == 15
    assert not any(row.fused for row in explain(lora_fused, ours))
    lora_fused.apply(ours)
    assert all(row.fused for row in explain(lora_fused, ours)) and not same_bits(ours, model)


@pytest.mark.parametrize("unload", ("unload", "merge_and_unload"))
def test_restored_after_unloading(lora_fused, unload):
    """Our forwards stay on the MLPs, which hold no adapter any more."""
    model = peft_llama()
    ours = lora_fused.apply(copy.deepcopy(model))
    passed(ours, tokens())
    ours, plain = getattr(ours, unload)(), getattr(model, unload)()
    assert len(ours_in(lora_fused, ours)) == 2
    lora_fused.restore(ours)
    for each in (ours, plain):
        each.requires_grad_(True)
    assert ours_in(lora_fused, ours) == [] == list(forwards(ours)) and same_bits(ours, plain)


def test_restored_while_merged(lora_fused):
    model = peft_llama()
    ours = lora_fused.apply(copy.deepcopy(model))
    for each in (ours, model):
        each.merge_adapter()
    lora_fused.restore(ours)
    for each in (ours, model):
        each.unmerge_adapter()
    assert ours_in(lora_fused, ours) == [] and same_bits(ours, model)


def test_another_builds_forwards_go_too(lora_fused):
    names = {"__name__": "_lora_fused_cuda_1234567.layers"}
    exec("def forward(self, x, *args, **kwargs):\n    raise AssertionError('another build')\n", names)
    model = peft_llama()
    ours = copy.deepcopy(model)
    for module in ours.modules():
        if type(module).__name__ == "Linear" and hasattr(module, "lora_A"):
            module.forward = types.MethodType(names["forward"], module)
    assert len(forwards(ours)) == 14
    lora_fused.restore(ours)
    assert forwards(ours) == {} and same_bits(ours, model)


def test_a_model_that_another_build_kernelized(lora_fused):
    """It is taken over: a forward of the layers' names is an earlier one of this kernel."""
    names = {"__name__": "_lora_fused_cpu_1234567.layers"}
    exec("def forward(self, x, *args, **kwargs):\n    raise AssertionError('another build')\n", names)
    names["forward"].__qualname__ = "LoraLinear.forward"
    model = peft_llama()
    ours = copy.deepcopy(model)
    for module in ours.modules():
        if hasattr(module, "lora_A"):
            module.forward = types.MethodType(names["forward"], module)
    assert not any(row.fused for row in explain(lora_fused, ours))
    lora_fused.apply(ours)
    assert all(row.fused for row in explain(lora_fused, ours))
    torch.testing.assert_close(passed(ours, tokens()), passed(model, tokens()), rtol=1e-4, atol=1e-6)


def test_unregistered(lora_fused, unregistered):
    before = marks()
    model = kernelize_in_place(lora_fused, peft_llama())
    assert all(row.fused for row in explain(lora_fused, model)) and marks() != before
    lora_fused.register_peft_layers()
    lora_fused.unregister_peft_layers()
    assert marks() == before
    lora_fused.unregister_peft_layers()
    assert all(
        row.fused for row in explain(lora_fused, kernelize(model, mode=Mode.TRAINING, device=DEVICE))
    )  # as it was
    other = kernelize(peft_llama(), mode=Mode.TRAINING, device=DEVICE)
    assert ours_in(lora_fused, other) == []
    lora_fused.register_peft_layers()
    assert len(ours_in(lora_fused, kernelize(other, mode=Mode.TRAINING, device=DEVICE))) == 16
    lora_fused.unregister_peft_layers()


@pytest.mark.parametrize("first_again", (False, True))
def test_registrations_end_in_any_order(lora_fused, unregistered, first_again):
    """Two of them, as of two builds in one process: the one that ends does not take the other away, nor does it come
    back with it."""
    before = marks()
    first, second = lora_fused.mapping.Marks(), lora_fused.mapping.Marks()
    for each in (first, second, *([first] if first_again else [])):
        each.mark_all()
    earlier, later = (second, first) if first_again else (first, second)
    earlier.restore()
    with use_kernel_mapping(lora_fused.mapping.layer_mapping()):
        assert len(ours_in(lora_fused, kernelize(peft_llama(), mode=Mode.TRAINING, device=DEVICE))) == 16
        later.restore()
        assert marks() == before
        assert ours_in(lora_fused, kernelize(peft_llama(), mode=Mode.TRAINING, device=DEVICE)) == []


@pytest.mark.parametrize("how", ("register_peft_layers", "use_peft_layers", "apply"))
def test_an_error_while_classes_are_marked_leaves_none(lora_fused, unregistered, monkeypatch, how):
    """As where a class of PEFT is another than this build knows."""

    def fails():
        raise AttributeError("ParamWrapper")

    before = marks()
    monkeypatch.setattr(lora_fused.peft.experts, "wrapper_class", fails)
    with pytest.raises(AttributeError, match="ParamWrapper"):
        if how == "use_peft_layers":
            with lora_fused.use_peft_layers():
                raise AssertionError("not reached")
        else:
            getattr(lora_fused, how)(*([heads()] if how == "apply" else []))
    assert marks() == before


def test_a_mark_that_is_over_and_was_put_back(lora_fused, unregistered):
    """As by a tool that restores a class's attributes to what it has seen."""
    kernelize_in_place(lora_fused, peft_llama())
    seen = {name: vars(LlamaMLP)[name] for name in ("kernel_layer_name", "kernel_condition")}
    lora_fused.unregister_peft_layers()
    for name, value in seen.items():
        setattr(LlamaMLP, name, value)
    rows = explain(lora_fused, kernelize_in_place(lora_fused, peft_llama()))
    assert {row.layer for row in rows} == {"LoraLinear", "LoraGatedMLP"}
    lora_fused.unregister_peft_layers()
    assert not {*seen} & {*vars(LlamaMLP)}


def test_unregistered_inside_of_a_block(lora_fused, unregistered):
    before = marks()
    lora_fused.register_peft_layers()
    with lora_fused.use_peft_layers():
        lora_fused.unregister_peft_layers()
        assert len(ours_in(lora_fused, kernelize(peft_llama(), mode=Mode.TRAINING, device=DEVICE))) == 16
    assert marks() == before


def test_under_torch_compile(lora_fused):
    torch.compiler.reset()
    model = peft_llama(shape=dict(num_hidden_layers=1))
    ours = lora_fused.apply(copy.deepcopy(model))
    compiled = torch.compile(ours, backend="eager")
    expected = passed(model, tokens())
    for change in (lambda: None, lambda: lora_fused.restore(compiled), lambda: lora_fused.apply(compiled)):
        change()
        torch.testing.assert_close(passed(compiled, tokens()), expected, rtol=1e-5, atol=1e-6)
    assert len(ours_in(lora_fused, ours)) == 8


class Wrapper(nn.Module):
    """As DistributedDataParallel holds a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_wrapped_model(lora_fused):
    model = peft_llama()
    wrapped = lora_fused.apply(Wrapper(copy.deepcopy(model)))
    assert all(row.fused for row in explain(lora_fused, wrapped)) and len(ours_in(lora_fused, wrapped)) == 16
    lora_fused.restore(wrapped)
    assert ours_in(lora_fused, wrapped) == [] and same_bits(wrapped, model)


class Pipeline:
    """As diffusers has them."""

    def __init__(self):
        self.unet, self.text_encoder, self.steps = heads(), heads(), 3


def on_two_gpus():
    model = nn.DataParallel(heads())
    model.device_ids = [0, 1]
    return model


BAD = {
    "not a module": (lambda: ["model"], {}, TypeError, "model: list, expected a torch.nn.Module"),
    "a class": (lambda: nn.Linear, {}, TypeError, "model: the class Linear, expected a torch.nn.Module"),
    "models": (
        lambda: [heads(), heads()],
        {},
        TypeError,
        r"model: list, expected .*; it holds modules \(0, 1\): give them one by one",
    ),
    "a pipeline": (
        Pipeline,
        {},
        TypeError,
        r"model: Pipeline, expected .*; it holds modules \(unet, text_encoder\): give them one by one",
    ),
    "on several GPUs": (on_two_gpus, {}, ValueError, "model: nn.DataParallel, .* start a process a GPU: torchrun"),
    "None": (lambda: None, {}, TypeError, "model: NoneType, expected"),
    "no PEFT model": (
        tiny_llama,
        {},
        ValueError,
        "LlamaForCausalLM has no PEFT LoRA modules; adapt it first: get_peft",
    ),
    "empty": (nn.Sequential, {}, ValueError, "Sequential has no PEFT LoRA modules"),
    "another adapter": (
        lambda: get_peft_model(tiny_llama(), __import__("peft").IA3Config(task_type="CAUSAL_LM")),
        {},
        ValueError,
        "PeftModelForCausalLM has no PEFT LoRA modules",
    ),
    "mode a word": (heads, dict(mode="training"), TypeError, "mode: 'training', expected a kernels.Mode"),
    "mode a bool": (heads, dict(mode=True), TypeError, "mode: True, expected a kernels.Mode"),
    "mode of mappings": (
        heads,
        dict(mode=Mode.FALLBACK),
        ValueError,
        "mode: Mode.FALLBACK, expected one that contains",
    ),
    "mode of neither": (heads, dict(mode=Mode.TORCH_COMPILE), ValueError, "expected one that contains Mode.TRAINING"),
}


@pytest.mark.parametrize("make,options,error,message", BAD.values(), ids=BAD)
def test_bad_input(lora_fused, make, options, error, message):
    model = make()
    before = dict(forwards(model)) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        lora_fused.apply(model, **options)
    if before is None:
        with pytest.raises(TypeError, match="expected a torch.nn.Module"):
            lora_fused.restore(model)
    else:
        assert forwards(model) == before


def test_restore_of_what_has_none_of_ours(lora_fused):
    for model in (nn.Sequential(), tiny_llama(), peft_llama()):
        before = dict(forwards(model))
        assert lora_fused.restore(model) is model and forwards(model) == before


def test_an_error_on_the_way_leaves_forwards_as_they_were(lora_fused, monkeypatch):
    import kernels

    model = heads()
    theirs = inner(model).v.forward = types.MethodType(type(inner(model).v).forward, inner(model).v)
    own, seen = kernels.kernelize, []

    def fails_third(*args, **kwargs):
        seen.append(own(*args, **kwargs))
        if len(seen) == 3:
            raise MemoryError("third")

    monkeypatch.setattr(kernels, "kernelize", fails_third)
    with pytest.raises(MemoryError, match="third"):
        lora_fused.apply(model)
    assert len(seen) == 3 and vars(inner(model).v)["forward"] is theirs
    assert list(forwards(model)) == [name for name, module in model.named_modules() if module is inner(model).v]


def test_applied_before_and_after_an_adapter_is_added(lora_fused):
    """A second adapter is served by the same modules, and new modules by applying again."""
    ours = lora_fused.apply(peft_llama(target_modules=["q_proj", "v_proj"]))
    ours.add_adapter("other", LoraConfig(r=2, target_modules=LINEARS, init_lora_weights=False))
    ours.set_adapter("other")
    assert sum(row.fused for row in explain(lora_fused, ours)) == 4
    lora_fused.apply(ours)
    assert sum(row.fused for row in explain(lora_fused, ours)) == 14
