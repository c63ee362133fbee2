"""Model families in their smallest sizes: what the README's table of families is made of, and what it is held against."""

from __future__ import annotations

import contextlib
import copy
import json
import pathlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import torch
import transformers
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers.cases import randomise_adapters

TABLE = pathlib.Path(__file__).resolve().parent / "families.json"
TOLERANCE = 1e-10  # of the largest element

# One vocabulary of sizes; a configuration takes of it what it knows.
TEXT = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
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
    """config: the configuration's class in transformers. model: the class that builds from it. inputs: of one call, with
    labels where the model gives a loss. targets: of LoRA. parts: configurations inside the configuration. dora: whether
    PEFT has DoRA for all of the targets."""

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
    "mpt": Family("MptConfig", dict(vocab_size=64, d_model=32, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=64)),
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
    "modernbert": Family("ModernBertConfig", dict(TEXT, global_attn_every_n_layers=2), "AutoModelForMaskedLM", generates=False),
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
    "dinov2 (SwiGLU)": Family("Dinov2Config", dict(VISION, use_swiglu_ffn=True, mlp_ratio=2), "AutoModel", image, False),
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
    "llava": Family("LlavaConfig", dict(image_token_index=61), "AutoModelForImageTextToText", image_tokens, parts=lambda: dict(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**VISION),
    )),
    "qwen2_5_vl": Family("Qwen2_5_VLConfig", dict(
        image_token_id=61, video_token_id=63, vision_start_token_id=60, vision_end_token_id=62,
    ), "AutoModelForImageTextToText", patches_and_text, parts=lambda: dict(
        text_config=dict(TEXT, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])),
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=32, patch_size=4, window_size=16,
            fullatt_block_indexes=[1], spatial_merge_size=2, temporal_patch_size=2,
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
        TEXT, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=2, mamba_chunk_size=4,
    ), targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj"]),
    "falcon_h1": Family("FalconH1Config", dict(
        TEXT, mamba_n_heads=8, mamba_d_head=8, mamba_d_ssm=64, mamba_d_state=4, mamba_n_groups=2, mamba_chunk_size=4,
    ), targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj"]),
    "lfm2": Family("Lfm2Config", dict(TEXT, layer_types=["conv", "full_attention"], block_ff_dim=48,
                                      block_auto_adjust_ff_dim=False)),
}  # fmt: skip


