"""`record`: what really ran, held against the calls that enter PEFT's own forward, and its cost while it is not
used."""

import gc
import threading
from collections import Counter

import pytest
import torch
from helpers.cases import OwnForwards, peft_llama
from helpers.llamas import evaluated as evaluate, passed, tokens
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("on_device")
NAMES = [f"base_model.model.model.layers.{i}" for i in range(2)]


def applied(lora_fused, **config):
    return lora_fused.apply(peft_llama(**config))


def layer(model, i=0):
    return model.base_model.model.model.layers[i]


def train(model):
    passed(model.train(), tokens())


def recorded(lora_fused, model, run=train):
    """What was recorded, and how often PEFT's own forwards were entered."""
    with OwnForwards() as own, lora_fused.record() as calls:
        run(model)
    return calls, sum(own.values())


@pytest.mark.parametrize("run", (train, evaluate))
def test_fused_calls(lora_fused, run):
    """Four linears of attention and an MLP in each of two layers; each run, since notes change at a first call
    alone."""
    model = applied(lora_fused)
    for _ in range(3):
        calls, own = recorded(lora_fused, model, run)
        assert own == calls.own == 0 and calls.fused == 10 and calls.total == {"fused": 10}
        found = calls.by_module(model)
        expected = [f"{name}.self_attn.{p}_proj" for name in NAMES for p in "qkvo"] + [f"{name}.mlp" for name in NAMES]
        assert found == {name: {"fused": 1} for name in expected}


def test_own_calls_and_their_reasons(lora_fused):
    model = applied(lora_fused)
    layer(model).self_attn.q_proj.lora_A.default.register_forward_hook(lambda *_: None)
    layer(model).mlp.up_proj.register_forward_hook(lambda *_: None)
    calls, own = recorded(lora_fused, model)
    assert own == 1  # a hook on the layer itself is no reason for it, only for its MLP
    assert calls.of(layer(model).self_attn.q_proj) == {"lora_A has hooks": 1}
    assert calls.of(layer(model).mlp) == {"up_proj: the layer has hooks": 1}
    assert calls.of(layer(model).mlp.up_proj) == {"fused": 1}
    assert (calls.fused, calls.own) == (7 + 3 + 1, 2)
    assert str(calls).splitlines()[0] == "11 fused calls, 2 of the modules' own forwards"
    assert "    1 x lora_A has hooks" in str(calls).splitlines()


def test_counts_add_up_with_what_changes(lora_fused):
    model = applied(lora_fused)
    q = layer(model).self_attn.q_proj
    with lora_fused.record() as calls:
        evaluate(model)
        with model.disable_adapter():
            evaluate(model)
            evaluate(model)
        evaluate(model)
        evaluate(model)
    assert calls.of(q) == {"fused": 3, "adapters are disabled": 2}
    assert len(calls.by_module(model)) == 8 + 2 + 6  # a fallback MLP calls its projections


def test_explain_with_calls(lora_fused):
    model = applied(lora_fused)
    layer(model, 1).mlp.up_proj.base_layer.register_forward_hook(lambda *_: None)
    with lora_fused.record() as calls:
        train(model)
        train(model)
    rows = {row.module: row for row in lora_fused.explain(model, calls=calls)}
    assert len(rows) == 14
    own = rows.pop(f"{NAMES[1]}.mlp.up_proj")
    assert not own.fused and own.calls == ((own.reason, 2),) and own.reason == "base_layer has hooks"
    assert {row.calls for row in rows.values()} == {(("fused", 2),)}  # projections of a fused MLP as well
    text = str(lora_fused.explain(model, calls=calls))
    assert "calls: 2 fused" in text and "calls: 2 PEFT's own" in text
    assert {row.calls for row in lora_fused.explain(model)} == {None}


def test_what_was_not_called(lora_fused):
    model = applied(lora_fused)
    with lora_fused.record() as calls:
        pass
    assert calls.fused == calls.own == 0 and calls.by_module(model) == {}
    assert {row.calls for row in lora_fused.explain(model, calls=calls)} == {()}
    assert "calls: none" in str(lora_fused.explain(model, calls=calls))


def test_a_recomputation_counts(lora_fused):
    model = applied(lora_fused)
    q, x = layer(model).self_attn.q_proj, torch.randn(5, 64, requires_grad=True)
    with lora_fused.record() as calls:
        checkpoint(q, x, use_reentrant=False).sum().backward()
    assert calls.of(q) == {"fused": 2}


def test_two_recordings_at_once(lora_fused):
    model = applied(lora_fused)
    with lora_fused.record() as outer:
        evaluate(model)
        with lora_fused.record() as inner:
            evaluate(model)
        evaluate(model)
    assert (outer.fused, inner.fused) == (30, 10)


def test_all_threads(lora_fused):
    models = [applied(lora_fused) for _ in range(3)]
    with lora_fused.record() as calls:
        threads = [threading.Thread(target=evaluate, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [sum(calls.by_module(model).values(), Counter()) for model in models] == [{"fused": 10}] * 3


def test_outside_of_a_recording_nothing_is_different(lora_fused):
    """Its cost is none: what layers look at is what it was, also after an exception."""
    layers, last_call = lora_fused.layers, lora_fused.last_call
    before = layers._notes, last_call.note
    assert before[0] is last_call.notes
    with pytest.raises(ZeroDivisionError), lora_fused.record() as calls:
        assert layers._notes is not before[0]
        raise ZeroDivisionError
    assert (layers._notes, last_call.note) == before and layers._notes is last_call.notes
    evaluate(applied(lora_fused))
    assert calls.fused == 0


def test_notes_are_kept_meanwhile(lora_fused):
    """`explain` knows the last call of what was recorded."""
    model = applied(lora_fused)
    with lora_fused.record():
        evaluate(model)
    assert {row.last for row in lora_fused.explain(model)} == {"fused"}


def test_a_graph_is_not_traced_again(lora_fused):
    torch.compiler.reset()
    model = applied(lora_fused, shape=dict(num_hidden_layers=1, use_cache=False))
    compiled = torch.compile(model, backend="eager")
    evaluate(compiled)
    torch._dynamo.utils.counters.clear()
    with lora_fused.record() as calls:
        evaluate(compiled)
    assert calls.fused == calls.own == 0 and not torch._dynamo.utils.counters["frames"]
    assert str(calls).endswith("; what graphs of torch.compile run is not seen")
    assert "calls: none outside of its graph" in str(lora_fused.explain(model, calls=calls))
    torch.compiler.reset()
    with lora_fused.record() as calls:
        evaluate(compiled)
    assert calls.fused == calls.own == 0 and torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert {row.backend for row in lora_fused.explain(model)} == {"native, compiled"}


def test_modules_are_not_kept_alive(lora_fused):
    model = applied(lora_fused)
    with lora_fused.record() as calls:
        evaluate(model)
    assert len(calls._counts) == 10
    del model
    gc.collect()
    assert calls.fused == 0 and len(calls._counts) == 0
