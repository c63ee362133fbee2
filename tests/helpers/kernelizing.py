"""A PEFT model kernelized, what `explain` says of it, and which Function stands behind a result."""

import copy
import warnings

import torch
from kernels import Mode, kernelize

from helpers.cases import DEVICE


def kernelize_in_place(lora_fused, model, device=DEVICE):
    lora_fused.register_peft_layers()
    return kernelize(model, mode=Mode.TRAINING, device=device)


def kernelized(lora_fused, model, device=DEVICE):
    """A kernelized copy; the model stays PEFT's."""
    return kernelize_in_place(lora_fused, copy.deepcopy(model), device)


def explain(lora_fused, model, rows=8192):
    """Without the warning that nothing is fused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lora_fused.explain(model, rows)


def fused_functions(result):
    """How many nodes of the fused Function of linears stand behind a result."""
    seen, queue = set(), [result.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue.extend(parent for parent, _ in node.next_functions)
    return sum("LoraLinearFunction" in node.name() or "NativeGroupFunction" in node.name() for node in seen)


def assert_peft_runs(lora_fused, model, reason, inputs=None, **call):
    """Kernelized and plain give the same bits, the fused Function is not entered, explain agrees."""
    ours = kernelized(lora_fused, model)
    rows = explain(lora_fused, ours)
    assert rows and not any(row.fused for row in rows), str(rows)
    assert all(reason in row.reason for row in rows), str(rows)
    inputs = torch.randn(6, 32) if inputs is None else inputs
    torch.manual_seed(3)
    expected = model(inputs, **call)
    torch.manual_seed(3)
    result = ours(inputs, **call)
    assert torch.equal(result, expected)
    assert not result.requires_grad or fused_functions(result) == 0


class Loaded:
    """Stands where `kernels` expects a repository."""

    def __init__(self, layer):
        self.layer = layer

    def load(self):
        return self.layer


def forwards(model):
    """The functions that stand in the instances, by module."""
    return {
        name: vars(module)["forward"].__func__ for name, module in model.named_modules() if "forward" in vars(module)
    }


def ours_in(lora_fused, model):
    """Every attribute of a module that is a forward of this package, or says that it wraps one."""
    return [
        (name, attribute)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        for bound in (value, getattr(value, "__wrapped__", None))
        if getattr(getattr(bound, "__func__", None), "__module__", "").startswith(lora_fused.__name__)
    ]
