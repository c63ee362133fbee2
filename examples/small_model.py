"""A Llama of a few layers with random weights, and real text as its bytes: what the examples train without a
download."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def small_model() -> LlamaForCausalLM:
    """The same weights each time."""
    sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=None, use_cache=False))


def small_data(rows: int = 64, tokens: int = 64) -> list[dict[str, torch.Tensor]]:
    """Rows of the language reference that every Python ships."""
    from pydoc_data import topics

    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    ids = torch.tensor(list(text[: rows * tokens])).view(rows, tokens)
    return [dict(input_ids=row, labels=row) for row in ids]
