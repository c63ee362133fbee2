"""Three projections of one input, adapted and kernelized, and what a pass through them gives."""

import copy

import torch
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers.cases import DEVICE, randomise_adapters

NAMES = ("q", "k", "v")


class Heads(nn.Module):
    """Three projections of one input, as an attention has them."""

    def __init__(self, sizes=(16, 8, 12), bias=(True, False, True)):
        super().__init__()
        for name, size, has_bias in zip(NAMES, sizes, bias):
            self.add_module(name, nn.Linear(32, size, bias=has_bias))

    def forward(self, x, between=lambda *_: None, names=NAMES):
        results = []
        for name in names:
            results.append(getattr(self, name)(x))
            between(self, name, x)
        return torch.cat(results, -1)


def heads(dtype=torch.float64, second=None, **config):
    options = dict(r=4, lora_alpha=6, target_modules=list(NAMES), rank_pattern={"k": 7}, alpha_pattern={"v": 3})
    model = get_peft_model(Heads().to(dtype), LoraConfig(**{**options, **config}), autocast_adapter_dtype=False)
    if second:
        model.add_adapter("second", LoraConfig(**second))
        model.base_model.set_adapter(["default", "second"])
    randomise_adapters(model, dtype)
    return model.train()


def kernelized(lora_fused, model):
    lora_fused.register_peft_layers()
    return kernelize(copy.deepcopy(model), mode=Mode.TRAINING, device=DEVICE)


def inner(model):
    return model.base_model.model


def functions(result):
    """Nodes of the fused Function behind a result."""
    seen, queue = set(), [result.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue.extend(parent for parent, _ in node.next_functions)
    return sum("LoraLinearFunction" in node.name() or "NativeGroupFunction" in node.name() for node in seen)


def step(model, x, **call):
    """(result, gradients) of one pass; a fresh leaf each time, as activations are."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = inner(model)(x, **call)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return y, {"x": x.grad, **grads}


def assert_same(ours, theirs):
    (y, grads), (y_peft, grads_peft) = ours, theirs
    torch.testing.assert_close(y, y_peft, rtol=1e-12, atol=1e-12)
    assert grads.keys() == grads_peft.keys()
    for name, grad in grads.items():
        if grads_peft[name] is None:
            assert grad is None, name
        else:
            torch.testing.assert_close(grad, grads_peft[name], rtol=1e-11, atol=1e-11, msg=name)


def take_out(layers):
    """Takes their parameters out of layers, as FSDP1 does; the result puts tensors made of them in their place, as FSDP1
    does before every pass."""
    taken = []
    for layer in layers:
        for name, parameter in [*layer.named_parameters(recurse=False)]:
            layer.register_parameter(f"flat_{name}", parameter)
            del layer._parameters[name]
            taken.append((layer, name, parameter))

    def put(*_):
        for layer, name, parameter in taken:
            layer.__dict__[name] = 1.5 * parameter

    return put


def learned(lora_fused, model, x):
    """A kernelized copy that has seen one pass."""
    ours = kernelized(lora_fused, model)
    step(ours, x)
    return ours
