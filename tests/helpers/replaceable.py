"""Small adapted models whose forwards and functions tests replace, and their values beside PEFT's."""

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from helpers.cases import DEVICE, randomise_adapters


class Linear(nn.Module):
    layer = nn.Linear

    def __init__(self):
        super().__init__()
        self.proj = self.layer(16, 16)

    def forward(self, x):
        return self.proj(x)


class Transposed(Linear):
    layer = transformers.pytorch_utils.Conv1D


class EmbeddingOperands(nn.Module):
    def __init__(self, scaled=False):
        super().__init__()
        make = transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding if scaled else nn.Embedding
        self.table = make(16, 16, **(dict(padding_idx=0, embed_scale=4.0) if scaled else {}))

    def forward(self, x):
        return self.table((x.abs() * 5).long() % 16)


class MLP(nn.Module):
    """A gated MLP; nobody else's, so that its class can be replaced."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class FunctionalMLP(MLP):
    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def adapted(base, **options):
    torch.manual_seed(0)
    names = [name for name, module in base.named_modules() if not list(module.children()) and "act" not in name]
    config = LoraConfig(r=4, target_modules=names, init_lora_weights=True, **options)
    model = get_peft_model(base.double(), config, autocast_adapter_dtype=False)
    randomise_adapters(model, torch.float64)
    return model


def linear(**options):
    return adapted(Linear(), **options)


def values(model, evaluate):
    model.train(not evaluate)
    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator(DEVICE).manual_seed(2), requires_grad=True)
    model.zero_grad()
    torch.manual_seed(5)  # PEFT's masks
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_close(ours, theirs):
    assert len(ours) == len(theirs) > 2
    for mine, expected in zip(ours, theirs):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)
