"""Layers by torch.compile: what is in the graphs, and results and gradients against PEFT's."""

import contextlib
import copy
import itertools
from collections import Counter

import pytest
import torch
from helpers.cases import (
    CASES,
    DEVICE,
    DTYPES,
    VARIANTS,
    Case,
    DrawnDropout,
    assert_as_good,
    peft_linear,
)
from helpers.compiling import (
    FUSED_BLOCK,
    INDUCTOR,
    Graphs,
    assert_same,
    block,
    fresh_compiler,
    layers_of,
    results,
    set_scalings,
    x_of,
)
from helpers.kernelizing import kernelized

AUTOCAST = {"plain": None, "autocast": torch.bfloat16}


@pytest.fixture(autouse=True)
def _fresh():
    with fresh_compiler():
        yield


# ---- one linear ----


def layer_cases():
    """Each variant of some cases in one way, dtypes and cases in turn; all others are slow."""
    ways = itertools.cycle((*dtypes, autocast) for autocast in AUTOCAST for dtypes in DTYPES)
    for i, (variant, case) in enumerate(itertools.product(VARIANTS, CASES)):
        if case.lead or not VARIANTS[variant].get("use_dora"):  # of a vector PEFT's DoRA makes a matrix
            chosen = next(ways) if i % 3 == 0 else None
            for base, adapter in DTYPES:
                for autocast in AUTOCAST:
                    marks = () if (base, adapter, autocast) == chosen else pytest.mark.slow
                    names = "-".join(str(dtype).removeprefix("torch.") for dtype in (base, adapter))
                    given = variant, case, base, adapter, autocast
                    yield pytest.param(*given, marks=marks, id=f"{variant}-{case}-{names}-{autocast}")


