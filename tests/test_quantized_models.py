"""Whole models on four-bit bases: groups and gated MLPs, quantized and mixed; training, saving, what is kept for
backward, streams."""

import gc
import weakref
from random import Random

import pytest
import torch
from helpers.cases import FACTOR, QUANTIZED_CASES, UNIT, OwnForwards
from peft import PeftModel
from torch import nn

bnb = pytest.importorskip("bitsandbytes")
from helpers import quantized

BF16, F32 = torch.bfloat16, torch.float32
ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def run(model, ids, autocast=None):
    """(logits, gradients) of one training step's forward and backward."""
    model.zero_grad()
    with quantized.as_on_gpu(ids.device.type, autocast):
        out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def run_fused(model, ids, autocast=None):
    """`run` of a kernelized model, in which PEFT's own forward has no part."""
    with OwnForwards() as calls:
        results = run(model, ids, autocast)
    assert not calls
    return results


def assert_close(ours, theirs, tolerance):
    assert ours[1].keys() == theirs[1].keys()
    for name, (mine, peft) in {
        "logits": (ours[0], theirs[0]),
        **{n: (g, theirs[1][n]) for n, g in ours[1].items()},
    }.items():
        error = (mine.double() - peft.double()).norm() / peft.double().norm()
        assert error <= tolerance, (name, error.item())


@pytest.mark.parametrize("names", (None, {"q_proj", "v_proj", "gate_proj", "down_proj"}), ids=("all", "mixed"))
@pytest.mark.parametrize("config", ({}, dict(use_dora=True), dict(bias="all")), ids=str)
def test_llama(lora_fused, device, names, config):
    """Quantized and other projections in one group and one gated MLP: logits and all gradients of PEFT."""
    model, ids = quantized.llama(device, names, **config)
    theirs = run(model, ids)
    quantized.fuse(lora_fused, model, device)
    for _ in range(3):
        ours = run_fused(model, ids)
    rows = lora_fused.explain(model, rows=ids.numel())
    assert all(row.fused and row.backend != "fused delta" for row in rows), str(rows)
    groups = {row.module.rpartition(".")[2]: row.group for row in rows}
    assert groups["q_proj"] == groups["v_proj"] == "q_proj+k_proj+v_proj"
    assert groups["gate_proj"] == groups["down_proj"] != "single" and groups["gate_proj"].endswith("mlp")
    assert_close(ours, theirs, 2e-5)


@pytest.mark.parametrize("names", (None, {"q_proj", "v_proj", "gate_proj", "down_proj"}), ids=("all", "mixed"))
@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=("lora", "dora"))
def test_llama_under_autocast(lora_fused, device, names, config):
    """float32 activations, bf16 products; a mixed MLP runs its own forward, its projections fused."""
    model, ids = quantized.llama(device, names, compute=BF16, **config)
    for name, parameter in model.named_parameters():  # as prepare_model_for_kbit_training leaves them
        if "norm" in name or "embed" in name:
            parameter.data = parameter.data.float()
    truth = run(quantized.exact(model), ids)
    theirs = run(model, ids, BF16)
    quantized.fuse(lora_fused, model, device)
    for _ in range(2):
        ours = run_fused(model, ids, BF16)
    assert ours[0].dtype == theirs[0].dtype
    with quantized.as_on_gpu(device, BF16):
        rows = lora_fused.explain(model, rows=ids.numel())
    assert all(row.fused for row in rows), str(rows)
    flat = [{"logits": result[0], **result[1]} for result in (ours, theirs, truth)]
    for name, exact in flat[2].items():
        mine, peft = ((flat[i][name].double() - exact).norm() / exact.norm() for i in (0, 1))
        assert mine <= FACTOR * peft + UNIT[BF16], (name, mine.item(), peft.item())


@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=("lora", "dora"))
def test_a_frozen_quantized_member(lora_fused, device, config):
    """A gated MLP of which only gate is adapted: the others are quantized members without an adapter."""
    model, ids = quantized.llama(device, target_modules=["gate_proj", "q_proj"], **config)
    theirs = run(model, ids)
    quantized.fuse(lora_fused, model, device)
    ours = run_fused(model, ids)
    rows = lora_fused.explain(model, rows=ids.numel())
    assert {row.group for row in rows if row.module.endswith("gate_proj")} != {"single"}, str(rows)
    assert_close(ours, theirs, 2e-5)


