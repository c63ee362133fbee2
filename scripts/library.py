"""What a shared library (ELF) needs and offers, as `readelf` of binutils tells it."""

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

# manylinux_2_28: the newest version of each family of symbols that every system it names has.
MANYLINUX_2_28 = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7,)}
_SEARCHES = ("RPATH", "RUNPATH", "AUDIT", "DEPAUDIT", "AUXILIARY", "FILTER")


class Library(NamedTuple):
    """`needed`: the libraries it asks for; `searches`: (tag, value) of each entry that changes where they are looked
    for; `asks`: undefined symbols as (name, version or ""); `offers`: names of the symbols it defines for others."""

    needed: list[str]
    searches: list[tuple[str, str]]
    asks: list[tuple[str, str]]
    offers: list[str]

    @classmethod
    def read(cls, path: Path) -> "Library":
        """Raises ValueError where `path` is not a whole shared library."""
        needed, searches = [], []
        for tag, value in re.findall(r"\(([A-Z_]+)\).*?\[(.*)\]$", _readelf("-d", path), re.M):
            if tag == "NEEDED":
                needed.append(value)
            elif tag in _SEARCHES:
                searches.append((tag, value))
        asks, offers = [], []
        for line in _readelf("--dyn-syms", path).splitlines():
            fields = line.split()
            if len(fields) < 8 or not fields[0].endswith(":") or not fields[0][:-1].isdigit():
                continue
            name, _, version = fields[7].partition("@")
            if fields[6] == "UND":
                asks.append((name, version))
            elif fields[4] != "LOCAL" and fields[5] not in ("HIDDEN", "INTERNAL"):
                offers.append(name)
        return cls(needed, searches, asks, offers)

    def too_new(self) -> list[str]:
        """Symbols that manylinux_2_28 does not have, as `name@VERSION`."""
        return [f"{name}@{version}" for name, version in self.asks if not _old_enough(version)]

    def borrowed(self) -> list[str]:
        """Those of a newer libstdc++ than manylinux_2_28's that carry no version, since a library of torch happened to
        export them when this one was linked: another torch may leave them to libstdc++."""
        known = [(name, _libstdcxx().get(name, "")) for name, version in self.asks if not version]
        return [f"{name}@{version}" for name, version in known if not _old_enough(version)]


@functools.cache
def _libstdcxx() -> dict[str, str]:
    """The version of each symbol of this machine's libstdc++; none where no compiler says where that is."""
    compiler = shutil.which("c++")
    if compiler is None:
        return {}
    asked = subprocess.run([compiler, "-print-file-name=libstdc++.so.6"], capture_output=True, text=True)
    path = Path(asked.stdout.strip())
    if not path.is_absolute():
        return {}
    lines = [line.split() for line in _readelf("--dyn-syms", path).splitlines()]
    found = [fields[7].split("@") for fields in lines if len(fields) >= 8 and fields[6] != "UND"]
    return {parts[0]: parts[-1] for parts in found if len(parts) > 1}


def _old_enough(version: str) -> bool:
    family, _, number = version.rpartition("_")
    if family not in MANYLINUX_2_28:  # another library's, as libcudart.so.13's
        return not version.startswith("GLIBC")
    return number[0].isdigit() and tuple(map(int, number.split("."))) <= MANYLINUX_2_28[family]


def _readelf(what: str, path: Path) -> str:
    command = ["readelf", "-W", what, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    if done.returncode != 0 or "Error:" in done.stderr:
        raise ValueError(f"{path.name} is not a whole ELF library: {done.stderr.strip()}")
    return done.stdout
