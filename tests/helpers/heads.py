"""Three projections of one input, adapted and kernelized, and what a pass through them gives."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers.cases import randomise_adapters
from helpers.kernelizing import kernelized

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


def inner(model):
    return model.base_model.model


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
    """Takes their parameters out of layers, as FSDP1 does; the result puts tensors made of them in their place, as
    FSDP1 does before every pass."""
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


def masked_heads(lora_fused, monkeypatch, masked):
    """(kernelized heads with dropout in those of `masked`, their base biases joined). The masks of three projections
    drawn at once differ from three drawn one by one, as they do on a GPU."""
    own = lora_fused.functional.dispatch.draw_seeds

    def draw_seeds(*args):
        seeds = own(*args)
        return None if seeds is None else seeds ^ len(seeds)

    monkeypatch.setattr(lora_fused.functional.dispatch, "draw_seeds", draw_seeds)
    model = heads(lora_dropout=0.5)
    for name in {*NAMES} - {*masked}:
        getattr(inner(model), name).lora_dropout["default"] = nn.Identity()
    biases = [getattr(inner(model), name).base_layer for name in NAMES]
    b = torch.cat([torch.zeros(layer.out_features) if layer.bias is None else layer.bias for layer in biases])
    return kernelized(lora_fused, model), b
