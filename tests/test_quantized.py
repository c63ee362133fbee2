"""QLoRA and QDoRA: PEFT's Linear4bit fused, on the same quantized weights as PEFT itself.

Truth is PEFT in float64 on the weights that bitsandbytes dequantizes; the yardstick is PEFT on the
quantized layer.
"""

import pytest
import torch
from helpers.cases import (
    BROKEN_ROWS,
    QUANTIZED_CASES,
    VARIANTS,
    DrawnDropout,
    OwnForwards,
    assert_as_good,
    take_exactly,
)
from torch.utils.checkpoint import checkpoint

pytest.importorskip("bitsandbytes")
from helpers import quantized

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# (x and compute dtype, adapter, autocast to)
PRECISIONS = ((F32, F32, None), (BF16, F32, None), (BF16, BF16, None), (BF16, F32, BF16), (F16, F16, None))
STATES = (("nf4", True, 64), ("nf4", False, 32), ("fp4", True, 64), ("fp4", False, 64))


def make(case, compute, adapter, device, state=("nf4", True, 64), **config):
    """(PEFT's model on a 4-bit layer, its LoRA layer, the same model in float64 on the dequantized weight)"""
    quant_type, nested, blocksize = state
    model = quantized.One(case, compute, device)
    options = dict(quant_type=quant_type, nested=nested, blocksize=blocksize)
    quantized.replace(model, lambda m: quantized.four_bit(m, compute, device, **options))
    model, layer = quantized.adapted(model, case, adapter, **config)
    exact = quantized.One(case, torch.float64, device)
    exact.proj.weight.data = quantized.dequantized(layer.base_layer).double()
    if case.bias:
        exact.proj.bias.data = layer.base_layer.bias.data.double()
    exact, _ = quantized.adapted(exact, case, torch.float64, **config)
    trained = dict(model.named_parameters())
    for name, parameter in exact.named_parameters():
        if "base_layer" not in name:
            parameter.data = trained[name].data.double()
    return model, layer, exact


