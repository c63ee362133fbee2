#!/usr/bin/env python3
"""Reinforcement learning as it runs beside an inference engine. At each step the adapter is merged, the weights are
sent, the adapter is unmerged, and what the engine has sampled is learnt from:

    python examples/merging.py

The engine is a plain model that knows nothing of LoRA. The reward is the share of lower-case letters in what it samples
after a line of real text (REINFORCE with the mean as baseline). Exits with 1 if a call of the policy was not fused, the
weights' names changed, the base drifted, or the engine did not compute what the policy does.
"""

from __future__ import annotations

import argparse
import sys

import torch
from peft import LoraConfig, get_peft_model
from shared import batches, load_kernel, small_model

PROMPT, SAMPLED = 48, 8  # tokens
DRIFT = 1e-5  # of a base weight, after all cycles: merging adds the delta, unmerging takes it away


def merged_weights(model) -> dict[str, torch.Tensor]:
    """The policy as a plain model, under the base model's own names."""
    model.merge_adapter()
    weights = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }
    model.unmerge_adapter()
    return weights


def learn(model, optimizer, ids: torch.Tensor, rewards: torch.Tensor) -> None:
    """One step along the gradient of the sampled tokens' log-probabilities, weighted with the advantage."""
    logits = model(input_ids=ids[:, :-1]).logits[:, -SAMPLED:]
    chosen = logits.log_softmax(-1).gather(-1, ids[:, -SAMPLED:, None]).squeeze(-1)
    loss = -((rewards - rewards.mean())[:, None] * chosen).sum(-1).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=100)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lora_fused = load_kernel()
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = lora_fused.apply(get_peft_model(small_model(), lora).to(device))
    engine = small_model().to(device).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}

    options = dict(do_sample=True, min_new_tokens=SAMPLED, max_new_tokens=SAMPLED)
    names, history = list(merged_weights(model)), []
    with lora_fused.record() as calls:
        for prompts in batches(args.cycles):
            weights = merged_weights(model)
            assert list(weights) == names, "the weights' names have changed"
            engine.load_state_dict(weights)
            prompts = prompts[:, :PROMPT].to(device)
            ids = engine.generate(prompts, use_cache=True, **options)
            sampled = ids[:, -SAMPLED:]
            rewards = ((sampled >= ord("a")) & (sampled <= ord("z"))).float().mean(-1)
            learn(model, optimizer, ids, rewards)
            history.append(rewards.mean().item())
    after = model.state_dict()
    drift = max((after[name] - tensor).abs().max().item() for name, tensor in before.items())
    engine.load_state_dict(merged_weights(model))
    with torch.no_grad():
        apart = (engine(input_ids=ids).logits - model(input_ids=ids).logits).abs().max().item()
    print(f"reward {history[0]:.2f} at first, {sum(history[-10:]) / len(history[-10:]):.2f} in the last steps")
    print(f"drift of the base {drift:.1e}, engine and policy apart by {apart:.1e}")
    print(calls)
    return 0 if calls.fused and not calls.own and drift <= DRIFT and apart <= 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
