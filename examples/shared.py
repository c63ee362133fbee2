"""What the examples share: the kernel, and what they train without a download, a Llama of a few layers with random
weights on real text as its bytes."""

from __future__ import annotations

import os
from pathlib import Path

import torch

BYTES = 256


def load_kernel():
    """The one in LOCAL_KERNELS or of the Hub, or this checkout's."""
    from kernels import get_kernel, get_local_kernel

    if "LOCAL_KERNELS" in os.environ or "KERNEL" in os.environ:
        return get_kernel(os.environ.get("KERNEL", "org/lora-fused"), version=1)
    return get_local_kernel(Path(__file__).resolve().parent.parent / "build")


def small_model():
    """The same weights each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=BYTES, hidden_size=64, intermediate_size=192, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=None, use_cache=False))


def small_tokenizer():
    """One token a byte, for trainers that tokenize."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=alphabet[-1], eos_token=alphabet[-2])


def small_text() -> str:
    """The language reference that every Python ships."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def small_data(rows: int = 64, tokens: int = 64) -> list[dict[str, torch.Tensor]]:
    """Rows of that text."""
    ids = torch.tensor(list(small_text().encode()[: rows * tokens])).view(rows, tokens)
    return [dict(input_ids=row, labels=row) for row in ids]


def batches(steps: int, rows: int = 12, rank: int = 0, world: int = 1) -> list[torch.Tensor]:
    """Token ids [rows, 64] of each step; each of `world` processes has its own."""
    data = [row["input_ids"] for row in small_data()]
    return [
        torch.stack([data[(rows * (world * step + rank) + i) % len(data)] for i in range(rows)])
        for step in range(steps)
    ]
