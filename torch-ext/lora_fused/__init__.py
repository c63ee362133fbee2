"""Fused LoRA layers for Hugging Face PEFT models, loaded as a Hub kernel.

`__all__` is what version 1 promises; everything else may change.
"""

from pathlib import Path as _Path

from .environment import integrity as _integrity

_integrity.check(_Path(__file__).parent)  # before the library is opened

from . import _ops as _ops  # before the rest, so that a library that fails to load leaves nothing half loaded

from . import layers
from .functional.linear import lora_linear, lora_linear_group, row_norm
from .functional.embedding import lora_embedding
from .functional.experts import lora_experts
from .explanation import Explanation, Row, explain, record
from .mapping import register_peft_layers, unregister_peft_layers, use_peft_layers
from .compiled.options import compile_options
from .binding import LoraFusedCallback, apply, restore
from .specs import ExpertWeights, Gate, Operands, Projection, ProjectionSpec

__all__ = [
    "ExpertWeights",
    "Explanation",
    "Gate",
    "LoraFusedCallback",
    "Operands",
    "Projection",
    "ProjectionSpec",
    "Row",
    "apply",
    "compile_options",
    "explain",
    "layers",
    "lora_embedding",
    "lora_experts",
    "lora_linear",
    "lora_linear_group",
    "record",
    "register_peft_layers",
    "restore",
    "row_norm",
    "unregister_peft_layers",
    "use_peft_layers",
]
