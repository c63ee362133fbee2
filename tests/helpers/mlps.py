"""Gated MLPs of nobody's library and of transformers' models, adapted, and what a pass through one gives."""

import warnings

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers.cases import randomise_adapters

# Of a causal language model.
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
)
CONFIGS = {
    "Llama": transformers.LlamaConfig(**SIZES),
    "Mistral": transformers.MistralConfig(**SIZES),
    "Qwen2": transformers.Qwen2Config(**SIZES),
    "Qwen3": transformers.Qwen3Config(**SIZES),
    "Gemma": transformers.GemmaConfig(**SIZES),
    "Gemma2": transformers.Gemma2Config(**SIZES),
    "Gemma3": transformers.Gemma3TextConfig(**SIZES),
    "Phi3": transformers.Phi3Config(**SIZES),
    "Olmo2": transformers.Olmo2Config(**SIZES),
    "Llama, exact GELU": transformers.LlamaConfig(**SIZES, hidden_act="gelu"),
    "Llama, ReLU": transformers.LlamaConfig(**SIZES, hidden_act="relu"),
    "Llama, ReLU squared": transformers.LlamaConfig(**SIZES, hidden_act="relu2"),
    "Llama, bias": transformers.LlamaConfig(**SIZES, mlp_bias=True),
}
MLP_TARGETS = r".*\.mlp\..*proj"


class GLU(nn.Module):
    """A gated MLP of nobody's library, with names of its own."""

    def __init__(self, k=32, i=48, n=24, bias=True):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(k, i, bias), nn.Linear(i, n, bias), nn.Linear(k, i, bias)

    def forward(self, hidden_states):
        return self.w2(self.w3(hidden_states) * nn.functional.silu(self.w1(hidden_states)))


def glu(dtype=torch.float64, targets=("w1", "w2", "w3"), **config):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("mlp", GLU())
    options = dict(r=4, lora_alpha=6, target_modules=list(targets))
    model = get_peft_model(model.to(dtype), LoraConfig(**{**options, **config}), autocast_adapter_dtype=False)
    randomise_adapters(model, dtype)
    return model.train()


def mlp_of(model):
    return model.base_model.model.mlp


def rows_by_projection(lora_fused, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {row.module.rpartition(".")[2]: row for row in lora_fused.explain(model)}


def is_one_function(y):
    return y.grad_fn.name() in ("GatedMLPFunctionBackward", "NativeGatedFunctionBackward")


def step(model, x, **scope):
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, **scope) if scope else torch.enable_grad():
        y = model(x)
    y.float().square().sum().backward()
    return {"y": y, "x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if theirs[name] is None:
            assert value is None, name
        else:
            torch.testing.assert_close(value, theirs[name], rtol=1e-10, atol=1e-10, msg=lambda m: f"{name}: {m}")


class LigerSwiGLUMLP(nn.Module):
    """A gated MLP by one of Liger's functions, which hides what it computes."""

    def __init__(self, own):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = own.gate_proj, own.up_proj, own.down_proj

    def forward(self, x):
        return self.down_proj(SiluMul.apply(self.gate_proj(x), self.up_proj(x)))


class SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, dh):
        with torch.enable_grad():
            gate, up = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
            return torch.autograd.grad(nn.functional.silu(gate) * up, (gate, up), dh)


# Those that a gated MLP may have, as torch has them.
ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda g: nn.functional.gelu(g, approximate="tanh"),
    "relu": nn.functional.relu,
    "relu2": lambda g: nn.functional.relu(g).square(),
}
