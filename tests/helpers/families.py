"""Model families in their smallest sizes: what the table of families in docs/support.md is made of, and what it is held
against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers

from helpers.mlps import SIZES

# One vocabulary of sizes; a configuration takes of it what it knows.
TEXT = dict(SIZES, bos_token_id=1, eos_token_id=2)
GPT = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=48, bos_token_id=1, eos_token_id=2)
PAIR = dict(
    vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1, forced_eos_token_id=None, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
)  # fmt: skip
T5 = dict(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
    decoder_start_token_id=0, pad_token_id=0,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
)
FALCON = {
    name: size for name, size in TEXT.items() if name not in ("head_dim", "num_key_value_heads", "intermediate_size")
}
EXPERTS = dict(
    TEXT, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
)
STATE_SPACE = dict(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0)


@dataclass(frozen=True)
class Family:
    """config: the configuration's class in transformers. model: the class that builds from it. inputs: of one call,
    with labels where the model gives a loss. targets: of LoRA. parts: configurations inside the configuration. dora:
    whether PEFT has DoRA for all of the targets."""

    config: str
    sizes: dict
    model: str = "AutoModelForCausalLM"
    inputs: Callable[[], dict] = field(default=lambda: tokens())
    generates: bool = True
    targets: str | list[str] = "all-linear"
    parts: Callable[[], dict] | None = None
    dora: bool = True

    def is_here(self) -> bool:
        return hasattr(transformers, self.config) and hasattr(transformers, self.model)


def _tokens(low: int = 3, shape: tuple = (2, 7)) -> torch.Tensor:
    return torch.randint(low, 64, shape)


def tokens() -> dict:
    ids = _tokens()
    return dict(input_ids=ids, labels=ids)


def encoded() -> dict:
    return dict(input_ids=_tokens())


def pair() -> dict:
    return dict(input_ids=_tokens(), labels=_tokens())


def image() -> dict:
    return dict(pixel_values=torch.randn(2, 3, 16, 16, dtype=torch.float64))


def features() -> dict:
    return dict(input_features=torch.randn(2, 8, 32, dtype=torch.float64), decoder_input_ids=_tokens())


def waves() -> dict:
    return dict(input_values=torch.randn(2, 400, dtype=torch.float64))


def image_and_text() -> dict:
    return dict(input_ids=_tokens(), pixel_values=torch.randn(2, 3, 16, 16, dtype=torch.float64))


def patches_and_text() -> dict:
    """One image of four by four patches, which two by two make a token (Qwen-VL's form)."""
    ids = torch.cat([torch.tensor([[5, 60] + 4 * [61] + [62]]), _tokens(shape=(1, 5)) % 50 + 3], -1)
    return dict(
        input_ids=ids,
        labels=ids,
        pixel_values=torch.randn(16, 3 * 2 * 4 * 4, dtype=torch.float64),
        image_grid_thw=torch.tensor([[1, 4, 4]]),
        mm_token_type_ids=(ids == 61).long(),
    )


def image_tokens() -> dict:
    """Four image tokens in a text."""
    ids = torch.cat([torch.tensor([[5, 61, 61, 61, 61]]), _tokens(shape=(1, 5)) % 50 + 3], -1)
    return dict(input_ids=ids, labels=ids, pixel_values=torch.randn(1, 3, 16, 16, dtype=torch.float64))


def several_images() -> dict:
    return {**(given := image_tokens()), "pixel_values": given["pixel_values"].unsqueeze(1)}


LINEARS_OF_MAMBA = ["in_proj", "x_proj", "embeddings"]

FAMILIES = {
    # Decoders.
    "llama": Family("LlamaConfig", TEXT),
    "mistral": Family("MistralConfig", TEXT),
    "qwen2": Family("Qwen2Config", TEXT),
    "qwen3": Family("Qwen3Config", TEXT),
    "gemma": Family("GemmaConfig", TEXT),
    "gemma2": Family("Gemma2Config", TEXT),
    "gemma3_text": Family("Gemma3TextConfig", TEXT),
    "phi": Family("PhiConfig", TEXT),
    "phi3": Family("Phi3Config", TEXT),
    "falcon": Family("FalconConfig", FALCON),
    "falcon (biases)": Family("FalconConfig", dict(FALCON, bias=True, parallel_attn=False, multi_query=False)),
    "gpt2": Family("GPT2Config", GPT),
    "gpt_neox": Family("GPTNeoXConfig", TEXT),
    "gpt_neo": Family("GPTNeoConfig", dict(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64, intermediate_size=48, bos_token_id=1, eos_token_id=2,
    )),
    "gptj": Family("GPTJConfig", dict(GPT, rotary_dim=4)),
    "codegen": Family("CodeGenConfig", dict(GPT, rotary_dim=4)),
    "gpt_bigcode": Family("GPTBigCodeConfig", GPT),
    "opt": Family("OPTConfig", dict(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )),
    "bloom": Family("BloomConfig", dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)),
    "mpt": Family("MptConfig", dict(
        vocab_size=64, d_model=32, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=64,
    )),
    "starcoder2": Family("Starcoder2Config", TEXT),
    "olmo": Family("OlmoConfig", TEXT),
    "olmo2": Family("Olmo2Config", TEXT),
    "olmo3": Family("Olmo3Config", TEXT),
    "cohere": Family("CohereConfig", TEXT),
    "cohere2": Family("Cohere2Config", TEXT),
    "stablelm": Family("StableLmConfig", TEXT),
    "granite": Family("GraniteConfig", TEXT),
    "glm": Family("GlmConfig", TEXT),
    "glm4": Family("Glm4Config", TEXT),
    "exaone4": Family("Exaone4Config", TEXT),
    "smollm3": Family("SmolLM3Config", TEXT),
    "persimmon": Family("PersimmonConfig", TEXT),
    "nemotron": Family("NemotronConfig", TEXT),
    "helium": Family("HeliumConfig", TEXT),
    "arcee": Family("ArceeConfig", TEXT),
    "seed_oss": Family("SeedOssConfig", TEXT),
    "hunyuan_v1_dense": Family("HunYuanDenseV1Config", TEXT),
    "ernie4_5": Family("Ernie4_5Config", TEXT),
    "biogpt": Family("BioGptConfig", TEXT),
    "apertus": Family("ApertusConfig", TEXT),
    "granitemoeshared": Family("GraniteMoeSharedConfig", dict(EXPERTS, shared_intermediate_size=24)),
    "mixtral": Family("MixtralConfig", EXPERTS, dora=False),
    "qwen2_moe": Family("Qwen2MoeConfig", dict(EXPERTS, shared_expert_intermediate_size=24)),
    "deepseek_v3": Family("DeepseekV3Config", dict(
        EXPERTS, first_k_dense_replace=1, n_group=1, topk_group=1, n_shared_experts=1, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, num_key_value_heads=4, head_dim=4,
    ), dora=False),
    # Encoders.
    "bert": Family("BertConfig", TEXT, "AutoModelForMaskedLM", generates=False),
    "modernbert": Family(
        "ModernBertConfig", dict(TEXT, global_attn_every_n_layers=2), "AutoModelForMaskedLM", generates=False,
    ),
    "eurobert": Family("EuroBertConfig", TEXT, "AutoModelForMaskedLM", generates=False),
    "deberta_v2": Family("DebertaV2Config", TEXT, "AutoModelForMaskedLM", generates=False),
    "distilbert": Family("DistilBertConfig", dict(
        vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64, pad_token_id=0,
    ), "AutoModelForMaskedLM", generates=False),
    "roberta": Family("RobertaConfig", dict(TEXT, max_position_embeddings=72), "AutoModelForMaskedLM", generates=False),
    "electra": Family("ElectraConfig", dict(TEXT, embedding_size=16), "AutoModelForMaskedLM", generates=False),
    "albert": Family("AlbertConfig", dict(TEXT, embedding_size=16), "AutoModelForMaskedLM", generates=False),
    "esm": Family("EsmConfig", dict(TEXT, mask_token_id=3), "AutoModelForMaskedLM", generates=False),
    # Encoders with decoders.
    "t5": Family("T5Config", T5, "AutoModelForSeq2SeqLM", pair),
    "t5 (gated)": Family("T5Config", dict(T5, feed_forward_proj="gated-gelu"), "AutoModelForSeq2SeqLM", pair),
    "umt5": Family("UMT5Config", dict(T5, dropout_rate=0.0), "AutoModelForSeq2SeqLM", pair),
    "bart": Family("BartConfig", PAIR, "AutoModelForSeq2SeqLM", pair),
    "marian": Family("MarianConfig", PAIR, "AutoModelForSeq2SeqLM", pair),
    "m2m_100": Family("M2M100Config", PAIR, "AutoModelForSeq2SeqLM", pair),
    "mbart": Family("MBartConfig", PAIR, "AutoModelForSeq2SeqLM", pair),
    "pegasus": Family("PegasusConfig", PAIR, "AutoModelForSeq2SeqLM", pair),
    # Vision.
    "vit": Family("ViTConfig", VISION, "AutoModel", image, generates=False),
    "dinov2 (SwiGLU)": Family(
        "Dinov2Config", dict(VISION, use_swiglu_ffn=True, mlp_ratio=2), "AutoModel", image, False,
    ),
    "dinov3_vit": Family("DINOv3ViTConfig", dict(VISION, use_gated_mlp=True), "AutoModel", image, False),
    "siglip": Family("SiglipVisionConfig", VISION, "SiglipVisionModel", image, False),
    "clip": Family("CLIPVisionConfig", VISION, "CLIPVisionModel", image, False),
    "swin": Family("SwinConfig", dict(
        embed_dim=16, depths=[1, 1], num_heads=[2, 4], image_size=16, patch_size=2, window_size=4,
    ), "AutoModel", image, False),
    "deit": Family("DeiTConfig", VISION, "AutoModel", image, False),
    "beit": Family("BeitConfig", VISION, "AutoModel", image, False),
    # Audio.
    "whisper": Family("WhisperConfig", dict(PAIR, num_mel_bins=8, max_source_positions=16, max_target_positions=64),
                      "AutoModelForSpeechSeq2Seq", features),
    "wav2vec2": Family("Wav2Vec2Config", dict(
        VISION, conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, apply_spec_augment=False, layerdrop=0.0,
    ), "AutoModel", waves, False),
    "hubert": Family("HubertConfig", dict(
        VISION, conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, apply_spec_augment=False, layerdrop=0.0,
    ), "AutoModel", waves, False),
    # Several media.
    "llava": Family("LlavaConfig", dict(image_token_index=61), "AutoModelForImageTextToText",
                    image_tokens, parts=lambda: dict(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**VISION),
    )),
    "qwen2_5_vl": Family("Qwen2_5_VLConfig", dict(
        image_token_id=61, video_token_id=63, vision_start_token_id=60, vision_end_token_id=62,
    ), "AutoModelForImageTextToText", patches_and_text, parts=lambda: dict(
        text_config=dict(TEXT, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])),
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=32, patch_size=4,
            window_size=16, fullatt_block_indexes=[1], spatial_merge_size=2, temporal_patch_size=2,
        ),
    )),
    "paligemma": Family("PaliGemmaConfig", dict(image_token_index=61, projection_dim=32), "AutoModelForImageTextToText",
                        image_tokens, parts=lambda: dict(
        text_config=dict(TEXT, model_type="gemma"), vision_config=dict(VISION, model_type="siglip_vision_model"),
    )),
    "qwen2_vl": Family("Qwen2VLConfig", dict(
        image_token_id=61, video_token_id=63, vision_start_token_id=60, vision_end_token_id=62,
    ), "AutoModelForImageTextToText", patches_and_text, parts=lambda: dict(
        text_config=dict(TEXT, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])),
        vision_config=dict(
            depth=2, embed_dim=32, hidden_size=32, mlp_ratio=2, num_heads=4, patch_size=4, spatial_merge_size=2,
            temporal_patch_size=2,
        ),
    )),
    "glm4v": Family("Glm4vConfig", dict(
        image_token_id=61, video_token_id=63, image_start_token_id=60, image_end_token_id=62,
    ), "AutoModelForImageTextToText", patches_and_text, parts=lambda: dict(
        text_config=dict(TEXT, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])),
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=32, patch_size=4, image_size=16,
            spatial_merge_size=2, temporal_patch_size=2,
        ),
    )),
    "gemma3": Family("Gemma3Config", dict(
        image_token_index=61, boi_token_index=60, eoi_token_index=62, mm_tokens_per_image=4,
    ), "AutoModelForImageTextToText", image_tokens, parts=lambda: dict(
        text_config=dict(TEXT), vision_config=dict(VISION),
    )),
    "idefics3": Family("Idefics3Config", dict(image_token_id=61, scale_factor=1), "AutoModelForImageTextToText",
                       several_images, parts=lambda: dict(
        text_config=dict(TEXT, model_type="llama"), vision_config=dict(VISION),
    )),
    # State spaces.
    "mamba": Family("MambaConfig", STATE_SPACE, targets=LINEARS_OF_MAMBA),
    "mamba2": Family("Mamba2Config", dict(STATE_SPACE, num_heads=8, head_dim=8, n_groups=2, chunk_size=4),
                     targets=LINEARS_OF_MAMBA),
    "falcon_mamba": Family("FalconMambaConfig", STATE_SPACE, targets=LINEARS_OF_MAMBA),
    "jamba": Family("JambaConfig", dict(
        TEXT, num_experts=2, expert_layer_period=4, expert_layer_offset=3, attn_layer_period=2, attn_layer_offset=1,
        use_mamba_kernels=False, mamba_d_state=4,
    )),
    "recurrent_gemma": Family("RecurrentGemmaConfig", dict(TEXT, num_hidden_layers=3, lru_width=32)),
    "bamba": Family("BambaConfig", dict(
        TEXT, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=2,
        mamba_chunk_size=4,
    ), targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj"]),
    "falcon_h1": Family("FalconH1Config", dict(
        TEXT, mamba_n_heads=8, mamba_d_head=8, mamba_d_ssm=64, mamba_d_state=4, mamba_n_groups=2, mamba_chunk_size=4,
    ), targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj"]),
    "lfm2": Family("Lfm2Config", dict(TEXT, layer_types=["conv", "full_attention"], block_ff_dim=48,
                                      block_auto_adjust_ff_dim=False)),
}  # fmt: skip
