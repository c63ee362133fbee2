"""Experts that no row goes to, and what is written to after they were called."""

import copy

import pytest
import torch
from helpers.experts import adapt, block_of, counted, explain, kernelized
from helpers.kernelizing import explain as explain_rows

ROWS = {"tokens": (0, 2), "choices": (3, 0), "nobody": (3, 2)}


def wrapper_of(model):
    """The outermost wrapper of the experts module."""
    return model.base_model.model.mixture.experts


def called(wrapper, tokens, choices, sentinel=None):
    """x, routing weights and the result of a call; with a `sentinel`, of no expert at all."""
    x = torch.randn(tokens, 32, dtype=torch.float64).requires_grad_()
    index = torch.arange(choices).expand(tokens, choices)
    index = index if sentinel is None else torch.full_like(index, sentinel)
    routing = torch.rand(tokens, choices, dtype=torch.float64).requires_grad_()
    return x, routing, wrapper(x, index, routing)


def gradients_of(wrapper, tokens, choices, sentinel):
    """Whether there is a gradient at all, and those that there are."""
    wrapper.zero_grad()
    x, routing, out = called(wrapper, tokens, choices, sentinel)
    if out.requires_grad:
        out.sum().backward()
    leaves = [x, routing, *(p for p in wrapper.parameters() if p.requires_grad)]
    return out.shape, out.requires_grad, [leaf.grad is None for leaf in leaves]


@pytest.mark.parametrize(
    "what,implementation",
    (*((what, "eager") for what in ROWS), ("tokens", "batched_mm"), ("choices", "batched_mm")),
)
def test_no_rows(lora_fused, what, implementation):
    """The model's own forward runs no expert then, so PEFT leaves parameters without a gradient, which an optimizer
    passes over; other implementations give zeros."""
    model = adapt(block_of("qwen3_moe", implementation=implementation))
    ours, theirs = wrapper_of(kernelized(lora_fused, model, "cpu")), wrapper_of(copy.deepcopy(model))
    case = (*ROWS[what], theirs.num_experts if what == "nobody" else None)
    seen, expected = gradients_of(ours, *case), gradients_of(theirs, *case)
    assert seen == expected and len(seen[2]) == 6
    assert seen[1] == (implementation != "eager")


def test_what_is_said_of_no_rows(lora_fused):
    model = kernelized(lora_fused, adapt(block_of("qwen3_moe")), "cpu")
    assert all(row.fused for row in explain(lora_fused, model))
    rows = explain_rows(lora_fused, model, 0)
    assert {row.reason for row in rows} == {lora_fused.peft.experts.NO_ROWS} and len(rows) == 2
    called(wrapper_of(model), 0, 2)
    assert {row.last for row in explain(lora_fused, model)} == {lora_fused.peft.experts.NO_ROWS}


@pytest.mark.parametrize("written", ("x", "routing"))
def test_written_in_place_after_the_call(lora_fused, written):
    """PEFT keeps copies by row. Ours keeps x itself and raises as torch does; nothing is computed of what is there."""
    model = kernelized(lora_fused, adapt(block_of("qwen3_moe")), "cpu")
    with counted(lora_fused) as calls:
        x, routing, out = called(wrapper_of(model), 5, 2)
    assert calls
    with torch.no_grad():
        (x if written == "x" else routing).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
