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
    """The fastest tile of a product with the LoRA term inside, as `triton.linear_expand.Tile` has it, for (M, N, K)."""

    shape: tuple[int, int, int]
    tile: tuple[int, int, int, int, int] | None  # None: the library's product is faster


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
    # Of `triton.grouped_linear`, by rows an expert, N and K of the first product. Where none was measured, and where
    # the nearest has no tile, experts go to torch's grouped products if those do not wait for the GPU.
    experts_tiles: tuple[MeasuredTile, ...] = ()


TILES = tuple(name for name in DeviceConfig._fields if name.endswith("_tiles"))
LIMITS = tuple(name for name in DeviceConfig._fields if name not in TILES)


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
    tiles = {key: tuple(_tile(path, key, each) for each in _list(path, key, found[key])) for key in TILES}
    values: dict[str, Any] = {**limits, **tiles}
    return DeviceConfig(**values)


def _list(path: Path, key: str, found) -> list:
    if not isinstance(found, list):
        raise ValueError(f"{path}: {key!r} is {found!r}, expected a list")
    return found


def _tile(path: Path, name: str, entry) -> MeasuredTile:
    """One of the entries under `name`."""

    def sizes(key: str, count: int) -> tuple[Any, ...]:
        values = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(values, list) or len(values) != count or any(type(v) is not int or v < 1 for v in values):
            raise ValueError(f"{path}: {name!r} holds {entry!r}, expected {key!r} of {count} positive integers")
        return tuple(values)

    no_tile = name == "experts_tiles" and isinstance(entry, dict) and entry.get("tile", 0) is None
    return MeasuredTile(sizes("shape", 3), None if no_tile else sizes("tile", 5))


def nearest(tiles: tuple[MeasuredTile, ...], shape: tuple[int, int, int]) -> tuple[int, ...] | None:
    """The tile measured nearest to (M, N, K) in powers of two; None where none was measured or it has none."""

    def distance(measured: MeasuredTile) -> float:
        return sum(math.log2(ours / theirs) ** 2 for ours, theirs in zip(measured.shape, shape))

    return min(tiles, key=distance).tile if tiles else None
