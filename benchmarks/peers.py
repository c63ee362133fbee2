"""Other ways to run PEFT's adapters, which compare_lora.py measures beside PEFT and lora-fused.

Each is a context manager: inside of it a PEFT model runs that way, after it with PEFT's own forwards. What it gives
holds after it what else there is to report.
"""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Callable

import torch
import torch._dynamo
from peft.tuners.lora.dora import DoraLinearLayer

RECOMPILATIONS = 64  # more than any of the cases needs


@contextlib.contextmanager
def compiled(model, **how):
    """torch.compile of each decoder layer, or of the single adapted linear; the model may have no adapter. Where torch
    would give up compiling and go on without, this raises. Reports how many graphs there are, and how often their code
    broke off."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base = getattr(base, "model", base)  # of a head's model, too
    modules = list(base.layers) if hasattr(base, "layers") else [base.proj]
    torch.compiler.reset()
    for module in modules:
        module.compile(**how)
    limits = dict(recompile_limit=RECOMPILATIONS, fail_on_recompile_limit_hit=True)
    notes, counters = {}, torch._dynamo.utils.counters
    counters.clear()
    try:
        with torch._dynamo.config.patch(**limits):
            yield notes
        notes.update(graphs=counters["stats"]["unique_graphs"], graph_breaks=sum(counters["graph_break"].values()))
    finally:
        for module in modules:
            module._compiled_call_impl = None
        torch.compiler.reset()


@contextlib.contextmanager
def dense_norm(model):
    """DoRA's norm from B·A as one product: PEFT sends an identity matrix through A and B instead, under autograd."""
    original = DoraLinearLayer.get_lora_weight

    @torch.no_grad()
    def product(self, lora_A, lora_B, adapter_name=None):
        return lora_B.weight @ lora_A.weight

    DoraLinearLayer.get_lora_weight = product
    try:
        yield
    finally:
        DoraLinearLayer.get_lora_weight = original


def package(module_name: str) -> Callable:
    """A single adapted linear through a package's autograd Function for an attention's output projection."""

    @contextlib.contextmanager
    def way(model):
        apply_lora_o = importlib.import_module(module_name).apply_lora_o
        layer = model.get_base_model().proj
        attention = types.SimpleNamespace(o_proj=layer, training=layer.training)
        layer.forward = lambda x: apply_lora_o(attention, x.unsqueeze(0)).squeeze(0)
        try:
            yield
        finally:
            del layer.forward

    return way


def of(case: dict) -> dict[str, Callable]:
    """The ways that serve a case, by name. unsloth changes PEFT and transformers when it is imported: it comes last."""
    ways = {"PEFT, torch.compile": compiled}
    if "DoRA" in case["variant"]:
        ways["PEFT, dense norm"] = dense_norm
    if "k" in case and case["variant"] == "LoRA":
        ways["axolotl"] = package("axolotl.kernels.lora")
        ways["unsloth"] = package("unsloth.kernels.fast_lora")
    return ways
