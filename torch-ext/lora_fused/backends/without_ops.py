"""In place of `native` in a variant without a native library: what every backend needs of it, by torch.

`select` and `native_path` choose no native op here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..specs import Mask

available = False
is_architecture_forced = may_be_old = False
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
FORMATS = ("floating", "nf4", "fp4")
QUANTIZED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PackedWeight = tuple  # nobody reads its numbers
_SCALE_UNITS = 4.0  # kernel-src/common/mag_norm_scale.h
_WORD = 0xFFFFFFFF


def architecture(device: torch.device) -> str:
    """Nobody's kernels run; `native.architecture` names those of the ops."""
    return "cpu" if device.type == "cpu" else ""


def mag_norm_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """magnitude / norm [N] in norm's dtype, and exactly 1 where they differ by the norm's rounding alone."""
    scale = magnitude.to(norm.dtype) / norm
    return scale.masked_fill_((scale - 1).abs() <= _SCALE_UNITS * torch.finfo(norm.dtype).eps, 1)


def dropout(x: Tensor, mask: Mask, dtype: torch.dtype) -> Tensor:
    """mask ∘ x / (1 - p) for x [M, K], in `dtype`: the mask of every backend, see kernel-src/common/dropout.h."""
    rows, cols = x.shape
    numbers = _philox(mask.seed, rows, -(-cols // 8)).flatten(1)[:, :cols]
    wide = x if x.dtype == torch.float64 else x.float()
    scale = 1.0 / (1.0 - mask.p) if mask.p < 1.0 else 0.0
    return torch.where(numbers >= round(mask.p * 2.0**16), wide * scale, 0.0).to(dtype)


def _philox(seed: Tensor, rows: int, blocks: int) -> Tensor:
    """Numbers of 16 bits [rows, blocks, 4, 2]: Philox4x32-7 with key = seed and counter = (block, row, row >> 32, 0)
    (Salmon et al. 2011, doi 10.1145/2063384.2063405). In int64, whose products wrap as unsigned ones do."""
    row = torch.arange(rows, device=seed.device).view(-1, 1)
    block = torch.arange(blocks, device=seed.device).view(1, -1)
    key = [seed & _WORD, seed >> 32 & _WORD]
    counter = [block, row & _WORD, row >> 32, torch.zeros_like(row)]
    for _ in range(7):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32 & _WORD) ^ counter[1] ^ key[0],
            second & _WORD,
            (first >> 32 & _WORD) ^ counter[3] ^ key[1],
            first & _WORD,
        ]
        key = [key[0] + 0x9E3779B9 & _WORD, key[1] + 0xBB67AE85 & _WORD]
    words = torch.stack(torch.broadcast_tensors(*counter), -1)
    return torch.stack((words & 0xFFFF, words >> 16), -1)
