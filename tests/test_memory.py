"""What a fused call keeps and makes: the table "Saved for backward" of docs/design.md is read here
and compared with the saved-tensor hooks; nothing as large as the weight is made on the way; under
autocast every parameter is cast once."""

import contextlib
import pathlib
import re
from collections import Counter

import pytest
import torch
from helpers.cases import randomise_adapters
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

DESIGN = pathlib.Path(__file__).resolve().parent.parent / "docs" / "design.md"

# Every symbol and product of symbols that the table names has a size of its own, and few tokens
# make every activation smaller than any weight.
SIZES = dict(M=5, K=67, N=96, I=110, R=3)
SMALLEST_WEIGHT = min(SIZES["N"], SIZES["I"]) * SIZES["K"]


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(SIZES["K"], SIZES["N"])

    def forward(self, x):
        return self.proj(x)


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(SIZES["K"], SIZES["N"]) for _ in range(3))

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(SIZES["K"], SIZES["I"]), nn.Linear(SIZES["K"], SIZES["I"])
        self.down = nn.Linear(SIZES["I"], SIZES["N"])

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


# One per row of the table: the modules, and PEFT's configuration; None for no adapter at all.
VARIANTS = {
    "LoRA": (One, {}),
    "LoRA, dropout": (One, dict(lora_dropout=0.3)),
    "LoRA, lora_bias": (One, dict(lora_bias=True)),
    "LoRA, bias trained": (One, dict(bias="all")),
    "DoRA": (One, dict(use_dora=True)),
    "DoRA, dropout": (One, dict(use_dora=True, lora_dropout=0.3)),
    "group of three, LoRA": (Three, {}),
    "group of three, LoRA, dropout": (Three, dict(lora_dropout=0.3)),
    "group of three, DoRA": (Three, dict(use_dora=True)),
    "gated MLP, LoRA": (Gated, {}),
    "gated MLP, LoRA, dropout": (Gated, dict(lora_dropout=0.3)),
    "gated MLP, DoRA": (Gated, dict(use_dora=True)),
    "gated MLP, DoRA, dropout": (Gated, dict(use_dora=True, lora_dropout=0.3)),
    "frozen linear": (One, None),
}
ADAPTED = [name for name, (_, config) in VARIANTS.items() if config is not None]
# (base, adapter, under autocast). float64 has no native row norm and forms B·A: not here.
PRECISIONS = {
    "fp32": (torch.float32, torch.float32, False),
    "bf16": (torch.bfloat16, torch.bfloat16, False),
    "bf16, fp32 adapter": (torch.bfloat16, torch.float32, False),
    "bf16, fp32 adapter, autocast": (torch.bfloat16, torch.float32, True),
}


