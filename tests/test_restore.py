"""`restore` beside other tools: their forwards stay, what they keep of ours is named, and what ran before is
forgotten."""

import copy
import functools
import logging
import types

import accelerate
import pytest
import torch
from helpers.cases import peft_llama
from helpers.heads import heads, inner
from helpers.kernelizing import explain, forwards, ours_in
from helpers.llamas import passed, tokens
from transformers.models.llama.modeling_llama import LlamaRMSNorm

pytestmark = pytest.mark.usefixtures("on_device")


def test_forwards_of_others_stay(lora_fused):
    model = lora_fused.apply(peft_llama())
    hooked = [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
    for module in hooked:
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
    theirs = q_proj.forward = types.MethodType(type(q_proj).forward, q_proj)
    before = [vars(module)["forward"] for module in hooked]
    lora_fused.restore(model)
    assert [vars(module)["forward"] for module in hooked] == before and len(before) == 5
    assert vars(q_proj)["forward"] is theirs


def test_what_a_hook_calls_is_the_modules_own(lora_fused):
    """accelerate keeps the forward that it found, which was ours."""
    model = heads()
    ours = lora_fused.apply(copy.deepcopy(model))
    accelerate.hooks.add_hook_to_module(inner(ours).q, accelerate.hooks.ModelHook())
    lora_fused.restore(ours)
    assert ours_in(lora_fused, ours) == []
    x = torch.randn(40, 32, dtype=torch.float64)
    assert torch.equal(ours(x), model(x))
    accelerate.hooks.remove_hook_from_module(inner(ours).q)
    assert ours_in(lora_fused, ours) == [] and torch.equal(ours(x), model(x))


WRAPPERS = {
    "wraps": lambda forward: functools.wraps(forward)(lambda *args: forward(*args)),
    "closure": lambda forward: lambda x: forward(x),
    "default": lambda forward: lambda x, inner=forward: inner(x),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_forward_of_ours_that_another_tool_keeps(lora_fused, caplog, wrap):
    """It is called, which explain says; restore cannot take it, and says where it is."""
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = lora_fused.apply(copy.deepcopy(model))
    layer, first = inner(ours).k, vars(inner(ours).k)["forward"]
    theirs = layer.forward = wrap(first)
    for _ in range(2):
        with lora_fused.record() as calls:
            torch.testing.assert_close(ours(x), model(x))
    rows = {row.module.rpartition(".")[2]: row for row in lora_fused.explain(ours, calls=calls)}
    assert {name: (row.calls, row.group) for name, row in rows.items()} == dict(
        q=((("fused", 1),), "q+v"), k=((("fused", 1),), "single"), v=((("fused", 1),), "q+v")
    )
    with caplog.at_level(logging.WARNING, logger="lora_fused"):
        lora_fused.restore(ours)
    (text,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert text.startswith("another tool's forward keeps ours and calls it, on 1 modules (base_model.model.k: test_re")
    assert layer.forward is theirs
    layer.forward = first  # undone
    caplog.clear()
    assert ours_in(lora_fused, lora_fused.restore(ours)) == [] and forwards(ours) == {} and caplog.records == []


def test_a_forward_of_another_module_that_is_kept(lora_fused, caplog):
    """Which computes that one: nothing is said to be fused of the module in whose place it runs."""
    ours = lora_fused.apply(heads(rank_pattern={}))
    q, k = inner(ours).q, inner(ours).k
    k.forward = WRAPPERS["closure"](vars(q)["forward"])
    rows = {row.module.rpartition(".")[2]: row for row in explain(lora_fused, ours)}
    assert not rows["k"].fused and rows["k"].reason.startswith("another tool set its forward: test_restore.")
    assert rows["q"].fused and rows["v"].fused
    caplog.clear()
    lora_fused.restore(ours)
    assert ["base_model.model.k" in record.getMessage() for record in caplog.records] == [True]


def test_applied_anew_after_restoring(lora_fused):
    """What ran before does not count: not what PEFT's forward has run in between, nor that it was in a graph."""
    torch.compiler.reset()
    model = lora_fused.apply(peft_llama(shape=dict(num_hidden_layers=1)))
    passed(torch.compile(model, backend="eager"), tokens())
    assert {row.last for row in explain(lora_fused, model)} == {lora_fused.last_call.TRACED}
    passed(lora_fused.restore(model), tokens())
    lora_fused.apply(model)
    assert {(row.last, row.backend) for row in explain(lora_fused, model)} == {(None, "native")}