@pytest.mark.parametrize("seed", range(40))
def test_random_members(lora_fused, device, seed):
    """Any projections quantized, any adapted, in ranks of their own: PEFT's logits and gradients."""
    random = Random(seed)
    some = lambda: set(random.sample(sorted(ALL), random.randint(1, len(ALL))))  # noqa: E731
    targets = some()
    config = dict(
        target_modules=targets,
        r=random.choice((4, 6, 9)),
        rank_pattern={random.choice(sorted(targets)): random.choice((5, 16))},
        use_dora=random.random() < 0.6,
        use_rslora=random.random() < 0.3,
        bias=random.choice(("none", "none", "all", "lora_only")),
    )
    model, ids = quantized.llama(device, random.choice((None, some())), **config)
    theirs = run(model, ids)
    quantized.fuse(lora_fused, model, device)
    for _ in range(3):
        ours = run_fused(model, ids)
    assert_close(ours, theirs, 2e-5)


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("config", ({}, dict(lora_dropout=0.2)), ids=str)
def test_checkpointing(lora_fused, device, reentrant, config):
    """Weights dequantized again for the recomputation, too: the gradients of a run without it, and PEFT's."""
    model, ids = quantized.llama(device, **config)
    theirs = run(model, ids)
    quantized.fuse(lora_fused, model, device)
    for _ in range(3):
        run(model, ids)
    torch.manual_seed(3)
    plain = run(model, ids)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    torch.manual_seed(3)
    ours = run_fused(model, ids)
    assert_close(ours, plain, 1e-6)
    if not config:
        assert_close(ours, theirs, 2e-5)


@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=("lora", "dora"))
def test_twenty_steps_and_back_to_plain_peft(lora_fused, device, config, tmp_path):
    """Losses of PEFT for 20 steps of AdamW; the saved adapter gives the same logits in plain PEFT. In
    training mode throughout: in evaluation bitsandbytes may compute in bfloat16 on a CPU."""

    def train(fused):
        model, ids = quantized.llama(device, **config)
        if fused:
            assert all(row.fused for row in quantized.fuse(lora_fused, model, device))
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return model, ids, torch.tensor(losses)

    model, ids, theirs = train(False)
    ours_model, _, ours = train(True)
    assert theirs[-1] < theirs[0] - 0.3
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-4)
    ours_model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = ours_model(ids).logits
    plain, _ = quantized.llama(device, seed=9)
    plain = PeftModel.from_pretrained(plain.unload(), tmp_path, autocast_adapter_dtype=False).train()
    assert type(plain.base_model.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_states_change_after_kernelizing(lora_fused, device):
    """Disabled, merged, a second adapter, a weight quantized anew: PEFT's results at once."""
    case = QUANTIZED_CASES[5]
    model = quantized.replace(quantized.One(case, F32, device), lambda m: quantized.four_bit(m, F32, device))
    model, layer = quantized.adapted(model, case)
    quantized.fuse(lora_fused, model, device)
    x = torch.randn(40, case.k, device=device)

    def check(fused=True):
        with torch.no_grad():
            with OwnForwards() as calls:
                ours = model(x)
            assert bool(calls) != fused
            torch.testing.assert_close(ours, type(layer).forward(layer, x), rtol=1e-5, atol=1e-5)

    check()
    with model.disable_adapter():
        check(fused=False)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    check()
    model.base_model.set_adapter(["default", "other"])
    with pytest.warns(UserWarning, match="none of the 1"):
        assert "several active adapters" in lora_fused.explain(model)[0].reason
    check(fused=False)
    model.set_adapter("default")
    new = quantized.four_bit(nn.Linear(case.k, case.n, device=device), F32, device, quant_type="fp4", blocksize=32)
    layer.base_layer.weight = new.weight
    check()
    layer.base_layer.weight.data = torch.randint_like(new.weight.data, 0, 256)
    check()
    model.merge_adapter()
    check(fused=False)


def test_small_inputs_do_not_dequantize(lora_fused, device, monkeypatch):
    """Decoding, one row: the base's own product, nothing dequantized by us. The bases in training mode, since in
    evaluation bitsandbytes packs the weight anew on CPUs with AVX-512 BF16, and it is its own then."""
    model, ids = quantized.llama(device)
    for module in model.modules():
        module.training &= not lora_fused.peft.linear.is_lora_module(module)
    quantized.fuse(lora_fused, model, device)
    calls = []
    for owner, name in ((lora_fused.shared_input, "compute"), (lora_fused.functional.dispatch, "compute_gated")):
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, own=own: calls.append(args) or own(*args))
    with torch.no_grad():
        model(ids[:1, :1])
        assert not calls
        model(ids)
        assert len(calls) == 10  # four projections and one gated MLP a layer


# Saved for backward: the packed weight and its scales, never a weight in floating point.