class Wrapped(nn.Module):
    """`kernelize` looks for gated MLPs below a model's root."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def build(lora_fused, device, variant, base=torch.float32, adapter=torch.float32):
    """(kernelized model that has seen two passes, so that groups run, x with a gradient)"""
    make, config = VARIANTS[variant]
    model = Wrapped(make()).to(device, base).requires_grad_(False)
    x = torch.randn(SIZES["M"], SIZES["K"], device=device).to(base).requires_grad_()
    if config is None:
        return model, x
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=SIZES["R"], target_modules=targets, **config)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    randomise_adapters(model, adapter)
    lora_fused.register_peft_layers()
    model = kernelize(model.train(), mode=Mode.TRAINING, device=device)
    for _ in range(2):
        model(x.detach().clone())
    rows = lora_fused.explain(model)
    assert all(row.fused for row in rows), str(rows)
    expected = {One: "single", Three: "q+k+v", Gated: "base_model.model.inner"}[make]
    assert {row.group for row in rows} == {expected}
    return model, x


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def storages_of(tensors):
    return {storage(t) for t in tensors if t.numel()}


def saved_tensors(model, x):
    """(what one call saves besides parameters and x, one per storage; how often x is saved)"""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = model(x)  # the result is alive here, so no storage is given twice
    parameters = storages_of(model.parameters())
    others = {storage(t): t for t in saved if storage(t) not in parameters}
    times_x = sum(storage(t) == storage(x) for t in saved)
    others.pop(storage(x), None)
    del result
    return list(others.values()), times_x


def table():
    """{variant: (times x is saved, sorted shapes)} as the document says."""
    section = DESIGN.read_text().split("## Saved for backward")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    return {variant: ({"once": 1, "no": 0}[x], shapes_in(saved)) for variant, x, saved in rows[2:]}


def shapes_in(text):
    """Sorted shapes of `t [M, 2R], z [M, N]`, evaluated; `-` for none."""
    names = re.sub(r"\[[^]]*\]", "", text)
    assert text == "-" or re.fullmatch(r"(\w+ ,? ?)+", names), f"cannot read {text!r}"
    shapes = [part.split(",") for part in re.findall(r"\[([^]]*)\]", text)]
    return sorted(tuple(evaluate(size.strip()) for size in shape) for shape in shapes)


def evaluate(size):
    """3R, N or 1."""
    factor, symbol = re.fullmatch(r"(\d*)([A-Z]?)", size).groups()
    return int(factor or 1) * SIZES.get(symbol, 1)


def test_the_table_has_a_row_for_every_variant():
    assert set(table()) == set(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_for_backward(lora_fused, device, variant):
    """Exactly the table: parameters are saved as themselves, and nothing else is."""
    times_x, shapes = table()[variant]
    others, seen_x = saved_tensors(*build(lora_fused, device, variant))
    assert sorted(tuple(t.shape) for t in others) == shapes
    assert seen_x == times_x


def test_dora_with_dropout_makes_one_value_again(lora_fused, device):
    """A graph that keeps its own tensors keeps gate's z for no backward; whoever watches through hooks gets it. The
    gradients are the same."""
    model, x = build(lora_fused, device, "gated MLP, DoRA, dropout", torch.bfloat16, torch.bfloat16)
    parameters = [p for p in model.parameters() if p.requires_grad]
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    widths, grads = [], []
    for keeping in (contextlib.nullcontext(), hooks):
        torch.manual_seed(3)
        with keeping:
            y = model(x)
        assert "Gated" in type(y.grad_fn).__name__
        shapes = [tuple(t.shape) for t in y.grad_fn.saved_tensors if t is not None]
        widths.append(shapes.count((SIZES["M"], SIZES["I"])))
        grads.append(torch.autograd.grad(loss_of(y), [x, *parameters]))
    assert widths == [3, 4]
    for again, kept in zip(*grads):
        torch.testing.assert_close(again, kept, rtol=2**-7, atol=1e-6)
        assert kept.any()


@pytest.mark.parametrize("variant", ADAPTED)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_saved_dtypes(lora_fused, device, variant, precision):
    """In half precision nothing of M·N or M·I elements is kept wider than the base."""
    base, adapter, autocast = PRECISIONS[precision]
    model, x = build(lora_fused, device, variant, base, adapter)
    with scope(device, autocast):
        others, _ = saved_tensors(model, x)
    wide = [t for t in others if t.dim() == 2 and t.shape[1] >= SIZES["N"]]
    _, shapes = table()[variant]
    assert len(wide) == sum(len(shape) == 2 and shape[1] >= SIZES["N"] for shape in shapes)
    assert all(t.dtype == base for t in wide), [(t.dtype, tuple(t.shape)) for t in wide]


def scope(device, autocast):
    return torch.autocast(device, dtype=torch.bfloat16) if autocast else contextlib.nullcontext()


@pytest.fixture(autouse=True)
def _watched(lora_fused, monkeypatch):
    """The mode that watches what our forward does is none for which PEFT's forward runs."""
    harmless = (*lora_fused.peft.replaced.HARMLESS_MODES, (Watch.__module__, Watch.__qualname__))
    monkeypatch.setattr(lora_fused.peft.replaced, "HARMLESS_MODES", harmless)


class Watch(TorchDispatchMode):
    """The largest tensor that any operation makes, how often each parameter is cast to half, and whether
    x is copied to a wider dtype."""

    def __init__(self, parameters, x=None):
        super().__init__()
        self.x, self.widened_x = x, []
        self.names = {storage(p): name for name, p in parameters}
        self.largest, self.by = 0, None
        self.casts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = storages_of(t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and storage(tensor) not in before and tensor.numel() > self.largest:
                self.largest, self.by = tensor.numel(), func
        if self.x is not None and any(storage(self.x) == each for each in before):
            made = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
            wide = [t for t in made if t.dtype.itemsize > self.x.dtype.itemsize]
            self.widened_x += [func for t in wide if t.shape == self.x.shape]
        source = {"aten::_to_copy": 0, "aten::copy_": 1}.get(func._schema.name)
        if source is not None and result.dtype in (torch.bfloat16, torch.float16):
            name = self.names.get(storage(args[source]))
            if name is not None and args[source].dtype != result.dtype:
                self.casts[name] += 1
        return result


def loss_of(result):
    outputs = result if isinstance(result, tuple) else (result,)
    return sum(y.float().sum() for y in outputs)


# Before compute capability 8.0 DoRA's norm is torch's, which forms B·A.
@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.sm80_kernels] if "DoRA" in v else []) for v in ADAPTED]
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_as_large_as_a_weight_is_made(lora_fused, device, variant, precision):
    """No B·A, no merged weight, no copy of one: forward and backward."""
    base, adapter, autocast = PRECISIONS[precision]
    model, x = build(lora_fused, device, variant, base, adapter)
    with Watch(model.named_parameters()) as watch:
        with scope(device, autocast):
            result = model(x)
        loss_of(result).backward()
    assert x.grad is not None
    assert 0 < watch.largest < SMALLEST_WEIGHT, f"{watch.by} made {watch.largest} elements"


