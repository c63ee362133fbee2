"""Long runs: a kernelized model in lockstep with PEFT's own, whatever comes between its steps, and its memory."""

import itertools
import random
import statistics
from collections import Counter

import psutil
import pytest
import torch
from helpers.cases import DEVICE, OwnForwards, SeededDropout
from helpers.kernelizing import kernelized
from helpers.long_runs import (
    ADAPTERS,
    CHECKPOINTS,
    INTERRUPTIONS,
    LOSS,
    SHAPE,
    STATE,
    adapted_llama,
    batch,
    checkpointing,
    interrupted,
    optimizer_of,
    train,
)

pytestmark = pytest.mark.usefixtures("on_device")
BOTH = ["plain", "plain dora"]  # at once, which PEFT computes
# By the number of steps: merges, evaluations, kinds of (adapters, checkpointing) that come up, how often each of them
# and each interruption does at least.
RUNS = {200: (20, 11, 14, 0, 1), 1000: (100, 53, 15, 4, 5)}


@pytest.fixture
def pair(lora_fused, monkeypatch):
    """(PEFT's model, whose dropout draws our masks, the kernelized one)."""
    if DEVICE == "cuda":  # a draw of three seeds is not three draws of one there, as PEFT's model makes them
        own = lora_fused.functional.dispatch.draw_seeds

        def draw_seeds(device, projections, share_mask=False):
            seeds = [own(device, (projection,), share_mask) for projection in projections]
            return None if None in seeds else torch.cat(seeds)

        monkeypatch.setattr(lora_fused.functional.dispatch, "draw_seeds", draw_seeds)
    model = adapted_llama()
    ours = kernelized(lora_fused, model)
    assert SeededDropout.replace_all(lora_fused, model) == 2 * 14
    return model, ours


def assert_same_state(ours, theirs):
    """Names and values of all that a model holds."""
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    mine, peft = ours.state_dict(), theirs.state_dict()
    assert [*mine] == [*peft]
    for name, value in mine.items():
        torch.testing.assert_close(value, peft[name], rtol=STATE, atol=STATE, msg=lambda m: f"{name}: {m}")


def assert_same_logits(ours, theirs, tokens):
    with torch.no_grad():
        pairs = [model(input_ids=tokens).logits for model in (ours, theirs)]
    torch.testing.assert_close(*pairs, rtol=STATE, atol=STATE)


def merge_and_unmerge(theirs, ours, safe):
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    for model in (theirs, ours):
        model.eval()
        model.merge_adapter(safe_merge=safe)
    assert_same_state(ours, theirs)
    moved = [name for name, value in ours.state_dict().items() if not torch.allclose(value, before[name])]
    assert len(moved) == 14 and all(name.endswith("base_layer.weight") for name in moved)
    assert_same_logits(ours, theirs, batch(0))
    for model in (theirs, ours):
        model.unmerge_adapter()
        model.train()
    assert_same_state(ours, theirs)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, before[name], msg=name)


def evaluate(theirs, ours, step):
    """On other numbers of tokens, and at times some are generated."""
    for model in (theirs, ours):
        model.eval()
    with torch.inference_mode(step % 2 == 0):
        assert_same_logits(ours, theirs, batch(step, rows=1 + step % 3, length=1 + step % 7))
    if step % 4 == 0:
        options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(
            *(model.generate(input_ids=batch(step, rows=2, length=5), **options) for model in (theirs, ours))
        )
    for model in (theirs, ours):
        model.train()


@pytest.mark.parametrize("steps", (200, pytest.param(1000, marks=pytest.mark.slow)))
def test_steps_with_all_that_comes_between(pair, steps):
    theirs, ours = pair
    optimizers, drawn, done = [optimizer_of(model) for model in pair], random.Random(0), Counter()
    start = {name: p.detach().clone() for name, p in theirs.named_parameters() if "lora_" in name}
    for step in range(steps):
        if step % 5 == 0:
            active, options = drawn.choice([*ADAPTERS, BOTH]), drawn.choice(CHECKPOINTS)
            for model in pair:
                model.base_model.set_adapter(active)
                checkpointing(model, options)
            done[str(active), str(options)] += 1
        if step % 10 == 3:
            merge_and_unmerge(theirs, ours, safe=step % 20 == 3)
            done["merges"] += 1
        if step % 15 == 4:
            where = drawn.choice([*INTERRUPTIONS])
            if options is not None or where != "in a recomputation":
                for model in pair:
                    interrupted(model, step, where)
                done[where] += 1
        if step % 19 == 6:
            evaluate(theirs, ours, step)
            done["evaluations"] += 1
        expected = train(theirs, optimizers[0], step)
        if step % 14 == 9:
            with OwnForwards() as calls:
                loss = train(ours, optimizers[1], step)
            assert bool(calls) == (active == BOTH), f"step {step}: {active}, {calls}"
        else:
            loss = train(ours, optimizers[1], step)
        assert abs(loss - expected) <= LOSS * expected, f"step {step}: {loss}, PEFT {expected}"
    assert_same_state(ours, theirs)
    assert not any(torch.allclose(start[name], p) for name, p in ours.named_parameters() if name in start)
    states = [(str(active), str(options)) for active, options in itertools.product([*ADAPTERS, BOTH], CHECKPOINTS)]
    merges, evaluations, kinds, each_kind, each_interruption = RUNS[steps]
    assert done["merges"] == merges and done["evaluations"] == evaluations
    assert sum(done[each] > 0 for each in states) == kinds and all(done[each] >= each_kind for each in states), done
    assert all(done[where] >= each_interruption for where in INTERRUPTIONS), done


def resident():
    """Bytes of this process, and on a GPU of its tensors there."""
    return psutil.Process().memory_info().rss + (torch.cuda.memory_allocated() if DEVICE == "cuda" else 0)


def test_memory_stays_flat(lora_fused):
    """From step 100 on; a tensor [rows, hidden] left behind at every second step would show."""
    model, large = kernelized(lora_fused, adapted_llama()), dict(rows=8, length=32)
    one_activation = 8 * large["rows"] * large["length"] * SHAPE["hidden_size"]
    optimizer, found = optimizer_of(model), []
    for step in range(300):
        model.set_adapter([*ADAPTERS][step // 3 % len(ADAPTERS)])
        checkpointing(model, CHECKPOINTS[step // 2 % 3])
        if step % 4 == 1:
            options, where = CHECKPOINTS[step // 2 % 3], [*INTERRUPTIONS][step // 4 % len(INTERRUPTIONS)]
            if options is not None or where != "in a recomputation":
                interrupted(model, step, where, **large)
        if step % 10 == 3:
            model.merge_adapter()
            with torch.no_grad():
                model(input_ids=batch(step, **large))
            model.unmerge_adapter()
        train(model, optimizer, step, **large)
        found.append(resident())
    growth = statistics.median(found[-50:]) - statistics.median(found[100:150])
    assert growth <= 150 * one_activation / 2, f"{growth / 2**20:.1f} MB"
