"""What can be done about the reasons for which PEFT's own forward runs."""

from __future__ import annotations

import re

# In the order in which they are tried. A pattern is found anywhere in the reason.
SUGGESTIONS = (
    (r"^torch\.compile", "leave it out of what is compiled (torch.compiler.disable), where eager is faster for you"),
    (r"without layers of this kernel", "move the model to a CPU or a CUDA GPU, then run lora_fused.apply(model)"),
    (r"^not kernelized|another build of this kernel|bound to another module", "run lora_fused.apply(model)"),
    (r"DTensors\)|by tensor parallelism", "nothing to do: parallelism shards it in a forward of its own"),
    (r"^another tool set its forward", "run lora_fused.apply(model) before the tool that set it, or leave that out"),
    (r"has a forward of its own", "leave out the tool that set it, or accept PEFT's forward where it is"),
    (r"hooks", "remove the hooks (register_forward_hook and its kind), or accept PEFT's forward where they are"),
    (r"is replaced by", "undo the replacement: PEFT would call it, so it is called"),
    (r"^adapters are disabled", "model.enable_adapter_layers(), or leave the disable_adapter() block"),
    (r"is merged into", "model.unmerge_adapter()"),
    (r"^several active adapters", "activate one: model.set_adapter(name)"),
    (r"^no active adapter", "nothing to do: this layer has none of the active adapters"),
    (r"^LoRA variant", "LoRA and DoRA are fused, other variants are PEFT's"),
    (r"is no weight of experts", "nothing to do: routers and biases are small, and PEFT's"),
    (
        r"use_experts_implementation|implementation '|something else than its gate",
        "model.set_experts_implementation('grouped_mm'), where the model has it",
    ),
    (r"quantized with scales|one more delta", "merge the adapter, or do not quantize the experts: results are wrong"),
    (
        r"^no fused layer|^unknown base layer",
        "fused are nn.Linear, Conv1D, nn.Embedding and quantized linears: docs/support.md",
    ),
    (r"rows without a gradient|alone with their input", "nothing to do: few rows are faster as PEFT runs them"),
    (r"not quantized yet|meta device", "load the weights or move the model to its device first"),
    (r", the base weight on ", "move it to the base weight's device: model.to(device)"),
    (r"sharded", "under FSDP each call decides: run a step and look at what the last call ran"),
    (r"without autocast|adapter dtypes differ|two dtypes differ", "one dtype for x and base, or torch.autocast"),
    (r"^GPU of compute capability", "float16 or float32 for the model, quantized weights and autocast, on this GPU"),
    (r"broken blocks|no kernel for", "run it on a CUDA GPU"),
    (r"base layer's own forward", "nothing to do: the base's format is its library's, the delta is fused"),
    (r"^scaling", "scaling = a Python float, as PEFT sets it"),
    (r"MultiheadAttention", "nothing to do: no forward of this module is ever called"),
    (r"on a base that is called", "no DoRA on this base, or a base in 16 or 4 bits (bitsandbytes)"),
)


def suggestion_for(reason: str) -> str | None:
    """The first that fits."""
    return next((text for pattern, text in SUGGESTIONS if re.search(pattern, reason)), None)
