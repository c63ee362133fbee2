"""A small Llama with three adapters that is trained for long, and what may come between its steps."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from helpers.cases import DEVICE, LINEARS, randomise_adapters, tiny_llama

SHAPE = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
)
ADAPTERS = {
    "default": dict(r=4, lora_alpha=8, lora_dropout=0.1),
    "dora": dict(r=3, lora_alpha=6, use_dora=True, lora_dropout=0.2),
    "plain": dict(r=5, use_rslora=True, rank_pattern={"k_proj": 2}, alpha_pattern={"down_proj": 3}),
    "plain dora": dict(r=2, lora_alpha=4, use_dora=True),
}
CHECKPOINTS = (None, dict(use_reentrant=False), dict(use_reentrant=True))
# Of a loss, and of what grows with the steps: PEFT's own runs part as fast, from one rounding on.
LOSS, STATE = 1e-9, 1e-6


def adapted_llama():
    """A Llama of two layers, all of it in float64, with four adapters on every linear."""
    torch.manual_seed(0)
    base = tiny_llama(torch.float64, **SHAPE)
    for name, norm in [*base.named_modules()]:
        if isinstance(norm, LlamaRMSNorm):  # it rounds to float32, which hides a difference until it is a large one
            base.set_submodule(name, nn.RMSNorm(SHAPE["hidden_size"], norm.variance_epsilon, dtype=torch.float64))
    configs = {
        name: LoraConfig(target_modules=LINEARS, task_type="CAUSAL_LM", **each) for name, each in ADAPTERS.items()
    }
    model = get_peft_model(base, configs.pop("default"), autocast_adapter_dtype=False)
    for name, config in configs.items():
        model.add_adapter(name, config)
    model = model.double()
    randomise_adapters(model, torch.float64)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.1)  # a large B makes training chaotic: 1e-15 becomes 1 within fifty steps
    model.enable_input_require_grads()
    return model.train()


def batch(step, rows=4, length=12):
    """One of sixteen."""
    generator = torch.Generator().manual_seed(step % 16)
    return torch.randint(1, SHAPE["vocab_size"], (rows, length), generator=generator, device="cpu").to(DEVICE)


def loss_of(model, step, **shape):
    """In float64, which transformers' own is not."""
    torch.manual_seed(step)  # of the masks
    tokens = batch(step, **shape)
    logits = model(input_ids=tokens).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(model, optimizer, step, **shape):
    loss = loss_of(model, step, **shape)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def optimizer_of(model):
    return torch.optim.AdamW([p for name, p in model.named_parameters() if "lora_" in name], lr=1e-3)


def checkpointing(model, options):
    if options is None:
        model.base_model.model.gradient_checkpointing_disable()
    else:
        model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


class Interrupted(Exception):
    """What goes wrong in a step."""


def interrupt(*_):
    raise Interrupted


def interrupt_backward(module, args, y):
    if y.requires_grad:  # not in a reentrant checkpoint's forward, but where that is computed again
        y.register_hook(interrupt)


def interrupt_recomputation(*_):
    if torch._C._current_graph_task_id() != -1:
        raise Interrupted


# A module, and the hook that is called after its forward.
INTERRUPTIONS = {
    "between siblings": ("model.layers.1.self_attn.k_proj", interrupt),
    "between gate and up": ("model.layers.0.mlp.gate_proj", interrupt),
    "after a layer": ("model.layers.0", interrupt),
    "in backward": ("model.layers.1.input_layernorm", interrupt_backward),
    "in a recomputation": ("model.layers.1.self_attn.v_proj", interrupt_recomputation),
}


def interrupted(model, step, where, **shape):
    """A step that does not come to its end."""
    name, hook = INTERRUPTIONS[where]
    handle = model.base_model.model.get_submodule(name).register_forward_hook(hook)
    with pytest.raises(Interrupted):
        loss_of(model, step, **shape).backward()
    handle.remove()
    model.zero_grad()
