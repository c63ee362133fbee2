"""Passes through small Llamas: their input, their loss and gradients."""

import torch
from peft import LoraConfig, get_peft_model

from helpers.cases import DEVICE, randomise_adapters, tiny_llama


def tokens():
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(3), device="cpu").to(DEVICE)


def passed(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def evaluated(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def same_bits(ours, theirs):
    """Whether loss and gradients are equal to the last bit, as where both run PEFT's operations alone."""
    found, expected = passed(ours, tokens()), passed(theirs, tokens())
    return len(found) == len(expected) > 1 and all(map(torch.equal, found, expected))


def gradients(model, y, *leaves):
    """Of a sum that weighs every output differently."""
    model.zero_grad()
    weights = torch.linspace(0.5, 2.0, y.numel(), dtype=torch.float64).view(y.shape)
    (y.double() * weights).sum().backward()
    return [*(leaf.grad for leaf in leaves), *(p.grad for p in model.parameters() if p.requires_grad)]


def keep_names(monkeypatch):
    """Names of transformers' module of Llama are what they are now after a test that lets Liger replace them."""
    from transformers.models.llama import modeling_llama

    for name, value in list(vars(modeling_llama).items()):
        if not name.startswith("__"):
            monkeypatch.setattr(modeling_llama, name, value)


def tied_llama(**config):
    """A head that is tied to the embedding, of which some tokens are trained: LoRA's base is the tokens' wrapper."""
    options = dict(r=4, lora_alpha=8, target_modules=["lm_head", "q_proj", "k_proj"], trainable_token_indices=[1, 2, 7])
    model = tiny_llama(torch.float64, tie_word_embeddings=True)
    model = get_peft_model(model, LoraConfig(**{**options, "task_type": "CAUSAL_LM", **config}))
    randomise_adapters(model, torch.float64)
    for name, parameter in model.named_parameters():
        if "trainable_tokens" in name:
            parameter.data += torch.randn_like(parameter)
    return model.train()


def losses_of(model, steps):
    """float64 [steps], of a model for causal language that learns the same tokens at each step, on its own device."""
    device = next(model.parameters()).device
    ids = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(2), device="cpu").to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.double().item())
    return torch.tensor(losses, dtype=torch.float64, device="cpu")
