"""Experts of a user's own class: what their forward and their gate may depend on."""

import pytest
import torch
import transformers.integrations.moe as transformers_moe
from helpers.experts import (
    adapt,
    assert_fused,
    assert_peft_runs,
    base_of,
    block_of,
    error,
    example,
    explain,
    kernelized,
)  # fmt: skip
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("on_device")


def gate_of_halves(experts, z):
    gate, up = z.chunk(2, -1)
    return experts.act_fn(gate) * up


def experts_class(gate=gate_of_halves, after=lambda experts, h: h):
    """Experts of a user's own; `after` is between their gate and their second product."""

    class Experts(nn.Module):
        _apply_gate = gate

        def __init__(self, config):
            super().__init__()
            self.num_experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
            self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, hidden))
            self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, inner))
            self.act_fn = nn.SiLU()

        def forward(self, hidden_states, top_k_index, top_k_weights):
            out = torch.zeros_like(hidden_states)
            for expert in range(self.num_experts):
                token, choice = torch.where(top_k_index == expert)
                h = after(self, self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[expert])))
                y = F.linear(h, self.down_proj[expert])
                out.index_add_(0, token, y * top_k_weights[token, choice, None])
            return out

    code = Experts.forward.__code__
    Experts.forward.__code__ = code.replace(co_qualname="Experts.forward") if hasattr(code, "co_qualname") else code
    Experts.__qualname__ = "Experts"
    Experts.forward.__qualname__ = "Experts.forward"
    return transformers_moe.use_experts_implementation(Experts)


def own_pair(lora_fused, cls, **attributes):
    """(ours, PEFT's) of Mixtral's block with experts of another class, in evaluation."""
    block = block_of("mixtral")
    own = block.mixture.experts
    experts = block.mixture.experts = cls(own.config).double()
    experts.load_state_dict(own.state_dict())
    for name, value in attributes.items():
        setattr(experts, name, value)
    model = adapt(block).eval()
    return kernelized(lora_fused, model), model


def test_experts_of_an_own_class(lora_fused):
    assert_fused(lora_fused, *own_pair(lora_fused, experts_class()))


STATE = {
    "module": dict(part=nn.Dropout(0.5)),
    "buffer": dict(part=nn.Buffer(torch.ones(()))),
    "parameter": dict(part=nn.Parameter(torch.ones(()))),
    "tensor": dict(part=torch.ones(())),
    "list": dict(part=[1.0]),
}


@pytest.mark.parametrize("state", STATE)
def test_experts_that_hold_more(lora_fused, state):
    """What changes the result without a sign: nothing of it is compared from call to call."""
    ours, theirs = own_pair(lora_fused, experts_class(), **STATE[state])
    assert_peft_runs(lora_fused, ours, theirs, "Experts holds part besides its weights")


def test_experts_that_ask_their_configuration(lora_fused):
    cls = experts_class(after=lambda experts, h: h * experts.config.num_hidden_layers)
    ours, theirs = own_pair(lora_fused, cls)
    assert_peft_runs(lora_fused, ours, theirs, "it asks its configuration for num_hidden_layers")


@pytest.mark.parametrize("where", ("gate", "after"))
def test_experts_that_drop_in_training(lora_fused, where):
    """Seen in evaluation first. The trial draws no number of the caller's."""
    drop = lambda experts, h: F.dropout(h, 0.5, experts.training)  # noqa: E731
    cls = experts_class(after=drop) if where == "after" else experts_class(lambda e, z: drop(e, gate_of_halves(e, z)))
    ours, theirs = own_pair(lora_fused, cls)
    assert_fused(lora_fused, ours, theirs)
    for each in (ours, theirs):
        each.train()
    explain(lora_fused, ours)
    assert_peft_runs(lora_fused, ours, theirs, "computes something else")


class StraightThrough(nn.Module):
    """SiLU's values with another gradient."""

    def forward(self, x):
        return x + (F.silu(x) - x).detach()


ODD_GATES = {
    "clipped far out": lambda experts, z: gate_of_halves(experts, z.clamp(-1e4, 1e4)),
    "flat near zero": lambda experts, z: gate_of_halves(experts, torch.where(z.abs() < 1e-2, 0.0, z)),
    "another gradient": lambda experts, z: StraightThrough()(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1],
}


@pytest.mark.parametrize("size", (1e-3, 1.0, 1e4))
@pytest.mark.parametrize("gate", ODD_GATES)
def test_gates_that_are_nearly_known(lora_fused, gate, size):
    """They are called, and autograd differentiates them."""
    ours, theirs = own_pair(lora_fused, experts_class(ODD_GATES[gate]))
    for each in (ours, theirs):
        base_of(each).gate_up_proj.data.mul_(size)
    assert_fused(lora_fused, ours, theirs)


def test_an_activation_with_a_buffer(lora_fused):
    """A ReLU until the buffer changes."""

    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Buffer(torch.zeros(()).double())

        def forward(self, x):
            return torch.where(x > 0, x, self.slope * x)

    ours, theirs = own_pair(lora_fused, experts_class(), act_fn=Leaky())
    for slope in (0.0, 0.5):
        for each in (ours, theirs):
            base_of(each).act_fn.slope.fill_(slope)
        assert_fused(lora_fused, ours, theirs)


def test_seen_first_in_a_checkpoint(lora_fused):
    """A trial's graph is none of the checkpoint's."""
    ours, theirs = own_pair(lora_fused, experts_class())
    x, dy = example()
    found = []
    for each in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(each, leaf, use_reentrant=False)
        y.backward(dy)
        found.append([y.detach(), leaf.grad])
    assert all(error(*both) <= 1e-12 for both in zip(*found))
