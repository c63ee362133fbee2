"""Which modules of transformers are gated MLPs, each verified by computing it from its description."""

import re
import warnings

import pytest
from helpers.cases import assert_computes_gated_mlp
from helpers.mlp_forwards import SIZES, transformers_mlp

RECOGNISED = {
    "llama.LlamaMLP": "silu",
    "mistral.MistralMLP": "silu",
    "qwen2.Qwen2MLP": "silu",
    "qwen3.Qwen3MLP": "silu",
    "qwen3_moe.Qwen3MoeMLP": "silu",
    "gemma.GemmaMLP": "gelu_tanh",
    "gemma2.Gemma2MLP": "gelu_tanh",
    "gemma3.Gemma3MLP": "gelu_tanh",
    "phi3.Phi3MLP": "silu",
    "olmo.OlmoMLP": "silu",
    "olmo2.Olmo2MLP": "silu",
    "granite.GraniteMLP": "silu",
    "granitemoeshared.GraniteMoeSharedMLP": "silu",
    "glm.GlmMLP": "silu",
    "glm4.Glm4MLP": "silu",
    "stablelm.StableLmMLP": "silu",
    "cohere.CohereMLP": "silu",
    "llama4.Llama4TextMLP": "silu",
    "deepseek_v2.DeepseekV2MLP": "silu",
    "deepseek_v3.DeepseekV3MLP": "silu",
    "smollm3.SmolLM3MLP": "silu",
    "lfm2.Lfm2MLP": "silu",
    "jamba.JambaMLP": "silu",
    "mllama.MllamaTextMLP": "silu",
    "pixtral.PixtralMLP": "gelu",
    "dinov2.Dinov2SwiGLUFFN": "silu",
    "zamba.ZambaMLP": "gelu",
    "recurrent_gemma.RecurrentGemmaMlp": "gelu_tanh",
    "qwen2_5_vl.Qwen2_5_VLMLP": "silu",
    "qwen2_5_omni.Qwen2_5OmniMLP": "silu",
    "glm4v.Glm4VisionMlp": "silu",
    "exaone4_5.Exaone4_5_MLP": "silu",
    # While nothing is dropped, in one dtype.
    "t5.T5DenseGatedActDense": "relu",
    "mt5.MT5DenseGatedActDense": "gelu_tanh",
    "umt5.UMT5DenseGatedActDense": "gelu_tanh",
    "longt5.LongT5DenseGatedActDense": "relu",
    "modernbert.ModernBertMLP": "gelu",
}
FUSED = {"Phi3MLP", "GlmMLP", "Glm4MLP", "GraniteMoeSharedMLP", "Dinov2SwiGLUFFN", "ModernBertMLP"}
NOT_GATED = {
    "starcoder2.Starcoder2MLP": "dropout",
    "falcon.FalconMLP": "not a product",
    "phi.PhiMLP": "not a product",
    "gpt_neox.GPTNeoXMLP": "not a product",
    "nemotron.NemotronMLP": "not a product",
    "arcee.ArceeMLP": "not a product",
    "clip.CLIPMLP": "not a product",
    "bitnet.BitNetMLP": "ffn_sub_norm",
    "falcon_h1.FalconH1MLP": "mul",
    "moshi.MoshiGatingMLP": "reads __get__",
    "mixtral.MixtralSparseMoeBlock": "reads __get__",
    "deepseek_v3.DeepseekV3MoE": "reads __get__",
    "qwen3_moe.Qwen3MoeSparseMoeBlock": "reads __get__",
    "llama4.Llama4TextMoe": ".",
}
SIZES |= dict(shared_intermediate_size=24)
SIZES |= dict(dropout_rate=0.0)
SIZES |= dict(num_local_experts=4, n_routed_experts=4, num_experts=4, num_experts_per_tok=2, mlp_ratio=2)


@pytest.mark.parametrize("name", RECOGNISED)
def test_gated_mlps_of_transformers(mlp_tracer, activation_formulas, name):
    module = transformers_mlp(name)
    found = mlp_tracer.recognise(module)
    assert not isinstance(found, mlp_tracer.Fallback), found
    fused = name.split(".")[1] in FUSED and not hasattr(module, "gate_proj")  # some have been taken apart
    assert found.activation == RECOGNISED[name] and found.fused == fused
    assert_computes_gated_mlp(module, found, activation_formulas, module.get_submodule(found.gate).in_features)


@pytest.mark.parametrize("name", NOT_GATED)
def test_other_mlps_of_transformers(mlp_tracer, name):
    found = mlp_tracer.recognise(transformers_mlp(name))
    assert isinstance(found, mlp_tracer.Fallback) and re.search(NOT_GATED[name], found.reason), found


def test_every_module_of_small_models(mlp_tracer, activation_formulas):
    """All modules of whole models: only MLPs are taken for gated MLPs, and rightly."""
    from transformers import AutoConfig, AutoModel

    shape = dict(SIZES, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=32)
    names = ("llama", "gemma2", "phi3", "mixtral", "olmo2", "granite", "glm4", "gpt2", "t5", "bert", "opt", "qwen3_moe")
    seen = {}
    for name in names:
        config = AutoConfig.for_model(name, **shape, pad_token_id=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModel.from_config(config)
        for path, module in model.named_modules():
            found = mlp_tracer.recognise(module)
            if not isinstance(found, mlp_tracer.Fallback):
                seen.setdefault(name, []).append(path.rsplit(".", 1)[-1])
                assert_computes_gated_mlp(
                    module, found, activation_formulas, module.get_submodule(found.gate).in_features
                )
    assert seen == {name: ["mlp", "mlp"] for name in ("llama", "gemma2", "phi3", "olmo2", "granite", "glm4")}
