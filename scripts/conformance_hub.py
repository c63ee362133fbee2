"""Stands in for the Hub in PEFT's own tests: a cache folder of tiny random models, built from configs.

    python scripts/conformance_hub.py FOLDER      fill FOLDER, laid out as huggingface_hub's cache is

Nothing is downloaded. Each repository that the tests name and that MODELS, ADAPTERS or PIPELINES
lists gets a config, random weights and a byte-level tokenizer; a repository that cannot be built
with the installed versions is left out with its reason. A test whose repository is not here still
needs the Hub. `datasets.load_dataset` is replaced where a test trains on quotes (`load_dataset`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import sys

COMMIT = "0" * 40
REPORT = "built.json"
VOCABULARY = 512
SPECIAL = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>")
SPECIAL |= dict(cls_token="<cls>", sep_token="<sep>")

# Names of a size differ between families; each takes those it knows.
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT2 = dict(n_embd=32, n_head=4, n_layer=2, n_positions=256, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
OPT = dict(SIZES, hidden_size=16, ffn_dim=48, word_embed_proj_dim=16)
OPT_125M = dict(SIZES, num_hidden_layers=12, ffn_dim=48, word_embed_proj_dim=32)
T5 = dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
T5 |= dict(pad_token_id=0, eos_token_id=2)
BART = dict(
    vocab_size=VOCABULARY,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
    forced_eos_token_id=2,
)
MOE = dict(SIZES, num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, head_dim=8)
CLIP_TEXT = dict(SIZES, projection_dim=32)
BLOOM = dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=5, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = dict(SIZES, num_key_value_heads=4)
GEMMA3 = dict(SIZES, head_dim=8)
MAMBA = dict(vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=2, pad_token_id=0)

# repository: (model type of AutoConfig, class, sizes)
MODELS = {
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("llama", "LlamaForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("llama", "LlamaForCausalLM", LLAMA),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("llama", "LlamaForCausalLM", LLAMA),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("llama", "LlamaForSequenceClassification", LLAMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("mistral", "MistralForCausalLM", LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("qwen2", "Qwen2ForCausalLM", LLAMA),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": ("qwen2", "Qwen2ForCausalLM", LLAMA),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("qwen3", "Qwen3ForCausalLM", dict(LLAMA, head_dim=8)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("gemma3_text", "Gemma3ForCausalLM", GEMMA3),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("opt", "OPTForCausalLM", OPT),
    "peft-internal-testing/opt-125m": ("opt", "OPTForCausalLM", OPT_125M),
    "facebook/opt-125m": ("opt", "OPTForCausalLM", OPT_125M),
    "facebook/opt-350m": ("opt", "OPTForCausalLM", OPT_125M),
    "peft-internal-testing/tiny-random-gpt2": ("gpt2", "GPT2LMHeadModel", GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("gpt2", "GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("gpt2", "GPT2LMHeadModel", GPT2),
    "openai-community/gpt2": ("gpt2", "GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("gptj", "GPTJForCausalLM", dict(GPT2, rotary_dim=4)),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("gpt_neox", "GPTNeoXForCausalLM", SIZES),
    "peft-internal-testing/tiny-random-BloomForCausalLM": ("bloom", "BloomForCausalLM", BLOOM),
    "bigscience/bloomz-560m": ("bloom", "BloomForCausalLM", BLOOM),
    "peft-internal-testing/tiny-random-BertModel": ("bert", "BertModel", SIZES),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("bert", "BertForSequenceClassification", SIZES),
    "peft-internal-testing/tiny-random-RobertaModel": ("roberta", "RobertaModel", SIZES),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "roberta",
        "RobertaForSequenceClassification",
        SIZES,
    ),
    "peft-internal-testing/tiny-random-DebertaModel": ("deberta", "DebertaModel", SIZES),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("deberta-v2", "DebertaV2Model", SIZES),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("bart", "BartForConditionalGeneration", BART),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("t5", "T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("t5", "T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-t5": ("t5", "T5ForConditionalGeneration", T5),
    "google/flan-t5-small": ("t5", "T5ForConditionalGeneration", dict(T5, feed_forward_proj="gated-gelu")),
    "google/flan-t5-base": ("t5", "T5ForConditionalGeneration", dict(T5, feed_forward_proj="gated-gelu")),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "llama4_text",
        "Llama4ForCausalLM",
        dict(MOE, intermediate_size_mlp=48, attention_chunk_size=64),
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("gpt_oss", "GptOssForCausalLM", MOE),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": ("qwen3_moe", "Qwen3MoeForCausalLM", MOE),
    "hf-internal-testing/Mixtral-tiny": ("mixtral", "MixtralForCausalLM", MOE),
    "tiiuae/falcon-mamba-tiny-dev": ("falcon_mamba", "FalconMambaForCausalLM", MAMBA),
    "peft-internal-testing/tiny-clip-text-2": ("clip_text_model", "CLIPTextModelWithProjection", CLIP_TEXT),
}

# repository of a LoRA adapter: (repository of its model, options of LoraConfig)
ADAPTERS = {
    "peft-internal-testing/tiny-OPTForCausalLM-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        dict(task_type="CAUSAL_LM"),
    ),
    "peft-internal-testing/opt-125m-dummy-lora": ("peft-internal-testing/opt-125m", dict(task_type="CAUSAL_LM")),
    "peft-internal-testing/gpt2-lora-random": ("peft-internal-testing/tiny-random-gpt2", dict(task_type="CAUSAL_LM")),
}

PIPELINES = ("hf-internal-testing/tiny-sd-pipe",)


def folder_of(root: pathlib.Path, repository: str) -> pathlib.Path:
    """The snapshot of a repository, and the reference by which `main` is found."""
    base = root / f"models--{repository.replace('/', '--')}"
    (base / "refs").mkdir(parents=True, exist_ok=True)
    (base / "refs" / "main").write_text(COMMIT)
    return base / "snapshots" / COMMIT


def tokenizer(model_max_length: int = 256):
    """Bytes as tokens, special tokens first, so that every text and every model can use it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=model_max_length, **SPECIAL)


