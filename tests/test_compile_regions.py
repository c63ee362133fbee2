"""Models that are compiled in part, cut, checkpointed or written in between, and what a graph says of bad input."""

import copy
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import experts
from helpers.cases import DEVICE, Case, assert_as_good, peft_linear, tiny_llama
from helpers.compiling import FUSED_BLOCK, INDUCTOR, Block, Graphs, assert_same, block, fresh_compiler, results, x_of
from helpers.kernelizing import kernelized
from helpers.llamas import passed, tokens
from helpers.quantized import One, adapted, four_bit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


@pytest.fixture(autouse=True)
def _fresh():
    with fresh_compiler():
        yield


def hold(lora_fused, model, fullgraph=True, ops=FUSED_BLOCK):
    """Results of the model that is compiled are PEFT's; its graphs."""
    ours, graphs = kernelized(lora_fused, model, "cpu"), Graphs(lora_fused)
    ours.compile(backend=graphs, fullgraph=fullgraph)
    assert_same(results(ours, x_of()), results(model, x_of()))
    assert graphs.ops == ops
    return graphs


# ---- checkpoints ----


def keeping_products():
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


class Checkpointed(Block):
    def around(self, function, x):
        return checkpoint(function, x, use_reentrant=False)


class Selective(Block):
    def around(self, function, x):
        return checkpoint(function, x, use_reentrant=False, context_fn=keeping_products)


class Reentrant(Block):
    def around(self, function, x):
        return checkpoint(function, x, use_reentrant=True)


@pytest.mark.parametrize("config", (dict(), dict(use_dora=True)), ids=("lora", "dora"))
@pytest.mark.parametrize("cls", (Checkpointed, Selective), ids=lambda cls: cls.__name__)
def test_checkpoints(lora_fused, cls, config):
    """The ops of a checkpoint are in a graph of its own, as far as Dynamo is concerned, and run again in backward."""
    model = block(cls, **config)
    ours, graphs = kernelized(lora_fused, model, "cpu"), Graphs(lora_fused)
    ours.compile(backend=graphs, fullgraph=True)
    assert_same(results(ours, x_of()), results(model, x_of()))
    if not INDUCTOR:
        forward, backward = graphs.native
        assert forward["lora_forward"] == 4 and forward["gated_forward"] == 1
        assert backward["lora_forward"] + backward["lora_backward"] > 4 and backward["gated_backward"] == 1


@pytest.mark.parametrize("whole", (False, True))
def test_a_reentrant_checkpoint(lora_fused, whole):
    """What Dynamo makes of it for PEFT, it does for ours: the results, or the error of a version that refuses it."""
    model = block(Reentrant)
    exact = results(model, x_of())
    for each in (model, kernelized(lora_fused, model, "cpu")):
        torch.compiler.reset()
        each.compile(backend="aot_eager", fullgraph=whole)
        try:
            assert_same(results(each, x_of()), exact)
        except torch._dynamo.exc.Unsupported:
            with pytest.raises(torch._dynamo.exc.Unsupported):
                model(x_of())


class OfOne(nn.Module):
    def __init__(self, proj):
        super().__init__()
        self.proj = proj

    def forward(self, x):
        return checkpoint(self.proj, x, use_reentrant=False)


