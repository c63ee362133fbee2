#!/usr/bin/env python3
"""Lay out the variants without native code, torch-rocm and torch-xpu.

    python scripts/noarch.py

They go to build/, and to _build/noarch the source from which kernel-builder makes them: with [torch] in build.toml it
evaluates a backend without a kernel to such a variant, and then writes a setup.py that compiles for it. So it gets a
build.toml with [torch-noarch], which has what build.toml says, and a flake of its own.
"""

import re
import shutil
from pathlib import Path

from kernels._rust import Build

from build import ROOT, build_id, git_status, tomllib, write_variant

BACKENDS = ("rocm", "xpu")
SOURCE = ROOT / "_build" / "noarch"


def noarch_toml(text: str) -> str:
    """The build.toml of these variants, for the repository's."""
    general = text[: re.search(r"^\[torch\]$", text, re.MULTILINE).start()]
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    general, replaced = re.subn(r"^backends = .*$", f"backends = [{backends}]", general, flags=re.MULTILINE)
    data = re.search(r"^\[torch\]\n(pyext = .*)$", text, re.MULTILINE)
    if replaced != 1 or data is None:
        raise ValueError("build.toml: expected a line of backends in [general], and pyext first in [torch]")
    return f"{general}[torch-noarch]\n{data[1]}\n"


def noarch_flake(text: str, status: dict | None) -> str:
    """The flake of these variants, for the repository's. Nix asks it for the commit, which a folder outside of git has
    not."""
    if status is None:
        return text
    short, full = ("dirtyShortRev", "dirtyRev") if status["dirty"] else ("shortRev", "rev")
    commit, tail = status["commit"], "-dirty" * status["dirty"]
    own = f'self = self // {{ {full} = "{commit}{tail}"; {short} = "{commit[:7]}{tail}"; }};'
    text, replaced = re.subn(r"\binherit self;", own, text)
    if replaced != 1:
        raise ValueError("flake.nix: expected `inherit self;` once")
    return text


def write_source(target: Path) -> None:
    """What kernel-builder builds them from."""
    shutil.rmtree(target, ignore_errors=True)
    package = Path("torch-ext", "lora_fused")
    shutil.copytree(ROOT / package, target / package, ignore=shutil.ignore_patterns("__pycache__", "_ops.py"))
    shutil.copy2(ROOT / "flake.lock", target)
    (target / "flake.nix").write_text(noarch_flake((ROOT / "flake.nix").read_text(), git_status()))
    (target / "build.toml").write_text(noarch_toml((ROOT / "build.toml").read_text()))
    Build.open(target)


def write_variants(source: Path, target: Path) -> None:
    """The variants of what `write_source` wrote, as this machine lays them out."""
    config, status = tomllib.loads((source / "build.toml").read_text()), git_status()
    origin = {"kernel": status} if status else {}
    for backend in BACKENDS:
        ops_name = build_id(config["general"]["name"], backend, status)
        write_variant(target / f"torch-{backend}", config, backend, ops_name, None, [], origin)
        print(f"built {ops_name} in {target.name}/torch-{backend} (no native code)")


if __name__ == "__main__":
    write_source(SOURCE)
    write_variants(SOURCE, ROOT / "build")