def compare(lora_fused, case, precision, device, state, config, expect):
    compute, adapter, autocast = precision
    dropout = config.get("lora_dropout", 0.0)
    model, layer, exact = make(case, compute, adapter, device, state, **config)
    x = torch.randn(*case.lead, case.k, device=device).to(compute)
    dy = torch.randn(*case.lead, case.n, device=device).to(compute)
    if dropout:
        mask = DrawnDropout(lora_fused, dropout, x.shape, device)
        own = layer.lora_dropout["default"]
        layer.lora_dropout["default"] = exact.base_model.model.proj.lora_dropout["default"] = mask
    generator = torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else None
    truth, true_grads = quantized.step(exact, x.double(), dy)
    theirs, their_grads = quantized.step(model, x, dy, autocast)
    if dropout:
        layer.lora_dropout["default"] = own
    quantized.fuse(lora_fused, model, device)
    with quantized.as_on_gpu(device, autocast):
        row = lora_fused.explain(model, rows=x.numel() // case.k)[0]
    said = "PEFT's" if not row.fused else "fused delta" if row.backend == "fused delta" else "fused"
    assert said == expect, row
    torch.set_rng_state(generator[0])
    if device == "cuda":
        torch.cuda.set_rng_state(generator[1])
    with OwnForwards() as calls:
        ours, our_grads = quantized.step(model, x, dy, autocast)
    assert bool(calls) == (expect == "PEFT's")
    unit = autocast or compute
    assert_as_good("y", ours, theirs, truth, unit)
    assert set(our_grads) == set(their_grads)
    for name, grad in our_grads.items():
        assert_as_good(name, grad, their_grads[name], true_grads[name], unit, terms=case.k)


@pytest.mark.parametrize("case", QUANTIZED_CASES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_layer_matches_peft(lora_fused, device, case, variant, precision):
    compare(lora_fused, case, precision, device, STATES[0], VARIANTS[variant], "fused")


@pytest.mark.parametrize("case", QUANTIZED_CASES, ids=str)
@pytest.mark.parametrize(
    "variant", [name for name, each in VARIANTS.items() if not {"lora_dropout", "use_dora"} <= each.keys()]
)
def test_float32_adapters_as_on_a_gpu(lora_fused, monkeypatch, case, variant):
    """In two parts, by the native op."""
    calls = take_exactly(lora_fused, monkeypatch)
    compare(lora_fused, case, (torch.bfloat16, torch.float32, None), "cpu", STATES[0], VARIANTS[variant], "fused")
    assert calls and all(calls)


@pytest.mark.parametrize("rows", (0, 1, 4, 5))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", (PRECISIONS[1], PRECISIONS[3]), ids=str)
def test_few_rows_without_a_gradient(lora_fused, device, rows, variant, precision):
    """Decoding: bitsandbytes' product of up to four rows, with PEFT around it, for DoRA with our delta."""
    compute, adapter, autocast = precision
    case = QUANTIZED_CASES[5]
    model, layer, exact = make(case, compute, adapter, device, STATES[0], **VARIANTS[variant])
    for each in (model, exact):
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
    layer.training = False  # alone: in evaluation bitsandbytes packs the weight anew on some CPUs
    x = torch.randn(rows, case.k, device=device).to(compute)
    quantized.fuse(lora_fused, model, device)
    with torch.no_grad(), quantized.as_on_gpu(device, autocast):
        theirs = type(layer).forward(layer, x)
        with OwnForwards() as calls:
            ours = model(x)
        row = lora_fused.explain(model, rows=rows)[0]
    with torch.no_grad():
        assert_as_good("y", ours, theirs, exact(x.double()), autocast or compute)
    assert bool(calls) != row.fused
    if rows > 4:
        assert row.fused and row.backend != "fused delta", row
    elif variant.startswith("dora"):
        assert row.fused and row.backend == "fused delta", row
    else:
        assert not row.fused and row.reason == lora_fused.peft.small_batch.SMALL, row


def test_few_rows_of_a_reentrant_checkpoint(lora_fused, device):
    """Its forward has no gradient, what it computes again has: y = J x + b and dx = Jᵀ dy with one mask in J."""
    case = QUANTIZED_CASES[5]
    model, layer, _ = make(case, F32, F32, device, STATES[0], lora_dropout=0.5)
    quantized.fuse(lora_fused, model, device)
    x, dy = torch.randn(2, case.k, device=device, requires_grad=True), torch.randn(2, case.n, device=device)
    with OwnForwards() as calls:
        y = checkpoint(model, x, use_reentrant=True)
        y.backward(dy)
    assert not calls
    bias = layer.base_layer.bias
    linear = y if bias is None else y - bias
    torch.testing.assert_close((linear * dy).sum(), (x * x.grad).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("state", STATES[1:], ids=str)
@pytest.mark.parametrize("variant", ("lora", "dora"))
@pytest.mark.parametrize("precision", PRECISIONS[:3], ids=str)
def test_quantizations(lora_fused, device, state, variant, precision):
    compare(lora_fused, QUANTIZED_CASES[5], precision, device, state, VARIANTS[variant], "fused")


@pytest.mark.parametrize("case", BROKEN_ROWS, ids=str)
@pytest.mark.parametrize("variant", ("lora", "dora", "dropout"))
def test_rows_of_broken_blocks(lora_fused, device, case, variant):
    """Fused on a GPU. On the CPU, where bitsandbytes reads them in its own way, its own forward runs."""
    expect = "fused" if device == "cuda" else "PEFT's" if variant == "dora" else "fused delta"
    compare(lora_fused, case, PRECISIONS[0], device, STATES[0], VARIANTS[variant], expect)


@pytest.mark.parametrize("compute, x_dtype", ((BF16, F32), (F32, BF16), (F16, BF16)), ids=str)
@pytest.mark.parametrize("variant", ("lora", "dora", "lora_bias", "dropout"))
def test_products_in_another_dtype_than_x(lora_fused, device, compute, x_dtype, variant):
    """The base computes in its own dtype, the adapter in x's: the base is called."""
    case = QUANTIZED_CASES[5]
    model, layer, _ = make(case, compute, F32, device, **VARIANTS[variant])
    x, dy = torch.randn(40, case.k, device=device).to(x_dtype), torch.randn(40, case.n, device=device)
    if variant == "dropout":
        own = layer.lora_dropout["default"]
        layer.lora_dropout["default"] = DrawnDropout(lora_fused, 0.3, x.shape, device)
    state = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    theirs, their_grads = quantized.step(model, x, dy)
    if variant == "dropout":
        layer.lora_dropout["default"] = own
    quantized.fuse(lora_fused, model, device)
    (torch.cuda if device == "cuda" else torch).set_rng_state(state)
    with OwnForwards() as calls:
        ours, our_grads = quantized.step(model, x, dy)
    assert not calls
    narrow = BF16 if BF16 in (compute, x_dtype) else F16
    assert ours.dtype == theirs.dtype == x_dtype
    torch.testing.assert_close(ours, theirs, rtol=4 * 2.0**-8, atol=0.05)
    for name, grad in our_grads.items():
        assert grad.dtype == their_grads[name].dtype
        error = (grad.double() - their_grads[name].double()).norm() / their_grads[name].double().norm()
        assert error < (2.0**-7 if narrow == BF16 else 2.0**-9), (name, error)


def test_float32_x_under_autocast_keeps_its_dtype(lora_fused, device):
    """As the norms of `prepare_model_for_kbit_training` give it; bitsandbytes casts back to x's dtype."""
    case = QUANTIZED_CASES[5]
    model, _, exact = make(case, BF16, F32, device)
    x, dy = torch.randn(40, case.k, device=device), torch.randn(40, case.n, device=device)
    theirs, their_grads = quantized.step(model, x, dy, BF16)
    truth, true_grads = quantized.step(exact, x.double(), dy.double())
    with torch.autocast(device, dtype=BF16):
        rows = quantized.fuse(lora_fused, model, device)
    assert rows[0].fused and rows[0].backend != "fused delta"
    with OwnForwards() as calls:
        ours, our_grads = quantized.step(model, x, dy, BF16)
    assert not calls and ours.dtype == F32
    assert_as_good("y", ours, theirs, truth, BF16)
    for name, grad in our_grads.items():
        assert_as_good(name, grad, their_grads[name], true_grads[name], BF16)
