"""What was measured on a GPU, by device name: configs/*.json, which benchmarks/tune.py writes.

A limit is a size from which an op goes to Triton, or up to which the native ops keep it; null in a file stands for
infinity. A device without a file was not measured: there no product goes to Triton that the native ops or torch can do.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import native

DIRECTORY = Path(__file__).parent / "configs"
ABOUT = ("device", "source")  # keys for the reader alone


class MeasuredTile(NamedTuple):
    """The fastest tile of the GEMM with the LoRA term inside, as `triton.linear_expand.Tile` has it, for (M, N, K)."""

    shape: tuple[int, int, int]
    tile: tuple[int, int, int, int, int]


class DeviceConfig(NamedTuple):
    """Limits of one device; the defaults are those of a device that nobody measured."""

    # Multiply-adds of one base product from which its GPU time hides Triton's launches: below, a step waits for the
    # host.
    linear_expand_from: float = math.inf
    # DoRA's norm goes to Triton from this rank and from this many multiply-adds (N·K·R) on.
    row_norm_from_rank: float = math.inf
    row_norm_from: float = math.inf
    # Tokens, and multiply-adds of an embedding's delta (M·H·R), up to which the native ops compute it. Beyond 8192
    # tokens their dA would go to torch's sorted scatter.
    embedding_tokens: float = 8192
    embedding_up_to: float = math.inf
    linear_expand_tiles: tuple[MeasuredTile, ...] = ()  # none measured: the rule in `triton.linear_expand`


LIMITS = tuple(name for name in DeviceConfig._fields if name != "linear_expand_tiles")


def path_of(device_name: str) -> Path:
    """Where the file of a GPU is or would be; 'NVIDIA H200' has nvidia-h200.json."""
    return DIRECTORY / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json")


def of(device: torch.device) -> DeviceConfig:
    """What holds on a device; on one that runs another architecture's kernels, what holds where nobody measured."""
    return DeviceConfig() if device.type != "cuda" or native.is_architecture_forced else _read_once(device)


@functools.cache
def _read_once(device: torch.device) -> DeviceConfig:
    path = path_of(torch.cuda.get_device_name(device))
    return read(path) if path.exists() else DeviceConfig()


def read(path: Path) -> DeviceConfig:
    """Raises ValueError that names the file and the key."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {type(found).__name__}, expected an object")
    keys = {*ABOUT, *DeviceConfig._fields}
    wrong = sorted(keys ^ found.keys())
    if wrong:
        raise ValueError(f"{path}: {wrong[0]!r} is {'missing' if wrong[0] in keys else 'unknown'}")
    limits = {key: math.inf if found[key] is None else found[key] for key in LIMITS}
    for key, limit in limits.items():
        if type(limit) not in (int, float) or not limit >= 0:
            raise ValueError(f"{path}: {key!r} is {limit!r}, expected a number from 0 or null")
    tiles = found["linear_expand_tiles"]
    if not isinstance(tiles, list):
        raise ValueError(f"{path}: 'linear_expand_tiles' is {tiles!r}, expected a list")
    return DeviceConfig(**limits, linear_expand_tiles=tuple(_tile(path, each) for each in tiles))


def _tile(path: Path, entry) -> MeasuredTile:
    """One of 'linear_expand_tiles'."""

    def sizes(key: str, count: int) -> tuple[Any, ...]:
        values = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(values, list) or len(values) != count or any(type(v) is not int or v < 1 for v in values):
            raise ValueError(
                f"{path}: 'linear_expand_tiles' holds {entry!r}, expected {key!r} of {count} positive integers"
            )
        return tuple(values)

    return MeasuredTile(sizes("shape", 3), sizes("tile", 5))


def nearest(tiles: tuple[MeasuredTile, ...], shape: tuple[int, int, int]) -> tuple[int, ...] | None:
    """The tile measured nearest to (M, N, K) in powers of two; None where none was measured."""

    def distance(measured: MeasuredTile) -> float:
        return sum(math.log2(ours / theirs) ** 2 for ours, theirs in zip(measured.shape, shape))

    return min(tiles, key=distance).tile if tiles else None
