"""How often a compiled model is compiled again, one layer's code for all layers of it."""

import pytest
import torch
from helpers.compiling import Block, Graphs, assert_same, block, fresh_compiler, results, x_of
from helpers.kernelizing import explain, kernelized
from helpers.llamas import randomise_adapters, tiny_llama
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch.utils.checkpoint import checkpoint

CONFIG = dict(r=4, lora_alpha=6, target_modules="all-linear")
STEPS = 20


class Model:
    """A Llama of three layers by layer, on embeddings that have a gradient, so that every layer's x has one."""

    def __init__(self, lora_fused, prepare=lambda model: None, **config):
        base = tiny_llama(torch.float32, num_hidden_layers=3, use_cache=False)
        self.plain = get_peft_model(base, LoraConfig(**{**CONFIG, **config}))
        self.plain.add_adapter("other", LoraConfig(**{**CONFIG, **config, "lora_alpha": 10}))
        # Else its layers share one list of names, which Dynamo guards, until one is activated.
        self.plain.set_adapter("default")
        prepare(self.plain)
        randomise_adapters(self.plain, torch.float32)
        self.ours, self.graphs = kernelized(lora_fused, self.plain), Graphs(lora_fused, "eager")
        for layer in self.ours.base_model.model.model.layers:
            layer.compile(backend=self.graphs, fullgraph=True)
        self.drops = any(isinstance(module, torch.nn.Dropout) for module in self.plain.modules())

    def compilations(self, length=9):
        """Of one step; its loss is PEFT's."""
        before = len(self.graphs.traced)
        x = torch.randn(2, length, 64).requires_grad_()
        losses = []
        for model in (self.ours, self.plain):
            loss = model(inputs_embeds=x).logits.square().mean()
            loss.backward()
            losses.append(loss.item())
        assert self.drops or abs(losses[0] - losses[1]) <= 1e-4 * losses[1]
        return len(self.graphs.traced) - before

    def change(self, change):
        for model in (self.plain, self.ours):
            change(model)


def layers_of(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@pytest.fixture
def compiled(lora_fused):
    def make(*args, **config):
        model = Model(lora_fused, *args, **config)
        assert model.compilations() == 1
        assert model.graphs.ops == dict(traced_linear=4, traced_gated_mlp=1)
        return model

    with fresh_compiler():
        yield make


@pytest.mark.parametrize("config", (dict(), dict(use_dora=True), dict(lora_dropout=0.1)), ids=("lora", "dora", "drop"))
def test_steps(compiled, config):
    model = compiled(**config)
    trained = [p for p in model.ours.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model.ours, model.plain)]
    for _ in range(STEPS):
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert model.compilations() == 0
    assert not any(map(torch.equal, trained, before))


def test_lengths(compiled):
    model = compiled()
    assert model.compilations(12) <= 1
    assert [model.compilations(length) for length in (13, 20, 7, 33)] == [0] * 4


def test_adapters(compiled):
    model = compiled()
    counts = []
    for name in ("other", "default", "other", "default"):
        model.change(lambda each, name=name: each.set_adapter(name))
        counts.append(model.compilations())
    assert counts[0] <= 1 and counts[1:] == [0] * 3


def test_scalings(compiled):
    model = compiled()
    count = 0
    for scaling in (0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0):
        model.change(lambda each, scaling=scaling: [layer.set_scale("default", scaling) for layer in layers_of(each)])
        count += model.compilations()
    assert count <= 1


def test_scalings_that_are_tensors(compiled):
    """As PEFT makes them for a hot swap of adapters in a compiled model."""
    model = compiled(lambda plain: prepare_model_for_compiled_hotswap(plain, target_rank=6))
    scalings = [layer.scaling["default"] for each in (model.ours, model.plain) for layer in layers_of(each)]
    assert len(scalings) == 42 and all(isinstance(scaling, torch.Tensor) for scaling in scalings)
    for value in (0.3, 0.7, 2.0):
        for scaling in scalings:
            scaling.fill_(value)
        assert model.compilations() == 0


def test_training_and_evaluation(compiled):
    model = compiled(lora_dropout=0.1)
    counts = []
    for training in (False, True, False, True):
        model.change(lambda each, training=training: each.train(training))
        counts.append(model.compilations())
    assert counts[0] <= 1 and counts[1:] == [0] * 3


def test_a_merge_and_its_end(compiled):
    model = compiled()
    model.change(lambda each: each.merge_adapter())
    assert model.compilations() <= 1
    model.change(lambda each: each.unmerge_adapter())
    assert model.compilations() == 0


def test_what_is_found_genuine_later(compiled, lora_fused):
    """explain, and models of other classes, look at forwards that this one's trace did not ask for."""
    model = compiled()

    class Other(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    explain(lora_fused, model.ours)
    lora_fused.peft.replaced.forward_reason(Other)
    assert lora_fused.peft.replaced.forward_reason(torch.nn.Conv1d) is None
    assert model.compilations() == 0


def test_modules_are_looked_at_once_a_trace(compiled, lora_fused, monkeypatch):
    """Not at each op, whose number grows with that of modules; a new trace looks again."""
    looked, note_trace = [], lora_fused.last_call.note_trace
    monkeypatch.setattr(lora_fused.last_call, "note_trace", lambda: looked.append(None) or note_trace())
    model = compiled()
    assert len(looked) == 1
    assert model.compilations(length=7) == 1 and len(looked) == 2


class CheckpointedOnce(Block):
    """The same operations in a checkpoint's graph first, and in the outer one."""

    def forward(self, x):
        x = x + checkpoint(self.attend, x, use_reentrant=False)
        return x + self.mlp(x)


@pytest.mark.parametrize("config", (dict(), dict(use_dora=True)), ids=("lora", "dora"))
def test_sizes_that_are_dynamic_from_the_start(lora_fused, config):
    """Dynamo makes inputs of the numbers that it reads, too, and a checkpoint's graph holds what it read first."""
    model = block(CheckpointedOnce, **config)
    ours, graphs = kernelized(lora_fused, model, "cpu"), Graphs(lora_fused)
    with fresh_compiler():
        ours.compile(backend=graphs, fullgraph=True, dynamic=True)
        for rows in (5, 7):
            assert_same(results(ours, x_of(rows)), results(model, x_of(rows)))
    assert len(graphs.traced) == 1