@pytest.mark.parametrize("config", ({}, dict(use_dora=True), dict(lora_dropout=0.1)), ids=str)
def test_nothing_dequantized_is_saved(lora_fused, device, config):
    model, ids = quantized.llama(device, **config)
    quantized.fuse(lora_fused, model, device)
    for _ in range(3):
        run(model, ids)
    known = {t.untyped_storage().data_ptr() for t in model.parameters()}
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            known |= {
                t.untyped_storage().data_ptr()
                for t in (state.absmax, state.offset, state.state2.absmax, state.state2.code)
            }
    saved, floats = [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = model(ids, labels=ids).loss
    packed = [t for t in saved if t.dtype == torch.uint8]
    floats = [t for t in saved if t.is_floating_point() and t.untyped_storage().data_ptr() not in known]
    assert len(packed) >= 14 and {t.untyped_storage().data_ptr() for t in packed} <= known
    weights = {(64, 64), (32, 64), (128, 64), (64, 128)}
    assert not [t for t in floats if tuple(t.shape) in weights or tuple(t.shape[::-1]) in weights]
    loss.backward()


def test_dequantized_weights_die_with_their_product(lora_fused, device, monkeypatch):
    """Weights quantized from another dtype than they compute in go through Python: PEFT's results, and no
    weight in floating point outlives its product."""
    model, ids = quantized.llama(device, stored=BF16)
    theirs = run(model, ids)
    quantized.fuse(lora_fused, model, device)
    assert_close(run(model, ids), theirs, 2e-5)
    alive, most = [], []
    own = lora_fused.quantization._rows

    def watched(*args):
        weight = own(*args)
        alive.append(weakref.ref(weight))
        most.append(sum(ref() is not None for ref in alive))
        return weight

    monkeypatch.setattr(lora_fused.quantization, "_rows", watched)
    loss = model(ids, labels=ids).loss
    gc.collect()
    assert len(alive) == 14 and not any(ref() is not None for ref in alive)
    loss.backward()
    assert len(alive) == 14 + 11 and max(most) <= 2  # ids need no gradient


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_few_dequantized_weights_at_a_time(lora_fused):
    """Three projections of one input: one weight in floating point during the forward, the group's own,
    which one launch may need, during the backward, none afterwards."""

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(2048, 2048, bias=False) for _ in range(3))

        def forward(self, x):
            return self.q(x) + self.k(x) + self.v(x)

    model = Three().to("cuda", BF16)
    model = quantized.replace(model, lambda m: quantized.four_bit(m, BF16, "cuda"))
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q", "k", "v"])).train()
    quantized.fuse(lora_fused, model, "cuda")
    x = torch.randn(64, 2048, device="cuda", dtype=BF16, requires_grad=True)
    for _ in range(3):
        with torch.autocast("cuda", dtype=BF16):
            y = model(x)
        y.sum().backward()
    del y
    weight = 2048 * 2048 * 2
    for backward, least, most in ((False, 1, 1.9), (True, 1, 3.9)):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=BF16):
            y = model(x)
        if backward:
            y.sum().backward()
        assert least * weight <= torch.cuda.max_memory_allocated() - before < most * weight
        del y


# Two things at once


def test_two_models_interleaved(lora_fused, device):
    """Forwards of two models before either's backward: each its own weights."""
    models = [quantized.llama(device, seed=seed) for seed in (1, 2)]
    for model, _ in models:
        for layer in model.modules():
            if isinstance(layer, bnb.nn.Linear4bit):
                layer.weight.data = torch.randint_like(layer.weight.data, 0, 256)
        quantized.fuse(lora_fused, model, device)
        run(model, models[0][1])
    ids = models[0][1]
    alone = [run_fused(model, ids) for model, _ in models]
    for model, _ in models:
        model.zero_grad()
    outs = [model(ids, labels=ids) for model, _ in models]
    for out in outs:
        out.loss.backward()
    for (model, _), out, expected in zip(models, outs, alone):
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert_close((out.logits.detach(), grads), expected, 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_two_streams(lora_fused):
    """Two models on two streams at once, many times: no weight of one is seen by the other."""
    models = [quantized.llama("cuda", compute=BF16, seed=seed) for seed in (1, 2)]
    for model, ids in models:
        quantized.fuse(lora_fused, model, "cuda")
        run(model, ids)
    alone = [run(model, ids) for model, ids in models]
    streams = [torch.cuda.Stream() for _ in models]
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for stream, (model, ids) in zip(streams, models):
            with torch.cuda.stream(stream):
                results.append(run(model, ids))
        torch.cuda.synchronize()
        for ours, expected in zip(results, alone):
            assert_close(ours, expected, 1e-3)
