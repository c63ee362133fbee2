#!/usr/bin/env python3
"""LoRA on a diffusion transformer of diffusers (Stable Diffusion 3's blocks), trained by flow matching:

    python examples/dit.py

Latents and prompts are made of the language reference: a row of text is the prompt, and its bytes, embedded, are the
picture. Prints the losses and what ran. Exits with 1 if not every call was fused.
"""

from __future__ import annotations

import argparse
import sys

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from shared import BYTES, batches, load_kernel

SIZE, CHANNELS, WIDTH = 8, 4, 32  # of the latents, and of the text's embeddings
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
FEED_FORWARD = ["net.0.proj", "net.2"]


def small_transformer() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=SIZE, patch_size=1, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=2,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=WIDTH, caption_projection_dim=64,
        pooled_projection_dim=WIDTH, pos_embed_max_size=SIZE,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lora_fused = load_kernel()
    model = small_transformer().requires_grad_(False)
    model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION + FEED_FORWARD))  # PEFT's, by diffusers
    lora_fused.apply(model.to(device).train())

    table = torch.randn(BYTES, WIDTH)
    picture = torch.randn(BYTES, CHANNELS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    with lora_fused.record() as calls:
        for step, ids in enumerate(batches(args.steps)):
            prompt = table[ids].to(device)
            latents = picture[ids].mT.reshape(-1, CHANNELS, SIZE, SIZE).to(device)
            noise, t = torch.randn_like(latents), torch.rand(len(ids), device=device)
            blend = t.view(-1, 1, 1, 1)
            found = model(
                hidden_states=(1 - blend) * latents + blend * noise, encoder_hidden_states=prompt,
                pooled_projections=prompt.mean(1), timestep=1000 * t,
            ).sample  # fmt: skip
            loss = (found - (noise - latents)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    print(calls)
    return 0 if calls.fused and not calls.own else 1


if __name__ == "__main__":
    sys.exit(main())
