"""Input errors of `lora_experts`: they name the tensor, what was seen and what is expected."""

import pytest
import torch
from helpers.expert_operands import R1, Case, E, H, I, K, T


def bad(lora_fused, **changes):
    with torch.device("cpu"):
        case = Case(lora_fused, bias=True)
    given = dict(x=case.x, index=case.index, routing=case.routing, up=case.up, down=case.down, gate=case.gate)
    for name, value in changes.items():
        place, _, part = name.partition("_")
        given[place] = given[place]._replace(**{part: value}) if part else value
    return lora_fused.lora_experts(**given)


@pytest.mark.parametrize(
    "change,message",
    (
        (dict(x=torch.randn(T, H + 1).double()), r"x: shape \(10, 33\), expected \[T, 32\]"),
        (dict(index=torch.zeros(T, 3).long()), r"routing: shape \(10, 2\)"),
        (dict(index=torch.full((T, K), -1)), "index: -1"),
        (dict(routing=torch.rand(T - 1, K).double()), "routing: shape"),
        (dict(up_weight=torch.randn(E, I, H).double()), "up.bias: shape"),
        (dict(down_weight=torch.randn(E + 1, H, I).double()), "down.weight: shape"),
        (dict(down_bias=torch.randn(E, I).double()), "down.bias: shape"),
        (dict(up_lora_a=torch.randn(E, R1, H + 1).double()), "up.lora_a: shape"),
        (dict(up_lora_a=torch.randn(E, 0, H).double()), "up.lora_a: shape"),
        (dict(down_lora_b=torch.randn(E, H, R1).double()), "down.lora_b: shape"),
        (dict(down_lora_b=None), "down.lora_b: missing"),
        (dict(up_weight=torch.randn(E, 2 * I, H).double().requires_grad_()), "up.weight: requires a gradient"),
        (dict(x=torch.empty(T, H, device="meta", dtype=torch.float64)), "x: on meta"),
    ),
    ids=lambda each: each if isinstance(each, str) else "-".join(each),
)  # fmt: skip
def test_bad_values_name_the_tensor(lora_fused, change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        bad(lora_fused, **change)


@pytest.mark.parametrize(
    "change,message",
    (
        (dict(x=[1.0]), "x: list"),
        (dict(index=torch.rand(T, K)), "index: dtype"),
        (dict(up_scaling=float("nan")), "up.scaling: nan"),
        (dict(down_weight=torch.randn(E, H, I)), "down.weight: dtype torch.float32, expected torch.float64"),
        (dict(up_lora_a=torch.zeros(E, R1, H).int()), "up.lora_a: dtype"),
        (dict(gate="silu"), "gate: str"),
    ),
    ids=lambda each: each if isinstance(each, str) else "-".join(each),
)
def test_bad_types_name_the_tensor(lora_fused, change, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        bad(lora_fused, **change)


def test_bad_gates(lora_fused):
    gate = lora_fused.specs.Gate
    with pytest.raises(ValueError, match="^gate: activation 'swish'"):
        bad(lora_fused, gate=gate("swish"))
    with pytest.raises(ValueError, match=r"^up.weight: shape \(5, 32, 32\), expected \[E, 16, 32\]"):
        bad(lora_fused, gate=gate(gated=False))
