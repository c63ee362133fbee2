"""Mixtures of experts in their smallest sizes: one block of a model, adapted by PEFT, and what it gives."""

from __future__ import annotations

import contextlib
import copy
import warnings

import torch
import transformers
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn

from .cases import DEVICE
from .families import EXPERTS

LATENT = dict(
    n_group=1, topk_group=1, first_k_dense_replace=0, n_shared_experts=1, q_lora_rank=8, kv_lora_rank=8,
    qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, num_key_value_heads=4, head_dim=4,
)  # fmt: skip
DENSE_FIRST = dict(first_k_dense_replace=0, n_group=1, topk_group=1, n_shared_experts=1)

# Configuration and sizes.
MODELS = {
    "afmoe": ("AfmoeConfig", dict(num_dense_layers=0, num_shared_experts=1)),
    "cohere2_moe": ("Cohere2MoeConfig", {}),
    "deepseek_v2": ("DeepseekV2Config", LATENT),
    "deepseek_v3": ("DeepseekV3Config", LATENT),
    "dots1": ("Dots1Config", DENSE_FIRST),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", dict(moe_num_experts=4, moe_k=2, moe_layer_start_index=0)),
    "exaone_moe": ("ExaoneMoeConfig", DENSE_FIRST),
    "flex_olmo": ("FlexOlmoConfig", {}),
    "glm4_moe": ("Glm4MoeConfig", DENSE_FIRST),
    "gpt_oss": ("GptOssConfig", dict(intermediate_size=16, max_position_embeddings=131072)),
    "granitemoe": ("GraniteMoeConfig", {}),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", dict(moe_topk=2)),
    "minimax_m2": ("MiniMaxM2Config", {}),
    "mixtral": ("MixtralConfig", {}),
    "nemotron_h": ("NemotronHConfig", dict(
        layers_block_type=["attention", "moe"], mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=4, n_groups=1,
        n_shared_experts=1, moe_shared_expert_intermediate_size=16, n_group=1, topk_group=1, moe_latent_size=None,
    )),
    "olmoe": ("OlmoeConfig", {}),
    "phimoe": ("PhimoeConfig", {}),
    "qwen2_moe": ("Qwen2MoeConfig", dict(shared_expert_intermediate_size=24)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(decoder_sparse_step=1, mlp_only_layers=[])),
    "llama4": ("Llama4TextConfig", dict(
        intermediate_size=24, intermediate_size_mlp=24, interleave_moe_layer_step=1, attention_chunk_size=64,
        num_experts_per_tok=1,
    )),
    "minimax_m3": ("MiniMaxM3VLTextConfig", {}),
}  # fmt: skip


def model_of(name: str, dtype: torch.dtype = torch.float64, implementation: str = "eager") -> nn.Module:
    """A whole model of random weights."""
    config_name, sizes = MODELS[name]
    config = getattr(transformers, config_name)(**{**EXPERTS, **sizes})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    model.set_experts_implementation(implementation)
    return model


def is_experts(module: nn.Module) -> bool:
    return hasattr(type(module), "_apply_gate")


class Block(nn.Module):
    """One mixture, from hidden states to hidden states."""

    def __init__(self, mixture: nn.Module):
        super().__init__()
        self.mixture = mixture

    def forward(self, x):
        y = self.mixture(x)
        return y[0] if isinstance(y, tuple) else y


def block_of(name: str, dtype: torch.dtype = torch.float64, implementation: str = "eager") -> Block:
    """The mixture of a model's last layer, with weights large enough for every term to show."""
    model = model_of(name, dtype, implementation)
    mixture = [m for m in model.modules() if any(map(is_experts, m.children()))][-1]
    for parameter in mixture.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Block(mixture)


def names_of(block: nn.Module) -> list[str]:
    """The weights of the products, first and second."""
    (experts,) = filter(is_experts, block.modules())
    return ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]


def adapt(block: Block, parameters: list[str] | None = None, adapter_dtype: torch.dtype | None = None, **options):
    """PEFT's model of a block whose experts' parameters are adapted, B random, the router trained."""
    targets = [f"experts.{name}" for name in (parameters or names_of(block))]
    config = LoraConfig(**{**dict(r=3, lora_alpha=5, target_modules=[], target_parameters=targets), **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(block, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
            if adapter_dtype is not None:
                parameter.data = parameter.data.to(adapter_dtype)
        elif "experts" not in name:
            parameter.requires_grad_(True)
    return model.train()


def kernelized(lora_fused, model: nn.Module, device: str = DEVICE) -> nn.Module:
    """A copy with our forwards."""
    with lora_fused.use_peft_layers():
        return kernelize(copy.deepcopy(model), mode=Mode.TRAINING, device=device)


def explain(lora_fused, model: nn.Module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lora_fused.explain(model)


def results(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """y, dx and the gradients of all trained parameters."""
    model.zero_grad()
    torch.manual_seed(0)  # of routers with noise
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **grads}


def error(seen: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, of the largest element."""
    assert seen.shape == expected.shape and seen.dtype == expected.dtype
    if not expected.numel():
        return 0.0
    return ((seen.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)).item()


@contextlib.contextmanager
def counted(lora_fused):
    """How often our forward computes meanwhile."""
    layers, calls = lora_fused.layers.functional_experts, []
    own = layers.compute_experts

    def count(*args):
        calls.append(args)
        return own(*args)

    layers.compute_experts = count
    try:
        yield calls
    finally:
        layers.compute_experts = own


def example(tokens=(2, 9), dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """x and dy."""
    return torch.randn(*tokens, 32, dtype=dtype), torch.randn(*tokens, 32, dtype=dtype)


def mixture_of(model):
    return model.base_model.model.mixture


def base_of(model):
    (base,) = filter(is_experts, model.modules())
    return base


def assert_fused(lora_fused, ours, theirs):
    x, dy = example()
    with counted(lora_fused) as calls:
        seen = results(ours, x, dy)
    assert len(calls) == 1
    expected = results(theirs, x, dy)
    assert all(error(seen[name], expected[name]) <= 1e-12 for name in expected)


def assert_peft_runs(lora_fused, ours, theirs, reason, rows=2):
    """The result, all gradients, and what is said before and after."""
    x, dy = example()
    before = explain(lora_fused, ours)
    with counted(lora_fused) as calls:
        seen = results(ours, x, dy)
    assert not calls
    expected = results(theirs, x, dy)
    assert seen.keys() == expected.keys() and len(seen) > 2
    assert all(torch.equal(seen[name], expected[name]) for name in expected)
    after = explain(lora_fused, ours)
    assert len(before) == len(after) == rows
    for row in (*before, *after):
        assert not row.fused and reason in row.reason, str(row)
    assert {row.last for row in after} == {after[0].reason}


def pair(lora_fused, name="qwen3_moe", **options):
    model = adapt(block_of(name, **options))
    return kernelized(lora_fused, model), model
