"""The oldest versions that the layers work with, checked before anything is mapped."""

from __future__ import annotations

import importlib
import importlib.metadata

WANTED = {"kernels": "0.17", "peft": "0.18", "torch": "2.11"}


def check() -> None:
    """Raises one ImportError that names every package which is missing, too old or cannot be imported, with the command
    that installs what is wanted. Development versions count as the release that they lead to."""
    problems = {name: problem for name, minimum in WANTED.items() if (problem := _problem(name, minimum))}
    if not problems:
        return
    found = "; ".join(f"{name} >= {WANTED[name]} is wanted, {problem}" for name, problem in problems.items())
    packages = " ".join(f'"{name}>={WANTED[name]}"' for name in problems)
    raise ImportError(f"lora_fused: {found}. Nothing was mapped. Run: pip install --upgrade {packages}")


def _problem(name: str, minimum: str) -> str | None:
    """What is wrong with a package; None where it is new enough or does not say what it is."""
    failure = None
    try:
        version = importlib.import_module(name).__version__
    except Exception as error:  # beside newer packages an old one may fail in any way
        version, failure = _installed(name), error
    if version is None:
        return "it is not installed" if getattr(failure, "name", None) == name else f"it {_described(failure)}"
    if _is_older(version, minimum):
        return f"{version} is installed"
    return f"{version} is installed but {_described(failure)}" if failure else None


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _described(failure: Exception) -> str:
    return f"cannot be imported ({type(failure).__name__}: {failure})"


def _is_older(version: str, minimum: str) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version).release < Version(minimum).release
    except InvalidVersion:
        return False
