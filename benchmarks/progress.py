"""How far a benchmark is, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

Case = TypeVar("Case")


def numbered(cases: Sequence[Case], shown: bool = True) -> Iterator[Case]:
    """The cases, each after "[2/9, about 4 min left]": its number, and what the rest takes if it is as the first."""
    started = time.monotonic()
    for done, case in enumerate(cases):
        minutes = (time.monotonic() - started) / max(1, done) * (len(cases) - done) / 60
        left = f", about {minutes:.0f} min left" if done else ""
        if shown:
            print(f"[{done + 1}/{len(cases)}{left}]", file=sys.stderr, flush=True)
        yield case
