"""Embeddings with LoRA and DoRA: PEFT itself is the truth."""

import copy

import pytest
import torch
from helpers.embeddings import (
    CASES,
    DTYPES,
    VARIANTS,
    Case,
    Model,
    adapt,
    assert_parity,
    draw_ids,
    fused,
    peft_embedding,
    run,
)
from peft import LoraConfig, get_peft_model
from torch import nn


@pytest.mark.parametrize("dora", VARIANTS, ids=("lora", "dora"))
@pytest.mark.parametrize("base,adapter", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("autocast", (None, torch.bfloat16), ids=("plain", "autocast"))
def test_embedding_matches_peft(lora_fused, device, case, base, adapter, autocast, dora):
    model = peft_embedding(case, base, adapter, device, dora)
    dy = torch.randn(*case.lead, case.h, device=device).to(base)
    terms = case.v + case.h + dy.numel() if device == "cuda" else 0
    assert_parity(lora_fused, model, draw_ids(case, device), dy, device, autocast, terms)


@pytest.mark.parametrize("dora", VARIANTS, ids=("lora", "dora"))
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_ids_of_both_dtypes_and_any_strides(lora_fused, device, dora, dtype):
    case = Case((5, 12), 30, 24, 4)
    ids = torch.randint(0, case.v, (12, 10), device=device, dtype=dtype).t()[::2]
    dy = torch.randn(24, 5, 12, device=device).permute(1, 2, 0)
    assert not ids.is_contiguous() and not dy.is_contiguous()
    assert_parity(lora_fused, peft_embedding(case, device=device, dora=dora), ids, dy, device)


@pytest.mark.parametrize("dora", VARIANTS, ids=("lora", "dora"))
def test_padding_row_gets_no_gradient_but_b_gets_its_tokens(lora_fused, device, dora):
    case = Case((4,), 10, 16, 3, padding=2)
    ids = torch.full((4,), 2, device=device)
    ours = assert_parity(
        lora_fused, peft_embedding(case, device=device, dora=dora), ids, torch.randn(4, 16, device=device), device
    )
    da = next(value for name, value in ours.items() if "embedding_A" in name)
    db = next(value for name, value in ours.items() if "embedding_B" in name)
    assert da.abs().max() == 0 and db.abs().max() > 0


@pytest.mark.parametrize("dora", VARIANTS, ids=("lora", "dora"))
@pytest.mark.parametrize("padding", (None, 3))
def test_trainable_table(lora_fused, device, dora, padding):
    case = Case((50,), 20, 24, 4, padding=padding)
    model = peft_embedding(case, device=device, dora=dora)
    model.base_model.model.table.base_layer.requires_grad_(True)
    ours = assert_parity(lora_fused, model, draw_ids(case, device), torch.randn(50, 24, device=device), device)
    assert any(name.endswith("base_layer.weight") for name in ours)


def scaled_tables(case, scale):
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    for cls in (Gemma3TextScaledWordEmbedding, BartScaledWordEmbedding):
        yield cls(case.v, case.h, case.padding, embed_scale=scale)


@pytest.mark.parametrize("dora", VARIANTS, ids=("lora", "dora"))
@pytest.mark.parametrize("base,adapter", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_scale_of_the_embedding(lora_fused, device, base, adapter, dora):
    """Applied after norm and mag_norm_scale, to base and delta alike; 7.3 is no bfloat16 number."""
    case = Case((2, 9), 31, 40, 4, padding=0)
    for table in scaled_tables(case, 7.3):
        model = adapt(table, case, base, adapter, device, dora)
        if isinstance(table.embed_scale, torch.Tensor):
            assert table.embed_scale.dtype == base  # `model.to(dtype)` casts the buffer
        dy = torch.randn(2, 9, 40, device=device).to(base)
        assert_parity(lora_fused, model, draw_ids(case, device), dy, device)


def test_a_fresh_adapter_changes_no_bit(lora_fused, device):
    """B is zero: the result is the base embedding's own, its scale rounded as the base rounds it."""
    case = Case((40,), 31, 48, 4)
    for table in (nn.Embedding(31, 48), *scaled_tables(case, 7.3)):
        table = table.to(device, torch.bfloat16)
        if hasattr(table, "embed_scale") and isinstance(table.embed_scale, torch.Tensor):
            table.embed_scale = nn.Buffer(torch.tensor(7.3, device=device), persistent=False)
        ids = draw_ids(case, device)
        expected = table(ids)
        model = get_peft_model(Model(table), LoraConfig(r=4, target_modules=["table"]))
        for name, parameter in model.named_parameters():
            if "embedding_B" in name:
                parameter.data.zero_()
        assert torch.equal(fused(lora_fused, model, device)(ids), expected)


def test_gradcheck(lora_fused):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    ids = torch.tensor([[0, 3, 3], [6, 0, 1]])
    w, a, b, m = draw(7, 5), draw(3, 7), draw(5, 3), draw(5)
    lora = lambda w, a, b: lora_fused.lora_embedding(ids, w, a, b, 0.3, embed_scale=2.0)  # noqa: E731
    assert torch.autograd.gradcheck(lora, (w, a, b))
    dora = lambda m: lora_fused.lora_embedding(ids, w, a, b, 0.3, magnitude=m, embed_scale=2.0)  # noqa: E731
    assert torch.autograd.gradcheck(dora, (m,))


@pytest.mark.parametrize("frozen", ("embedding_A", "embedding_B", "magnitude"))
def test_one_frozen_parameter(lora_fused, device, frozen):
    case = Case((30,), 12, 24, 4)
    model = peft_embedding(case, device=device, dora=True)
    next(p for name, p in model.named_parameters() if frozen in name).requires_grad_(False)
    ours = assert_parity(lora_fused, model, draw_ids(case, device), torch.randn(30, 24, device=device), device)
    assert len(ours) == 3


def test_no_gradient_wanted_and_double_backward(lora_fused):
    case = Case((5,), 12, 16, 4)
    model = peft_embedding(case, dora=True)
    ids = draw_ids(case)
    expected = copy.deepcopy(model)(ids)
    model = fused(lora_fused, model)
    for scope in (torch.no_grad, torch.inference_mode):
        with scope():
            torch.testing.assert_close(model(ids), expected)
    b = next(p for name, p in model.named_parameters() if "embedding_B" in name)
    (db,) = torch.autograd.grad(model(ids).square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="^lora_fused: gradients of gradients .*without kernelize"):
        db.sum().backward()


def test_saved_for_backward(lora_fused):
    """The ids, the gathered rows, the norm and the mag_norm_scale; nothing of size M×H or V×H beyond the parameters."""
    case = Case((50,), 40, 64, 8)
    model = fused(lora_fused, peft_embedding(case, dora=True))
    ids, saved = draw_ids(case), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(ids)
    known = {p.data_ptr() for p in model.parameters()} | {ids.data_ptr()}
    assert sorted(tuple(t.shape) for t in saved if t.data_ptr() not in known) == [(50, 8), (64,), (64,)]


def test_the_norm_follows_every_change(lora_fused, device):
    """No norm outlives a call: changed in place, through .data and by an optimizer."""
    case = Case((9,), 20, 24, 4)
    plain = peft_embedding(case, device=device, dora=True)
    ours, ids = fused(lora_fused, copy.deepcopy(plain), device), draw_ids(case, device)
    for change in range(3):
        torch.testing.assert_close(ours(ids), plain(ids), rtol=1e-4, atol=1e-5)
        for model in (plain, ours):
            b = next(p for name, p in model.named_parameters() if "embedding_B" in name)
            b.data.mul_(3) if change else b.detach().add_(1)


def test_same_bits_every_time(lora_fused, device):
    case = Case((3000,), 50, 96, 8)
    model = fused(lora_fused, peft_embedding(case, device=device, dora=True), device)
    ids, dy = draw_ids(case, device), torch.randn(3000, 96, device=device)
    first, second = run(copy.deepcopy(model), ids, dy), run(copy.deepcopy(model), ids, dy)
    assert all(torch.equal(first[name], second[name]) for name in first)