def test_a_mask_of_a_checkpoint(lora_fused):
    """The recomputation draws the mask of the forward."""
    model, _ = peft_linear(Case((40,), 48, 32, 4), torch.float64, torch.float64, "cpu", lora_dropout=0.4)
    layer = kernelized(lora_fused, model, "cpu").base_model.model.proj
    graphs, a = Graphs(lora_fused), layer.lora_A["default"].weight
    compiled = torch.compile(OfOne(layer), backend=graphs, fullgraph=True)
    x, dy = torch.randn(40, 48, dtype=torch.float64), torch.randn(40, 32, dtype=torch.float64)
    ys = []
    for _ in range(2):
        y = compiled(x.requires_grad_())
        (da,) = torch.autograd.grad(y, a, dy)
        torch.testing.assert_close((da * a).sum(), (dy * (y - layer.base_layer(x))).sum(), rtol=1e-5, atol=0)
        ys.append(y)
    assert not torch.equal(*ys)


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointed_layers(lora_fused, reentrant):
    """As transformers does it, around layers that are compiled."""
    base = tiny_llama(torch.float64, num_hidden_layers=2, use_cache=False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.to(DEVICE).train()
    ours, graphs = kernelized(lora_fused, model), Graphs(lora_fused)
    for layer in ours.base_model.model.model.layers:
        layer.compile(backend=graphs)
    for mine, theirs in zip(passed(ours, tokens()), passed(model, tokens()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9 * (1.0 + theirs.abs().max().item()))
    assert graphs.ops["traced_gated_mlp"] >= 1 and graphs.ops["traced_linear"] == 4 * graphs.ops["traced_gated_mlp"]


# ---- in parts ----


class Written(Block):
    """x is written in place between its readers, of which the first has nothing to keep it for."""

    def attend(self, x):
        h = 2.0 * x
        with torch.no_grad():
            q = self.q_proj(h)
        h.add_(1.0)
        return self.o_proj(q * self.k_proj(h) + self.v_proj(h))


class Cut(Block):
    def between(self, x):
        torch._dynamo.graph_break()
        return x


def test_x_is_written_between_siblings(lora_fused):
    hold(lora_fused, block(Written))


def test_a_graph_that_is_cut(lora_fused):
    graphs = hold(lora_fused, block(Cut), fullgraph=False)
    assert len(graphs.traced) > 1 and graphs.traced[0] != FUSED_BLOCK


def test_two_regions(lora_fused):
    """Some of what reads one x is compiled, each apart, and the rest is eager."""
    model = block()
    ours, graphs = kernelized(lora_fused, model, "cpu"), Graphs(lora_fused)
    inner = ours.base_model.model
    for part in (inner.k_proj, inner.mlp):
        part.compile(backend=graphs, fullgraph=True)
    for _ in range(2):
        assert_same(results(ours, x_of()), results(model, x_of()))
    assert graphs.ops == dict(traced_linear=1, traced_gated_mlp=1)
    rows = {row.module.rpartition(".")[2]: row.backend for row in lora_fused.explain(ours)}
    assert {name for name, backend in rows.items() if backend == "native, compiled"} == {
        "k_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert rows["q_proj"] == rows["v_proj"] == rows["o_proj"] == "native"


class Holder:
    def __init__(self, models):
        self.models = models


def models_and_sum(lora_fused):
    """Two kernelized models, and the sum of what PEFT's give."""
    models = block(), block(use_dora=True)
    return [kernelized(lora_fused, model, "cpu") for model in models], sum(model(x_of()) for model in models)


@pytest.mark.parametrize("hold_models", (list, Holder), ids=("list", "object"))
def test_a_function_of_models_that_others_hold(lora_fused, hold_models):
    """Neither is a variable of anybody who calls."""
    models, expected = models_and_sum(lora_fused)
    held = hold_models(models)
    del models
    graphs = Graphs(lora_fused)

    @functools.partial(torch.compile, backend=graphs, fullgraph=True)
    def step(x):
        first, second = held if isinstance(held, list) else held.models
        return first(x) + second(x)

    torch.testing.assert_close(step(x_of()), expected, rtol=1e-11, atol=1e-11)
    assert graphs.ops == FUSED_BLOCK + FUSED_BLOCK
    for model in held if hold_models is list else held.models:
        assert {row.backend for row in lora_fused.explain(model)} == {"native, compiled"}


class Wrapper(nn.Module):
    """Its model is no submodule."""

    def __init__(self, models):
        super().__init__()
        self.models = models

    def forward(self, x):
        return self.models[0](x)


class CompiledFunction(Wrapper):
    def __init__(self, models, **options):
        super().__init__(None)
        self.function = torch.compile(lambda x: models[0](x), **options)

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("compiled", ("model", "wrapper", "function"))
def test_a_model_that_a_module_holds_in_a_list(lora_fused, compiled):
    model = block()
    models, expected = [kernelized(lora_fused, model, "cpu")], model(x_of())
    graphs = Graphs(lora_fused)
    options = dict(backend=graphs, fullgraph=True)
    wrapper = CompiledFunction(models, **options) if compiled == "function" else Wrapper(models)
    if compiled != "function":
        (models[0] if compiled == "model" else wrapper).compile(**options)
    torch.testing.assert_close(wrapper(x_of()), expected, rtol=1e-11, atol=1e-11)
    assert graphs.ops == FUSED_BLOCK
    assert {row.backend for row in lora_fused.explain(models[0])} == {"native, compiled"}


def test_another_thread_calls_meanwhile(lora_fused):
    """torch's flag that something is compiled is one for all threads: an eager call elsewhere is an eager call."""
    model, calls = block(), []
    ours, expected = kernelized(lora_fused, model, "cpu"), model(x_of())

    def backend(graph, inputs):
        with ThreadPoolExecutor(1) as other, lora_fused.record() as recorded:
            calls.append((other.submit(ours, x_of()).result(), recorded))
        return graph.forward

    y = torch.compile(kernelized(lora_fused, model, "cpu"), backend=backend)(x_of())
    ((meanwhile, recorded),) = calls
    assert recorded.fused == 5 and recorded.own == 0
    for each in (y, meanwhile):
        torch.testing.assert_close(each, expected, rtol=1e-11, atol=1e-11)


def test_left_out_of_the_graph(lora_fused):
    """A linear that `torch.compiler.disable` takes out is eager in between."""
    model = block()
    ours, graphs = kernelized(lora_fused, model, "cpu"), Graphs(lora_fused)
    mlp = ours.base_model.model.mlp
    mlp.forward = torch.compiler.disable(mlp.forward)
    ours.compile(backend=graphs)
    assert_same(results(ours, x_of()), results(model, x_of()))
    assert graphs.ops == dict(traced_linear=4)


def test_experts(lora_fused):
    """PEFT's forward of them is traced, in no more graphs than PEFT's are; eager calls stay ours."""
    model = experts.adapt(experts.block_of("qwen3_moe"))
    ours, theirs = experts.kernelized(lora_fused, model), model
    x, dy = torch.randn(2, 9, 32, dtype=torch.float64), torch.randn(2, 9, 32, dtype=torch.float64)
    exact = experts.results(theirs, x, dy)
    counts = []
    for each in (ours, theirs):
        torch.compiler.reset()
        graphs = Graphs(lora_fused, "eager")
        each.compile(backend=graphs)
        found = experts.results(each, x, dy)
        assert found.keys() == exact.keys() and all(experts.error(found[name], exact[name]) <= 1e-12 for name in exact)
        counts.append(len(graphs.traced))
    assert 0 < counts[0] <= counts[1]
    rows = experts.explain(lora_fused, ours)
    assert {row.reason for row in rows} == {lora_fused.explanation.EXPERTS_COMPILED}
    torch.compiler.reset()
    ours._compiled_call_impl = None
    with experts.counted(lora_fused) as calls:
        experts.results(ours, x, dy)
    assert calls


# ---- bad input ----


def damaged():
    """A layer on four bits whose scales do not fit its weight, and what an eager call says of it."""
    case = Case((6,), 64, 64, 4)
    model = One(case, torch.float32, "cpu")
    model.proj = four_bit(model.proj, torch.float32, nested=False)
    model, layer = adapted(model, case)
    state = layer.base_layer.weight.quant_state
    state.absmax = state.absmax[:-1]
    return model


@pytest.mark.parametrize("whole", (False, True))
def test_a_weight_that_is_damaged(lora_fused, whole):
    """The error of an eager call, which names the module; in one graph its words stand in Dynamo's own error."""
    ours = kernelized(lora_fused, damaged(), "cpu")
    words = r"model\.proj: absmax has 63 elements, expected 64"
    with pytest.raises(ValueError, match=words):
        ours(torch.randn(6, 64))
    ours.compile(backend="eager", fullgraph=whole)
    with pytest.raises(torch._dynamo.exc.Unsupported if whole else ValueError, match=words):
        ours(torch.randn(6, 64))


@pytest.mark.parametrize("x", (x_of()[..., :31], x_of().to("meta")), ids=("size", "device"))
def test_an_x_that_does_not_fit(lora_fused, x):
    """PEFT's own error."""
    model = block()
    ours = kernelized(lora_fused, model, "cpu")
    errors = []
    for each in (model, ours):
        torch.compiler.reset()
        each.compile(backend="eager")
        with pytest.raises(Exception) as error:
            each(x)
        errors.append(type(error.value))
    assert errors[0] is errors[1]


# ---- Inductor ----


def code_of(model, x, **options):
    """Results of a model that Inductor compiles, and its code."""
    from torch._inductor.utils import run_and_get_code

    model.compile(fullgraph=True, **options)
    found, codes = run_and_get_code(lambda: results(model, x))
    return found, "".join(codes)


@pytest.mark.parametrize("config", (dict(), pytest.param(dict(use_dora=True), marks=pytest.mark.slow)), ids=str)
def test_inductor(lora_fused, config):
    """Siblings are merged: q, k and v are one call a direction, o is one, and the gated MLP."""
    model = block(**config)
    found, code = code_of(kernelized(lora_fused, model, "cpu"), x_of())
    assert_same(found, results(model, x_of()))
    calls = [
        code.count(f"{op}.default(") for op in ("lora_forward", "lora_backward", "gated_forward", "gated_backward")
    ]
    assert calls == [2, 2, 1, 1]


def test_masks_by_inductor(lora_fused):
    model, layer = peft_linear(Case((40,), 48, 32, 4), torch.float64, torch.float64, DEVICE, lora_dropout=0.4)
    ours = kernelized(lora_fused, model)
    ours.compile(fullgraph=True)
    x, dy = (torch.randn(40, n, dtype=torch.float64, device=DEVICE) for n in (48, 32))
    (a,) = [p for name, p in ours.named_parameters() if "lora_A" in name]
    ys = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        y = ours(x)
        (da,) = torch.autograd.grad(y, a, dy)
        torch.testing.assert_close((da * a).sum(), (dy * (y - layer.base_layer(x))).sum(), rtol=1e-5, atol=0)
        ys.append(y)
    assert torch.equal(ys[0], ys[1]) and not torch.equal(ys[0], ys[2])


def test_four_bits_by_inductor(lora_fused):
    case = Case((6,), 64, 48, 4, bias=True)
    model = One(case, torch.float32, "cpu")
    model.proj = four_bit(model.proj, torch.float32)
    model, _ = adapted(model, case)
    x = torch.randn(6, 64)
    found, code = code_of(kernelized(lora_fused, model, "cpu"), x)
    assert_same(found, results(model, x), 1e-5)
    assert code.count("lora_forward.default(") == code.count("lora_backward.default(") == 1


def test_float32_adapters_under_autocast_by_inductor(lora_fused):
    """No worse than PEFT's eager step in the same dtypes, against float64."""
    case = Case((2, 21), 64, 48, 8, bias=True)
    model, _ = peft_linear(case, torch.float32, torch.float32, DEVICE, use_dora=True)
    x = torch.randn(*case.lead, case.k, device=DEVICE)
    exact = results(copy.deepcopy(model).double(), x.double())
    ours = kernelized(lora_fused, model)
    ours.compile(fullgraph=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found, theirs = results(ours, x), results(model, x)
    checked = [name for name, value in exact.items() if value is not None]
    assert {"y", "dx"} < set(checked)
    for name in checked:
        assert_as_good(name, found[name], theirs[name], exact[name], torch.bfloat16)