def build_model(folder: pathlib.Path, model_type: str, class_name: str, sizes: dict) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    known = transformers.AutoConfig.for_model(model_type)
    used = {name: value for name, value in sizes.items() if name not in SIZES or hasattr(known, name)}
    config = transformers.AutoConfig.for_model(model_type, **used)
    model = getattr(transformers, class_name)(config)
    model.save_pretrained(folder)
    if hasattr(config, "vocab_size"):
        tokenizer().save_pretrained(folder)


def build_adapter(folder: pathlib.Path, root: pathlib.Path, repository: str, options: dict) -> None:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder_of(root, repository))
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, **options))
    model.peft_config["default"].base_model_name_or_path = repository
    model.save_pretrained(folder)


def build_pipeline(folder: pathlib.Path) -> None:
    """A Stable Diffusion pipeline of a few blocks."""
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    blocks = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_TEXT))
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(clip_files(folder)),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def clip_files(folder: pathlib.Path) -> pathlib.Path:
    """Vocabulary of CLIP's tokenizer, letters with and without the mark of a word's end."""
    from tokenizers import pre_tokenizers

    files = folder / "clip"
    files.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters[:250], *(f"{letter}</w>" for letter in letters[:250])]
    (files / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    (files / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    return files


def fill(root: pathlib.Path) -> dict[str, str]:
    """{repository that could not be built: why}; what is there from the same file is kept."""
    digest = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()
    report = root / REPORT
    if report.is_file():
        known = json.loads(report.read_text())
        if known["source"] == digest:
            return known["left out"]
    work = {name: lambda f, given=given: build_model(f, *given) for name, given in MODELS.items()}
    work |= {name: lambda f, given=given: build_adapter(f, root, *given) for name, given in ADAPTERS.items()}
    work |= dict.fromkeys(PIPELINES, build_pipeline)
    left_out = {}
    for repository, build in work.items():
        try:
            build(folder_of(root, repository))
        except Exception as error:
            left_out[repository] = f"{type(error).__name__}: {error}"
    report.write_text(json.dumps({"source": digest, "left out": left_out}, indent=1))
    return left_out


def load_dataset(name: str, *args, **kwargs):
    """In place of `datasets.load_dataset`: quotes made up here; anything else needs the Hub."""
    import datasets

    if not name.endswith(("english_quotes", "english_quotes_copy")):
        raise ConnectionError(f"no network here: dataset {name}")
    quotes = [f"A quote with the number {i}, and {i * i} words that say so." for i in range(200)]
    data = datasets.Dataset.from_dict({"quote": quotes, "author": ["nobody"] * 200, "tags": [["number"]] * 200})
    split = kwargs.get("split")
    if split is None:
        return datasets.DatasetDict({"train": data})
    stop = split.partition("[:")[2].rstrip("]%")
    return data.select(range(min(int(stop), 200))) if stop.isdigit() else data


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    failures = fill(parser.parse_args().folder)
    for each, reason in failures.items():
        print(f"left out {each}: {reason}")
    sys.exit(0)
