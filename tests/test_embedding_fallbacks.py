"""Embeddings that are PEFT's to compute, what other tools do to them, training, bad input."""

import copy
import warnings

import pytest
import torch
from helpers.cases import randomise_adapters, tiny_llama
from helpers.embeddings import VARIANTS, Case, adapt, draw_ids, fused, peft_embedding
from helpers.kernelizing import explain, kernelize_in_place, kernelized
from helpers.llamas import losses_of
from peft import LoraConfig, get_peft_model
from torch import nn


def assert_peft_runs(lora_fused, model, reason, ids, **call):
    ours = kernelized(lora_fused, model, "cpu")
    (row,) = explain(lora_fused, ours)
    assert not row.fused and reason in row.reason, str(row)
    result = ours(ids, **call)
    assert torch.equal(result, model(ids, **call))
    return result


CASE = Case((6,), 20, 16, 4)


@pytest.mark.parametrize(
    "options,reason",
    (
        (dict(max_norm=1.0), "max_norm"),
        (dict(scale_grad_by_freq=True), "scale_grad_by_freq"),
        (dict(sparse=True), "sparse"),
    ),
)
def test_options_left_to_peft(lora_fused, options, reason):
    assert_peft_runs(lora_fused, peft_embedding(CASE, **options), reason, draw_ids(CASE))


def test_merged_disabled_several_and_none_active(lora_fused):
    ids = draw_ids(CASE)
    for dora in VARIANTS:
        model = peft_embedding(CASE, dora=dora)
        layer = model.base_model.model.table
        layer.merge()
        assert_peft_runs(lora_fused, model, "merged", ids)
        layer.unmerge()
        layer.enable_adapters(False)
        assert_peft_runs(lora_fused, model, "disabled", ids)
        layer.enable_adapters(True)
        model.add_adapter("second", LoraConfig(r=3, target_modules=["table"], init_lora_weights=False))
        layer.set_adapter(["default", "second"])
        assert_peft_runs(lora_fused, model, "several active adapters", ids)
        layer._active_adapter = "elsewhere"
        assert_peft_runs(lora_fused, model, "no active adapter", ids)


def test_adapter_names(lora_fused):
    model = peft_embedding(CASE).eval()
    ours = kernelized(lora_fused, model, "cpu").base_model.model.table
    names = ["default", "__base__"] * 3
    ids = draw_ids(CASE)
    assert torch.equal(ours(ids, adapter_names=names), model.base_model.model.table(ids, adapter_names=names))
    with pytest.raises(ValueError, match="adapter_names"):
        ours(ids, adapter_names=names[:2])


def test_unknown_tables_hooks_and_sharding(lora_fused):
    class Doubling(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    ids = draw_ids(CASE)
    model = adapt(Doubling(20, 16), CASE, torch.float32, torch.float32)
    assert_peft_runs(lora_fused, model, "unknown base layer Doubling", ids)
    model = peft_embedding(CASE)
    handle = model.base_model.model.table.base_layer.register_forward_hook(lambda module, args, output: 2 * output)
    assert_peft_runs(lora_fused, model, "base_layer has hooks", ids)
    handle.remove()
    assert explain(lora_fused, kernelize_in_place(lora_fused, model, "cpu"))[0].fused
    model.base_model.model.table.input_fns["default"] = lambda inputs: inputs[0]
    assert_peft_runs(lora_fused, model, "tensor parallelism", ids)


def test_tables_and_adapters_of_other_sizes(lora_fused):
    """Larger than the embedding says: torch looks rows up in whatever is there."""
    ids, model = draw_ids(CASE), peft_embedding(CASE)
    layer = model.base_model.model.table
    layer.base_layer.weight = nn.Parameter(torch.randn(25, 16))
    assert_peft_runs(lora_fused, model, "weight has shape (25, 16)", ids)
    model = peft_embedding(CASE)
    model.base_model.model.table.lora_embedding_A["default"] = nn.Parameter(torch.randn(4, 25))
    assert_peft_runs(lora_fused, model, "adapter of shapes (4, 25) and (16, 4)", ids)


def test_a_scaled_embedding_that_computes_otherwise(lora_fused):
    """It puts a second table in place of an id, which no fused forward does."""
    modeling = pytest.importorskip("transformers.models.t5gemma2.modeling_t5gemma2")
    table = modeling.T5Gemma2TextScaledWordEmbedding(20, 16, padding_idx=0, embed_scale=2.0, eoi_token_index=3)
    table.eoi_embedding.data.normal_()
    model = adapt(table, CASE, torch.float32, torch.float32)
    ids = torch.tensor([1, 3, 3, 7])
    assert_peft_runs(lora_fused, model, "unknown base layer T5Gemma2TextScaledWordEmbedding", ids)


def test_a_padding_index_from_the_end(lora_fused):
    given = {
        name: tensor.requires_grad_() for name, tensor in arguments().items() if name in ("weight", "lora_a", "lora_b")
    }
    lora_fused.lora_embedding(torch.tensor([1, 7, 7]), **given, scaling=1.0, padding_idx=-1).sum().backward()
    for rows in (given["weight"].grad, given["lora_a"].grad.t()):
        assert rows[1].any() and not rows[7].any()


def test_embed_scale_that_the_base_ignores(lora_fused):
    model = peft_embedding(CASE)
    model.base_model.model.table.base_layer.embed_scale = 3.0
    assert_peft_runs(lora_fused, model, "embed_scale on a plain Embedding", draw_ids(CASE))


def test_autocast_with_float64_and_two_adapter_dtypes(lora_fused):
    ids = draw_ids(CASE)
    model = peft_embedding(CASE, torch.float64, torch.float64)
    ours = fused(lora_fused, copy.deepcopy(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(ids), model(ids)) and not explain(lora_fused, ours)[0].fused
    model = peft_embedding(CASE)
    layer = model.base_model.model.table
    layer.lora_embedding_B["default"].data = layer.lora_embedding_B["default"].data.bfloat16()
    ours = kernelized(lora_fused, model, "cpu")
    assert "two dtypes" in explain(lora_fused, ours)[0].reason
    for each in (model, ours):
        with pytest.raises(RuntimeError, match="same dtype"):
            each(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert explain(lora_fused, ours)[0].fused
        torch.testing.assert_close(ours(ids), model(ids), rtol=2e-2, atol=2e-2)


def test_resized_vocabulary_and_trainable_tokens(lora_fused):
    llama = tiny_llama()
    llama.resize_token_embeddings(71)
    model = get_peft_model(llama, LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False))
    ids = torch.randint(60, 71, (2, 7))
    expected = copy.deepcopy(model)(ids).logits
    torch.testing.assert_close(fused(lora_fused, model)(ids).logits, expected, rtol=1e-4, atol=1e-5)

    config = LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 5]}, init_lora_weights=False
    )
    model = get_peft_model(tiny_llama(), config)
    for name, parameter in model.named_parameters():
        if "trainable_tokens" in name:
            parameter.data.normal_()
    ids = torch.tensor([[1, 5, 9]])
    expected = copy.deepcopy(model)(ids).logits
    torch.testing.assert_close(kernelize_in_place(lora_fused, model, "cpu")(ids).logits, expected, rtol=1e-4, atol=1e-5)