def run(model, x, dy, autocast=None):
    """Output and every gradient of one forward and backward, by name."""
    torch.manual_seed(3)
    x = x.detach().clone().requires_grad_()
    with torch.autocast(DEVICE, dtype=autocast) if autocast else contextlib.nullcontext():
        y = model(x)
    y.backward(dy.to(y.dtype))
    return {"y": y, "dx": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("variant,case,base,adapter,autocast", list(layer_cases()))
def test_a_linear(lora_fused, variant, case, base, adapter, autocast):
    """As good as PEFT's, in eager, in the same dtype, both with one mask: one op, and nothing of PEFT's beside it."""
    model, _ = peft_linear(case, base, adapter, DEVICE, **VARIANTS[variant])
    x = torch.randn(*case.lead, case.k, device=DEVICE).to(base)
    dy = torch.randn(*case.lead, case.n, device=DEVICE).to(base)
    plain = copy.deepcopy(model)
    drop = plain.base_model.model.proj.lora_dropout
    if isinstance(drop["default"], torch.nn.Dropout):
        torch.manual_seed(3)
        drop["default"] = DrawnDropout(lora_fused, drop["default"].p, x.shape, DEVICE)
    truth = run(copy.deepcopy(plain).double(), x.double(), dy.double())
    theirs = run(plain, x, dy, AUTOCAST[autocast])
    ours, graphs = kernelized(lora_fused, model), Graphs(lora_fused)
    ours.compile(backend=graphs, fullgraph=True, dynamic=False)
    found = run(ours, x, dy, AUTOCAST[autocast])
    assert graphs.ops == {"traced_linear": 1}
    assert found.keys() == theirs.keys()
    for name, value in found.items():
        assert_as_good(name, value, theirs[name], truth[name], AUTOCAST[autocast] or base)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("config", (dict(), dict(lora_bias=True)), ids=("lora", "lora_bias"))
def test_a_mask_is_that_of_its_backward(lora_fused, dtype, config):
    """y - base is linear in A, so <dA, A> = <dy, y - base> where both see one mask. Masks differ from call to call, and
    are equal under one seed."""
    model, layer = peft_linear(Case((40,), 48, 32, 4), dtype, dtype, DEVICE, lora_dropout=0.4, **config)
    if config:
        torch.nn.init.zeros_(layer.lora_B["default"].bias)
    ours, graphs = kernelized(lora_fused, model), Graphs(lora_fused)
    ours.compile(backend=graphs, fullgraph=True)
    x, dy = torch.randn(40, 48, device=DEVICE, dtype=dtype), torch.randn(40, 32, device=DEVICE, dtype=dtype)
    (a,) = [p for name, p in ours.named_parameters() if "lora_A" in name]
    base, drawn = layer.base_layer(x), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        for _ in range(2):
            y = ours(x)
            (da,) = torch.autograd.grad(y, a, dy)
            expected = (dy.double() * (y - base).double()).sum()
            torch.testing.assert_close((da.double() * a.double()).sum(), expected, rtol=1e-5, atol=0)
            drawn.append(y.detach())
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
    different = (drawn[0], drawn[1], drawn[4], drawn[5])
    assert not any(torch.equal(*pair) for pair in itertools.combinations(different, 2))


# ---- several linears and a gated MLP ----


BLOCKS = {
    "lora": {},
    "bias": dict(bias="all"),
    "lora_bias": dict(lora_bias=True),
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "dora, bias": dict(use_dora=True, bias="all"),
    "patterns": dict(rank_pattern={"q_proj": 2, "up_proj": 7}, alpha_pattern={"down_proj": 3}),
}


@pytest.mark.parametrize("config", BLOCKS.values(), ids=BLOCKS)
def test_a_block(lora_fused, config):
    """One op a linear, one a gated MLP, and native ops alone behind them, forward and backward."""
    model, graphs = block(**config), Graphs(lora_fused)
    ours = kernelized(lora_fused, model, "cpu")
    ours.compile(backend=graphs, fullgraph=True)
    assert_same(results(ours, x_of()), results(model, x_of()))
    assert graphs.ops == FUSED_BLOCK
    if not INDUCTOR:
        forward, backward = graphs.native
        assert forward["lora_forward"] == 4 and forward["gated_forward"] == 1
        assert backward["lora_backward"] == 4 and backward["gated_backward"] == 1


@pytest.mark.parametrize("mode,trained", (
    (torch.no_grad, "x"), (torch.inference_mode, "x"), (None, "no x"), (None, "nothing"),
))  # fmt: skip
def test_what_needs_a_gradient(lora_fused, mode, trained):
    model, graphs = block(), Graphs(lora_fused)
    for p in model.parameters():
        p.requires_grad_(p.requires_grad and trained != "nothing")
    ours = kernelized(lora_fused, model, "cpu")
    ours.compile(backend=graphs, fullgraph=True)
    x = x_of()
    x.requires_grad_(trained == "x")
    found = []
    for each in (ours, model):
        with mode() if mode else contextlib.nullcontext():
            y = each(x)
        assert y.requires_grad == (mode is None and trained != "nothing")
        grads = torch.autograd.grad(y.square().sum(), [p for p in each.parameters() if p.requires_grad]) if (
            y.requires_grad
        ) else ()  # fmt: skip
        found.append([y, *grads])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)
    assert graphs.ops == FUSED_BLOCK


def test_dropout_in_a_block(lora_fused):
    """Under the same seed the masks are those of an eager model's first call, in which no siblings are known yet."""
    model, graphs = block(lora_dropout=0.3), Graphs(lora_fused, "aot_eager")
    ours, eager = (kernelized(lora_fused, model, "cpu") for _ in range(2))
    ours.compile(backend=graphs, fullgraph=True)
    assert_same(results(ours, x_of()), results(eager, x_of()))
    assert graphs.ops == FUSED_BLOCK


@pytest.mark.parametrize("config", ("lora", "lora_bias", "dora"))
def test_scalings_that_change(lora_fused, config):
    """From the second value on a scaling is a symbol, whose product with B the graph has."""
    model, graphs = block(**BLOCKS[config]), Graphs(lora_fused)
    ours = kernelized(lora_fused, model, "cpu")
    ours.compile(backend=graphs, fullgraph=True)
    for value in (1.5, 0.25, 3.0, -1.5):
        set_scalings(value, ours, model)
        assert_same(results(ours, x_of()), results(model, x_of()))
    assert len(graphs.traced) == 2 and graphs.traced[1] == FUSED_BLOCK


