"""Which products an experts module gets."""

from __future__ import annotations

from typing import Union

from ..expert_specs import ExpertWeights
from . import grouped_mm
from .reference.grouped import LoopedProducts, Rows

Products = Union[LoopedProducts, grouped_mm.GroupedProducts]
LOOPED, GROUPED = "reference", "grouped_mm"


def choose(up: ExpertWeights, down: ExpertWeights) -> str:
    """The backend of these weights."""
    return GROUPED if grouped_mm.fits(up.weight) and grouped_mm.fits(down.weight) else LOOPED


def make(rows: Rows, up: ExpertWeights, down: ExpertWeights, trains: bool) -> Products:
    """The products of one call's rows; `trains` where a backward follows."""
    if choose(up, down) == LOOPED or rows.order.numel() == 0:
        return LoopedProducts(rows)
    return grouped_mm.GroupedProducts(rows, few=not trains and rows.order.numel() < rows.ends.numel())