def build(family: Family) -> nn.Module:
    """A model of random weights in float64."""
    torch.manual_seed(0)
    parts = family.parts() if family.parts else {}
    config = getattr(transformers, family.config)(**family.sizes, **parts)
    config._experts_implementation = "eager"  # torch's grouped product knows no float64
    model = getattr(transformers, family.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model.from_config(config) if hasattr(model, "from_config") else model(config)
    return made.double()


def adapted(family: Family, **config) -> nn.Module:
    """PEFT's model, B drawn at random and magnitudes away from the norm, in training mode."""
    options = LoraConfig(r=3, lora_alpha=5, target_modules=family.targets, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(build(family), options, autocast_adapter_dtype=False)
    randomise_adapters(model, torch.float64)
    return model.train()


def loss_of(output) -> torch.Tensor:
    """The model's loss, or a sum in which every element of its first result has a weight of its own."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    first = output[0].double()
    return (first * torch.linspace(0.5, 1.5, first.numel(), dtype=first.dtype).view(first.shape)).mean()


@contextlib.contextmanager
def counted(lora_fused):
    """What the layers compute meanwhile: "projections", embeddings among them, and "gated" MLPs."""
    counts = dict(projections=0, gated=0)

    def counting(own, weigh):
        def call(*args, **kwargs):
            for kind, number in weigh(*args).items():
                counts[kind] += number
            return own(*args, **kwargs)

        return call

    layers, one = lora_fused.layers, lambda *_: dict(projections=1)
    calls = (
        (layers.functional, "compute_group", lambda x, projections: dict(projections=len(projections))),
        (layers.functional, "compute_gated", lambda x, inputs, *_: dict(projections=len(inputs) + 1, gated=1)),
        (layers.functional_delta, "add_delta", one),
        (layers.functional_embedding, "compute_embedding", one),
    )
    with contextlib.ExitStack() as stack:
        for module, name, weigh in calls:
            stack.enter_context(mock.patch.object(module, name, counting(getattr(module, name), weigh)))
        yield counts


def compare(results, what: str) -> None:
    """Losses and gradients of the kernelized model and of PEFT's; a parameter without a gradient has none in both."""
    for name, theirs in results[1].items():
        ours = results[0][name]
        assert (ours is None) == (theirs is None), f"{what}: {name} has {'no ' if ours is None else 'a '}gradient"
        if theirs is not None:
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, f"{what}: {name}"
            error = (ours - theirs).abs().max().item()
            assert error <= TOLERANCE * theirs.abs().max().item() + 1e-18, f"{what}: {name} is {error} off"


def explained(lora_fused, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lora_fused.explain(model)


def measure(lora_fused, family: Family, **config) -> dict:
    """The family's row of the table, after everything was held against PEFT: three passes of training, so that groups
    have formed, one of evaluation, generation."""
    theirs = adapted(family, **config)
    with lora_fused.use_peft_layers():
        ours = kernelize(copy.deepcopy(theirs), mode=Mode.TRAINING, device="cpu")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    inputs = family.inputs()
    for step in range(3):
        results = []
        with counted(lora_fused) as counts:
            for model in (ours, theirs):
                model.zero_grad()
                torch.manual_seed(step)  # of the model's own dropouts
                loss = loss_of(model(**inputs))
                loss.backward()
                grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
                results.append({"the loss": loss.detach(), **grads})
        compare(results, f"pass {step}")
        assert any(grad is not None and grad.abs().max() > 0 for name, grad in results[1].items() if "lora_B" in name)
    rows = explained(lora_fused, ours)
    assert {row.last for row in rows if row.fused} <= {"fused", None}, str(rows)  # None: never called
    ours.eval(), theirs.eval()
    with counted(lora_fused) as evaluated, torch.no_grad():
        compare([{"the loss": loss_of(model(**inputs))} for model in (ours, theirs)], "evaluation")
    if family.generates:
        prompt = {name: value for name, value in inputs.items() if name != "labels" and not name.startswith("decoder_")}
        sequences = [model.generate(**prompt, max_new_tokens=3, do_sample=False) for model in (ours, theirs)]
        assert torch.equal(*sequences) and sequences[0].shape[1] > 1
    return dict(
        modules=len(rows),
        fused=sum(row.fused for row in rows),
        computed=counts["projections"],
        gated=counts["gated"],
        gated_in_evaluation=evaluated["gated"],
        groups=sorted({row.group for row in rows if row.fused and "+" in row.group}),
        reasons=sorted({row.reason for row in rows if row.reason}),
        mlps=sorted({row.mlp for row in rows if row.mlp}),
    )


def without_version(row: dict) -> dict:
    """What every version of transformers has in common: one may fuse projections in its model that another calls apart."""
    return dict(
        unfused=row["modules"] - row["fused"], **{key: row[key] for key in ("gated", "gated_in_evaluation", "reasons")}
    )


def read_table() -> tuple[str, dict]:
    """(the version of transformers that it was measured with, rows by family)."""
    table = json.loads(TABLE.read_text())
    return table["transformers"], table["families"]


def write_table(rows: dict) -> None:
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    version = json.dumps(transformers.__version__)
    TABLE.write_text(f'{{\n  "transformers": {version},\n  "families": {{\n{lines}\n  }}\n}}\n')


def readme_section(rows: dict) -> str:
    """The table as the README has it: families of which the same is to be said share a line."""
    lines = {}
    for name, row in rows.items():
        share = "all" if row["fused"] == row["modules"] else f"{row['fused']} of {row['modules']}"
        gated = str(row["gated"] or "-")
        if row["gated_in_evaluation"] != row["gated"]:
            gated = f"{row['gated_in_evaluation']} in evaluation alone"
        notes = [*row["reasons"], *(f"MLPs: {reason}" for reason in row["mlps"])]
        key = share, gated, "; ".join(row["groups"]) or "-", "; ".join(notes) or "-"
        lines.setdefault(key, []).append(name)
    head = ("Family", "LoRA modules fused", "Gated MLPs, one Function each", "Groups", "What is not, and why")
    body = [(", ".join(names), *key) for key, names in lines.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *body))