@pytest.mark.parametrize("fullgraph", (False, True))
@pytest.mark.parametrize("config", ("lora", "lora_bias", "dora"))
def test_scalings_that_are_tensors(lora_fused, config, fullgraph):
    """On a CPU an eager call reads their value, where a graph would end; in a graph B is multiplied by them."""
    model, graphs = block(**BLOCKS[config]), Graphs(lora_fused)
    set_scalings(torch.tensor(1.5), model)
    ours = kernelized(lora_fused, model, "cpu")
    ours.compile(backend=graphs, fullgraph=fullgraph)
    for value in (1.5, 0.25, -3.0):
        for each in (ours, model):
            for layer in layers_of(each):
                layer.scaling["default"].fill_(value)
        assert_same(results(ours, x_of()), results(model, x_of()))
    assert graphs.traced == [FUSED_BLOCK]


@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
def test_few_rows_without_a_gradient(lora_fused, monkeypatch, dora):
    """As in decoding: Inductor fuses PEFT's own products best, but for DoRA."""
    small_batch = lora_fused.peft.small_batch
    monkeypatch.setattr(small_batch, "_SMALL_ANYWHERE", True)
    monkeypatch.setattr(small_batch, "FEW_TRACED_ROWS", 64)
    model = block(use_dora=dora).eval()
    ours, graphs = kernelized(lora_fused, model, "cpu"), Graphs(lora_fused)
    ours.compile(backend=graphs, fullgraph=True)
    for rows in (1, 200):
        x = x_of(rows)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), model(x), rtol=0, atol=1e-10)
    assert graphs.traced == [FUSED_BLOCK if dora else Counter(), FUSED_BLOCK]
    with torch.no_grad():
        rows = lora_fused.explain(ours, rows=1)
    assert {row.reason for row in rows} == {None if dora else small_batch.FEW_TRACED}


def test_scalings_in_float16(lora_fused):
    """B times a scaling may leave its range: each value has its graph, and the range of an eager call."""
    model, layer = peft_linear(Case((5,), 32, 24, 4), torch.float16, torch.float16, DEVICE)
    with torch.no_grad():
        layer.lora_A["default"].weight.mul_(2.0**-12)
        layer.lora_B["default"].weight.fill_(300.0)
    ours, graphs = kernelized(lora_fused, model), Graphs(lora_fused)
    ours.compile(backend=graphs, fullgraph=True)
    x = torch.randn(5, 32, device=DEVICE, dtype=torch.float16)
    for value in (1.0, 150.0, 250.0):
        set_scalings(value, ours, model)
        with torch.no_grad():
            y, theirs = ours(x), model(x)
        exact = copy.deepcopy(model).double()(x.double())
        assert_as_good("y", y, theirs, exact, torch.float16)
    assert 3 <= len(graphs.traced) <= 4


# ---- what is PEFT's ----


def two_adapters(model):
    model.base_model.set_adapter(["default", "other"])


def merged(model):
    model.merge_adapter()


def disabled(model):
    model.disable_adapter_layers()


def hooked(model):
    for module in model.modules():
        if type(module).__name__ == "Linear" and hasattr(module, "lora_A"):
            module.lora_A["default"].register_forward_hook(lambda module, args, result: 1.5 * result)


@pytest.mark.parametrize("change", (two_adapters, merged, disabled, hooked), ids=lambda f: f.__name__)
def test_fallbacks(lora_fused, change):
    """PEFT's own operations, in one graph as PEFT's are."""
    model, graphs = block(others=["other"]), Graphs(lora_fused)
    change(model)
    ours = kernelized(lora_fused, model, "cpu")
    ours.compile(backend=graphs, fullgraph=True)
    assert_same(results(ours, x_of()), results(model, x_of()), 0.0 if not INDUCTOR else 1e-11)
    assert graphs.traced and not graphs.ops
