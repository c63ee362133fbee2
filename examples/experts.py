#!/usr/bin/env python3
"""LoRA on the experts of a mixture-of-experts model (Qwen3-MoE), by PEFT's `target_parameters`:

    python examples/experts.py

Prints the losses, what ran, and what `explain` says. Exits with 1 if not every call was fused.
"""

from __future__ import annotations

import argparse
import sys

import torch
from peft import LoraConfig, get_peft_model
from shared import BYTES, batches, load_kernel
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


def small_mixture() -> Qwen3MoeForCausalLM:
    """Two layers of four experts, of which each token takes two."""
    sizes = dict(vocab_size=BYTES, hidden_size=64, moe_intermediate_size=48, num_hidden_layers=2, head_dim=16)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2, use_cache=False)
    return Qwen3MoeForCausalLM(config)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    lora_fused = load_kernel()
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = lora_fused.apply(get_peft_model(small_mixture(), lora).to(device))

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with lora_fused.record() as calls:
        for step, ids in enumerate(batches(args.steps)):
            ids = ids.to(device)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    print(calls)
    print(lora_fused.explain(model))
    return 0 if calls.fused and set(calls.total) == {"fused"} else 1


if __name__ == "__main__":
    sys.exit(main())