# --- training ---


@pytest.mark.parametrize("dora", VARIANTS, ids=("lora", "dora"))
@pytest.mark.parametrize("tied", (False, True), ids=("untied", "tied with LoRA on the head"))
@pytest.mark.parametrize("dtype,tolerance", ((torch.float32, 1e-4), (torch.float64, 1e-10)), ids=str)
def test_twenty_steps_on_a_llama(lora_fused, device, dora, tied, dtype, tolerance):
    """float64 shows that nothing but rounding separates the two runs."""
    targets = ["embed_tokens", "lm_head"] if tied else ["embed_tokens"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about merging tied weights
        plain = get_peft_model(tiny_llama(dtype, tie_word_embeddings=tied), config, autocast_adapter_dtype=False)
    randomise_adapters(plain, dtype)
    plain = plain.to(device, dtype).train()
    ours = fused(lora_fused, copy.deepcopy(plain), device)
    theirs, losses = losses_of(plain, 20), losses_of(ours, 20)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(losses, theirs, rtol=tolerance, atol=0)


# --- input errors ---


def arguments():
    return dict(
        ids=torch.tensor([1, 2]),
        weight=torch.randn(8, 16),
        lora_a=torch.randn(4, 8),
        lora_b=torch.randn(16, 4),
        magnitude=torch.ones(16),
        embed_scale=torch.tensor(2.0),
    )


@pytest.mark.parametrize(
    "name,shape",
    (
        ("weight", (8,)),
        ("lora_a", (4, 7)),
        ("lora_a", (0, 8)),
        ("lora_b", (16, 3)),
        ("magnitude", (8,)),
        ("embed_scale", (2,)),
    ),
)
def test_bad_shapes_name_the_tensor(lora_fused, name, shape):
    with pytest.raises(ValueError, match=f"^{name}: shape"):
        lora_fused.lora_embedding(**{**arguments(), name: torch.ones(shape)}, scaling=1.0)


def test_bad_types_name_the_argument(lora_fused):
    for name, tensor in arguments().items():
        with pytest.raises(TypeError, match=f"^{name}: dtype"):
            lora_fused.lora_embedding(**{**arguments(), name: tensor.bool()}, scaling=1.0)
    for name in ("ids", "weight", "lora_a", "lora_b"):
        with pytest.raises(TypeError, match=f"^{name}: list"):
            lora_fused.lora_embedding(**{**arguments(), name: [1.0]}, scaling=1.0)
    with pytest.raises(TypeError, match="^scaling: nan"):
        lora_fused.lora_embedding(**arguments(), scaling=float("nan"))
    with pytest.raises(ValueError, match="^padding_idx: 8"):
        lora_fused.lora_embedding(**arguments(), scaling=1.0, padding_idx=8)
    with pytest.raises(ValueError, match="^lora_a: on meta"):
        lora_fused.lora_embedding(**{**arguments(), "lora_a": torch.empty(4, 8, device="meta")}, scaling=1.0)
