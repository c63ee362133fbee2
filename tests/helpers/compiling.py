"""Models by torch.compile, and what is in their graphs."""

from __future__ import annotations

import contextlib
import os
from collections import Counter

import torch
from functorch.compile import make_boxed_func
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend

from helpers.cases import randomise_adapters

# `make test-compile`: all that is compiled goes through Inductor, which draws eager's random numbers.
INDUCTOR = bool(os.environ.get("LORA_FUSED_TEST_INDUCTOR"))
if INDUCTOR:
    torch._inductor.config.fallback_random = True


class Graphs:
    """A backend that keeps its graphs: what Dynamo has traced, and what AOTAutograd made of it, but where Inductor
    compiles. `backend`: "eager", "aot_eager" or "inductor"."""

    def __init__(self, lora_fused, backend="inductor" if INDUCTOR else "aot_eager"):
        self.namespace = lora_fused._ops.add_op_namespace_prefix("").removesuffix("::")
        self.traced, self.native = [], []
        keep = self._keep
        own = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        self._compile = own if backend == "aot_eager" else lookup_backend(backend)

    def __call__(self, module, inputs, **options):
        self.traced.append(Counter(self._names(module)))
        return self._compile(module, inputs, **options)

    def _keep(self, module, inputs):
        self.native.append(Counter(self._names(module)))
        return make_boxed_func(module.forward)

    def _names(self, module):
        """Ops of this package, by name."""
        targets = (node.target for node in module.graph.nodes)
        return [
            target._schema.name.partition("::")[2]
            for target in targets
            if isinstance(target, torch._ops.OpOverload) and target.namespace == self.namespace
        ]

    @property
    def ops(self):
        """Of all that Dynamo has traced."""
        return sum(self.traced, Counter())


@contextlib.contextmanager
def fresh_compiler():
    """Nothing is compiled yet, and nothing stays so."""
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


class MLP(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Three siblings, a linear alone and a gated MLP. `between` runs between q and k, `around` the rest."""

    width = 32

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(self.width, 32), nn.Linear(self.width, 32)
        self.v_proj, self.o_proj = nn.Linear(self.width, 32, bias=False), nn.Linear(32, self.width)
        self.mlp = MLP(self.width, 48)

    def between(self, x):
        return x

    def attend(self, x):
        h = x.tanh()
        q = self.q_proj(h)
        h = self.between(h)
        return self.o_proj(q * self.k_proj(h) + self.v_proj(h))

    def around(self, function, x):
        return function(x)

    def forward(self, x):
        x = x + self.around(self.attend, x)
        return x + self.around(self.mlp, x)


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED_BLOCK = Counter(traced_linear=4, traced_gated_mlp=1)


def block(cls=Block, dtype=torch.float64, others=(), **config):
    """A block under PEFT, in training mode, with random adapters; `others` are the names of more of them."""
    options = dict(r=4, lora_alpha=6, target_modules=LINEARS)
    model = get_peft_model(cls().to(dtype), LoraConfig(**{**options, **config}), autocast_adapter_dtype=False)
    for name in others:
        model.add_adapter(name, LoraConfig(**{**options, "lora_alpha": 10, **config}), autocast_adapter_dtype=False)
    randomise_adapters(model, dtype)
    return model.train()


def x_of(rows=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, rows, Block.width, generator=generator, dtype=torch.float64).to(dtype)


def results(model, x, seed=5):
    """Output, dx and all gradients by name, None where there is none."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(0.5, 2.0, y.numel(), dtype=torch.float64, device=y.device).view(y.shape)
    (y.double() * weights).sum().backward()
    return {"y": y.detach(), "dx": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def assert_same(ours, theirs, tolerance=1e-11):
    assert ours.keys() == theirs.keys()
    assert theirs["y"].numel() > 0 and theirs["dx"].abs().max() > 0
    for name, value in theirs.items():
        assert (ours[name] is None) == (value is None), name
        if value is not None:
            assert ours[name].dtype == value.dtype, name
            bound = tolerance * value.abs().max().item()
            torch.testing.assert_close(
                ours[name], value, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
            )


def layers_of(*models):
    layers = [module for model in models for module in model.modules() if hasattr(module, "lora_A")]
    assert layers
    return layers


def set_scalings(value, *models):
    for layer in layers_of(*models):
        layer.scaling["default"] = value
