"""Models on quantized bases for the tests: bitsandbytes' layers, and stand-ins for what cannot be
installed here."""

from __future__ import annotations

import contextlib
import copy

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import quantize_4bit
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers.cases import LINEARS, randomise_adapters, tiny_llama


def four_bit(linear, compute, device="cpu", quant_type="nf4", nested=True, blocksize=64, storage=torch.uint8):
    """bitsandbytes' Linear4bit of a linear's weight and bias, quantized."""
    new = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=compute,
        compress_statistics=nested, quant_type=quant_type, quant_storage=storage,
    )  # fmt: skip
    new.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, blocksize=blocksize, compress_statistics=nested,
        quant_type=quant_type, quant_storage=storage, module=new,
    )  # fmt: skip
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
    return new.to(device)


def eight_bit(linear, device="cpu", threshold=0.0):
    """bitsandbytes' Linear8bitLt of a linear's weight and bias, quantized."""
    new = bnb.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        threshold=threshold,
    )
    new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
    return new.to(device)


def replace(model, make, names=None):
    """`model` with its linears (those of `names`) replaced by what `make` gives; flagged as loaded so."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and (names is None or name.rpartition(".")[2] in names):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))
    kinds = {type(module) for module in model.modules()}
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bnb.nn.Linear4bit in kinds, bnb.nn.Linear8bitLt in kinds
    return model


class One(nn.Module):
    def __init__(self, case, dtype, device):
        super().__init__()
        self.proj = nn.Linear(case.k, case.n, bias=case.bias, dtype=dtype, device=device)

    def forward(self, x):
        return self.proj(x)


def adapted(model, case, adapter=torch.float32, **config):
    """`model` with random adapters on its `proj`, in training mode."""
    lora = LoraConfig(r=case.r, lora_alpha=case.scaling * case.r, target_modules=["proj"], **config)
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    randomise_adapters(model, adapter)
    return model.train(), model.base_model.model.proj


def fuse(lora_fused, model, device="cpu"):
    lora_fused.register_peft_layers()
    kernelize(model, mode=Mode.TRAINING, device=device)
    return lora_fused.explain(model)


def unfuse(model):
    for module in model.modules():
        module.__dict__.pop("forward", None)


def dequantized(layer):
    """The weight of a bitsandbytes layer as bitsandbytes itself gives it."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scale = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    return layer.weight.data * scale.view(-1, 1) / 127


@contextlib.contextmanager
def as_on_gpu(device, autocast):
    """Autocast to a dtype, or none. PEFT's layers on quantized bases ask for a GPU's autocast on any device
    and compute otherwise without it: both are on."""
    before = torch.is_autocast_enabled("cuda")
    with torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        torch.set_autocast_enabled("cuda", autocast is not None)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", before)


def step(model, x, dy, autocast=None):
    """(y, gradients by name, x's included) of one pass."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    with as_on_gpu(x.device.type, autocast):
        y = model(x)
    y.backward(dy.to(y.dtype))
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return y.detach(), {"x": x.grad, **grads}


def llama(device, names=None, compute=torch.float32, seed=1, stored=None, **config):
    """(the tiny Llama under PEFT, its linears, or those of `names`, in four bits, quantized from `stored`
    where that is another dtype than they compute in; ids)"""
    model = tiny_llama(compute, intermediate_size=128).to(device)
    head, model.lm_head = model.lm_head, nn.Identity()
    replace(model, lambda linear: four_bit(linear.to(stored or compute), compute, device), names)
    model.lm_head = head
    options = dict(r=4, lora_alpha=8, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(model, LoraConfig(**{**options, **config}), autocast_adapter_dtype=False)
    torch.manual_seed(seed)
    randomise_adapters(model, torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.1
    return model.train(), torch.randint(0, 64, (2, 12), device=device)


def exact(model):
    """A copy of a model in float64, its quantized layers plain ones of the dequantized weights."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                plain.weight = nn.Parameter(dequantized(child).double(), requires_grad=False)
                if child.bias is not None:
                    plain.bias = child.bias
                setattr(parent, name, plain)
    return model.double()


def random_four_bit(lora_fused, shape, blocksize, quant_type, nested, dtype, device, storage=torch.uint8):
    """(operands, description, bitsandbytes' tensor and state): random bytes, so that every code occurs."""
    weight = torch.randn(shape, device=device).to(dtype) * 0.3
    packed, state = quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    packed.view(torch.uint8).random_(0, 256)
    inner = state.state2
    more = (inner.absmax, inner.code, state.offset) if nested else (None,) * 3
    operands = lora_fused.Operands(
        packed, absmax=state.absmax, nested_absmax=more[0], nested_code=more[1], offset=more[2]
    )
    spec = lora_fused.specs.FourBit(shape, blocksize, inner.blocksize if nested else 0, quant_type == "fp4", dtype)
    return operands, spec, packed, state
