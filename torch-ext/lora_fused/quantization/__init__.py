"""Quantized base weights: one file and one row of FORMATS a format, what all of them offer here.

A weight in floating point lives for one product: nothing of it is kept for backward, which makes
it again. The allocator hands the same memory to one weight after another, stream by stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..backends import native, select
from ..specs import EightBit, FourBit, Operands, Quantized
from . import eight_bit, four_bit

# Elements of W that `row_norm` has in floating point at a time: 32 MB of bfloat16, which stays in
# the cache of a large GPU between the two kernels.
NORM_ELEMENTS = 2**24
# By the description that a spec holds, the file that has `rows`, which dequantizes some of them, and, where the native
# ops read the format, `record`, the numbers that they take.
FORMATS = {FourBit: four_bit, EightBit: eight_bit}
_FLOATING = native.PackedWeight()
_FIRST_SCALE = Operands._fields.index("absmax")  # from there on the scales of a quantized weight


def _rows(operands: Operands, quantized: Quantized, dtype: torch.dtype, first: int, rows: int) -> Tensor:
    form = FORMATS.get(type(quantized))
    if form is None:
        raise TypeError(f"weight: format {type(quantized).__name__} is unknown, expected {_names(FORMATS)}")
    return form.rows(operands, quantized, dtype, first, rows)


def _names(kinds: Iterable[type]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)


def dequantize(operands: Operands, quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`."""
    return _rows(operands, quantized, dtype, 0, quantized.shape[0])


def row_norm(operands: Operands, quantized: Quantized, scaling: float) -> Tensor:
    """‖W + s·B·A‖ by row, [N] in at least float32, with at most NORM_ELEMENTS of W, or eight rows, in
    floating point at a time, in the dtype that W had before it was quantized."""
    n, k = quantized.shape
    rows = max(NORM_ELEMENTS // max(k, 1) // 8 * 8, 8)
    norms = []
    for first in range(0, max(n, 1), rows):
        count = min(rows, n - first)
        weight = _rows(operands, quantized, quantized.dtype, first, count)
        norms.append(select.row_norm(weight, operands.lora_a, operands.lora_b[first : first + count], scaling))
        del weight
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def packed(formats: Sequence[Quantized | None], operands: Sequence[Operands]) -> tuple[list[int], list[Tensor]]:
    """The native ops' `quantized` and `scales` of weights of which some are quantized (`native.PackedWeight`)."""
    numbers: list[int] = []
    scales: list[Tensor] = []
    for form, p in zip(formats, operands):
        if form is None:
            numbers += _FLOATING
            continue
        record = getattr(FORMATS.get(type(form)), "record", None)
        if record is None:
            known = _names(kind for kind, each in FORMATS.items() if hasattr(each, "record"))
            raise TypeError(f"weight: format {type(form).__name__} is none of the native ops', expected {known}")
        numbers += record(form, first_scale=len(scales))
        scales += [scale for scale in p[_FIRST_SCALE:] if scale is not None]
    return numbers, scales


def dora_scales(
    weights: Sequence[Tensor], operands: Sequence[Operands], formats: Sequence[Quantized | None], scalings
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """`select.dora_scales` of members of which some are quantized; weights [N, K] are those of the others."""
    magnitudes = [p.magnitude for p in operands]
    apart = [
        i
        for i, (form, p) in enumerate(zip(formats, operands))
        if form is not None and p.magnitude is not None
        and not select.norm_is_native(p.weight, p.lora_a, p.lora_b, form)
    ]  # fmt: skip
    together = [None if i in apart else magnitude for i, magnitude in enumerate(magnitudes)]
    forms = [None if magnitude is None else form for magnitude, form in zip(together, formats)]
    adapters = [p.lora_a for p in operands], [p.lora_b for p in operands]
    norms, mag_norm_scales = select.dora_scales(weights, *adapters, together, scalings, forms, *packed(forms, operands))
    for i in apart:
        norms[i] = row_norm(operands[i], formats[i], scalings[i])
        mag_norm_scales[i] = native.mag_norm_scale(magnitudes[i], norms[i])
    return norms, mag_norm_scales
