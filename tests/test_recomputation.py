"""Checkpoints recompute what their forwards did, whatever runs in between: random passes over siblings with masks."""

import random

import pytest
import torch
from helpers.compiling import Block, assert_same, block, results, x_of
from helpers.heads import NAMES, heads, inner, take_out
from helpers.kernelizing import kernelized
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

pytestmark = pytest.mark.usefixtures("on_device")
PASSES = (NAMES, NAMES, NAMES, ("q", "k"), ("k", "v", "q"), ("v",), ("q", "v"))
FORWARDS = {
    "plain": lambda run, x: run(x),
    "reentrant": lambda run, x: checkpoint(run, x, use_reentrant=True),
    "checkpoint": lambda run, x: checkpoint(run, x, use_reentrant=False),
}
ACTIONS = (*FORWARDS, "reentrant", "one backward", "one backward", "all backwards", "evaluation", "no gradient")


def model_of(lora_fused, drawn):
    """Kernelized, and its biases; some of its projections without dropout."""
    model = heads(lora_dropout=0.5)
    for name in NAMES:
        if drawn.random() < 0.3:
            getattr(inner(model), name).lora_dropout["default"] = nn.Identity()
    ours = kernelized(lora_fused, model)
    layers = {name: getattr(inner(ours), name).base_layer for name in NAMES}
    zeros = {name: torch.zeros(layer.out_features, dtype=torch.float64) for name, layer in layers.items()}
    return ours, {name: zeros[name] if layer.bias is None else layer.bias for name, layer in layers.items()}


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("out", (False, True), ids=("parameters", "taken out"))
def test_random_passes(lora_fused, monkeypatch, seed, out):
    """y = J x + b and dx = Jᵀ dy with the same masks in J. A draw of three seeds is not three draws of one, as on a
    GPU."""
    own = lora_fused.functional.dispatch.draw_seeds

    def draw_seeds(*args):
        seeds = own(*args)
        return None if seeds is None else seeds ^ len(seeds)

    monkeypatch.setattr(lora_fused.functional.dispatch, "draw_seeds", draw_seeds)
    drawn, waiting, checked = random.Random(seed), [], 0
    ours, biases = model_of(lora_fused, drawn)
    if out:
        layers = [getattr(inner(ours), name) for name in NAMES]
        put = take_out([part["default"] for layer in layers for part in (layer.lora_A, layer.lora_B)])
        inner(ours).register_forward_pre_hook(put)

    def pick():
        return torch.randn(4, 32, dtype=torch.float64), drawn.choice(PASSES)

    for action in (*drawn.choices(ACTIONS, k=14), "plain", "all backwards"):
        if action in FORWARDS:
            x, names = pick()
            x.requires_grad_()
            y = FORWARDS[action](lambda x, names=names: inner(ours)(x, names=names), x * 1)
            waiting.append((x, y, torch.randn_like(y), torch.cat([biases[name] for name in names])))
        elif action in ("evaluation", "no gradient"):
            x, names = pick()
            ours.train(action == "no gradient")
            with torch.no_grad():
                inner(ours)(x, names=names)
            ours.train()
        elif not waiting:  # a step of an optimizer
            with torch.no_grad():
                torch._foreach_mul_([p for p in ours.parameters() if p.requires_grad], 0.9)
        else:
            count = 1 if action == "one backward" else len(waiting)
            done = [waiting.pop(drawn.randrange(len(waiting))) for _ in range(count)]
            torch.autograd.backward([y for _, y, _, _ in done], [dy for _, _, dy, _ in done])
            checked += len(done)
            for x, y, dy, b in done:
                torch.testing.assert_close(((y - b) * dy).sum(), (x * x.grad).sum())
    assert checked > 0 and not waiting


class Selective(Block):
    """Its checkpoints keep products."""

    def around(self, function, x):
        def keeping():
            return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])

        return checkpoint(function, x, use_reentrant=False, context_fn=keeping)


@pytest.mark.parametrize("config", (
    dict(), dict(alpha_pattern={"k_proj": 3}), dict(use_dora=True), dict(lora_bias=True),
), ids=("lora", "scalings", "dora", "lora_bias"))  # fmt: skip
def test_products_that_a_checkpoint_keeps(lora_fused, group_function, config):
    """The chain of operations writes to products, of which the checkpoint then has copies."""
    with torch.device("cpu"):
        model = block(Selective, **config)
        ours = kernelized(lora_fused, model, "cpu")
        for _ in range(3):  # alone, and then as a group
            assert_same(results(ours, x_of()), results(model, x_of()))