def test_the_watch_sees_a_product_of_the_adapter(lora_fused):
    """PEFT's DoRA forms B·A: the same probe finds it in its forward."""
    model, x = build(lora_fused, "cpu", "DoRA")
    for module in model.modules():
        module.__dict__.pop("forward", None)
    with Watch(model.named_parameters()) as watch:
        model(x)
    assert watch.largest >= SMALLEST_WEIGHT


@pytest.mark.parametrize("variant", ADAPTED)
@pytest.mark.parametrize("base", (torch.float32, torch.bfloat16), ids=str)
def test_one_cast_of_a_parameter_under_autocast(lora_fused, device, variant, base):
    model, x = build(lora_fused, device, variant, base)
    with Watch(model.named_parameters()) as watch, scope(device, True):
        model(x)
    assert not watch.casts or max(watch.casts.values()) == 1, watch.casts
    if base == torch.float32:  # so the probe sees casts where there must be some
        assert any("base_layer.weight" in name for name in watch.casts)


@pytest.mark.parametrize("variant", ADAPTED)
def test_autocast_makes_no_wide_copy_of_x(lora_fused, device, variant):
    """And the LoRA path computes in half precision: t is kept so."""
    model, x = build(lora_fused, device, variant, torch.bfloat16, torch.float32)
    with Watch(model.named_parameters(), x) as watch, scope(device, True):
        others, _ = saved_tensors(model, x)
    assert not watch.widened_x
    ranks = [t for t in others if t.dim() == 2 and t.shape[1] in (SIZES["R"], 2 * SIZES["R"], 3 * SIZES["R"])]
    assert ranks and all(t.dtype == torch.bfloat16 for t in ranks)


def test_the_watch_sees_a_wide_copy_of_x(lora_fused):
    """PEFT casts x to the adapter's dtype."""
    model, x = build(lora_fused, "cpu", "LoRA", torch.bfloat16, torch.float32)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    with Watch(model.named_parameters(), x) as watch:
        model(x)
    assert watch.widened_x


# ---- x, which dA alone reads ----

# Base and adapter of what the native ops compute, and of what they do not.
WITHOUT_A = {"native": (torch.float32, torch.float32), "chain": (torch.float32, torch.bfloat16)}


def freeze_a(model, but=()):
    for name, parameter in model.named_parameters():
        if "lora_A" in name and not any(f".{module}." in name for module in but):
            parameter.requires_grad_(False)


def is_native(result):
    output = result[0] if isinstance(result, tuple) else result
    return type(output.grad_fn).__name__.startswith("Native")


def grads_of(model, x):
    """The result of a call with fixed masks, and every gradient by name, x's included; the model's are cleared."""
    torch.manual_seed(3)
    x.grad = None
    result = model(x)
    loss_of(result).backward()
    found = {"x": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("variant", ADAPTED)
@pytest.mark.parametrize("implementation", WITHOUT_A)
def test_x_is_not_saved_where_no_gradient_of_an_a_is_wanted(lora_fused, device, variant, implementation):
    """LoRA-FA trains B alone. What else is saved is what it was, and so are the other gradients, to the last bit."""
    model, x = build(lora_fused, device, variant, *WITHOUT_A[implementation])
    expected = grads_of(model, x)
    before, _ = saved_tensors(model, x)
    freeze_a(model)
    others, times_x = saved_tensors(model, x)
    assert times_x == 0
    assert is_native(model(x)) == (implementation == "native")
    assert sorted(tuple(t.shape) for t in others) == sorted(tuple(t.shape) for t in before)
    found = grads_of(model, x)
    assert set(found) == {name for name in expected if "lora_A" not in name}
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("implementation", WITHOUT_A)
def test_x_may_change_once_nothing_reads_it(lora_fused, device, implementation):
    model, x = build(lora_fused, device, "LoRA", *WITHOUT_A[implementation])
    freeze_a(model)
    expected = grads_of(model, x)
    x.grad = None
    between = x * 1
    result = model(between)
    between.mul_(2)
    loss_of(result).backward()
    (lora_b,) = [p for p in model.parameters() if p.requires_grad]
    assert torch.equal(x.grad, expected.pop("x"))
    assert torch.equal(lora_b.grad, *expected.values())


@pytest.mark.parametrize("implementation", WITHOUT_A)
@pytest.mark.parametrize(
    ("variant", "module", "times"),
    (("group of three, LoRA", "k", 1), ("gated MLP, LoRA", "up", 1), ("gated MLP, LoRA", "down", 0)),
)
def test_one_a_that_reads_x_is_enough(lora_fused, device, variant, module, times, implementation):
    """Down's reads h, which is made again."""
    model, x = build(lora_fused, device, variant, *WITHOUT_A[implementation])
    expected = grads_of(model, x)
    freeze_a(model, but=(module,))
    assert saved_tensors(model, x)[1] == times
    found = grads_of(model, x)
    assert {name.split(".")[-4] for name in found if "lora_A" in name} == {module}
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
