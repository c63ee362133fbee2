"""Names of modules that differ in numbers alone, as one name: layers.0-31.mlp."""

from __future__ import annotations

from collections.abc import Iterable

_Part = str | frozenset[int]  # of a dotted name: a word, or the numbers that stand in its place


def fold(names: Iterable[str]) -> list[str]:
    """Names that together say which modules there are, each a pattern such as layers.0-3,5.mlp.up_proj."""
    folded: dict[tuple[_Part, ...], None] = {
        tuple(frozenset({int(part)}) if part.isdigit() else part for part in name.split(".")): None for name in names
    }
    for position in range(max(map(len, folded), default=0)):
        folded = _folded_at(folded, position)
    return [".".join(part if isinstance(part, str) else _ranges(part) for part in parts) for parts in folded]


def _folded_at(names: Iterable[tuple[_Part, ...]], position: int) -> dict[tuple[_Part, ...], None]:
    """Those that differ in the numbers at one position alone become one."""
    numbers: dict[tuple, frozenset[int] | None] = {}
    for parts in names:
        part = parts[position] if position < len(parts) else ""
        if isinstance(part, str):
            numbers[parts] = None
        else:
            key = (*parts[:position], None, *parts[position + 1 :])
            numbers[key] = (numbers.get(key) or frozenset()) | part
    return {
        parts if found is None else (*parts[:position], found, *parts[position + 1 :]): None
        for parts, found in numbers.items()
    }


def _ranges(numbers: frozenset[int]) -> str:
    """0-3,5 of {0, 1, 2, 3, 5}."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def without_prefix(names: list[str]) -> list[str]:
    """Without the words that all of them begin with, as PEFT's wrappers add them; a word before a number stays, and
    each name's last one."""
    split = [name.split(".") for name in names]
    common = 0
    for parts in zip(*(words[:-1] for words in split)):
        if len(set(parts)) > 1 or parts[0].isdigit():
            break
        common += 1
    while common and any(words[common].isdigit() for words in split):
        common -= 1
    return [".".join(words[common:]) for words in split]
