"""Whether the installed files are those that were built, asked before the native library is opened.

The loader maps a library into memory as it is: one that was cut short ends the process, one with other bytes runs. The
digest in `metadata.json` says what every file was. The standard library alone, since nothing else is loaded yet.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple

METADATA = "metadata.json"
_ALGORITHMS = ("sha256", "sha512")  # that `kernels` knows
_LIBRARY_SUFFIXES = (".so", ".pyd", ".dll", ".dylib")


class _Digest(NamedTuple):
    """What `kernels` writes: a hash's name, and of every file, by its path below the package, the hash in base64."""

    algorithm: str
    files: dict[str, bytes]


def check(package: Path) -> None:
    """Compares the files of `package` with the digest in its `metadata.json`.

    A native library that is missing, cannot be read or differs raises ImportError, with its path as `path`, and so does
    a `metadata.json` that cannot be read. Any other file that is missing or differs, and a `.py` file that is not in
    the digest, is a warning. Without a `metadata.json`, or a digest in it, there is no check.
    """
    digest = _read_digest(package / METADATA)
    if digest is None:
        return
    if digest.algorithm not in _ALGORITHMS:
        where = package / METADATA
        warnings.warn(
            f"lora_fused: files are not checked, since {where} has a digest of unknown kind {digest.algorithm!r}",
            stacklevel=2,
        )
        return
    changed = []
    for name, expected in digest.files.items():
        problem = _problem(package / name, digest.algorithm, expected)
        if problem and name.endswith(_LIBRARY_SUFFIXES):
            raise _damaged(package / name, problem)
        if problem:
            changed.append(f"{name} {problem}")
    changed += [f"{name} is new" for name in _sources(package) if name not in digest.files]
    if changed:
        files = "; ".join(changed)
        warnings.warn(
            f"lora_fused: files in {package} are not as built: {files}. If nobody edited them, {_remedy(package)}",
            stacklevel=2,
        )


def _read_digest(path: Path) -> _Digest | None:
    if not os.path.lexists(path):  # a link to nowhere is damage
        return None
    try:
        digest = json.loads(path.read_text(encoding="utf-8")).get("digest")
        if digest is None:
            return None
        files = {str(name): base64.b64decode(value, validate=True) for name, value in digest["files"].items()}
        return _Digest(str(digest["algorithm"]), files)
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None
    except (ValueError, AttributeError, KeyError, TypeError, binascii.Error) as error:
        raise _damaged(path, f"is malformed ({type(error).__name__}: {error})") from None


def _problem(path: Path, algorithm: str, expected: bytes) -> str | None:
    """What is wrong with a file; None where it is as built."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if hashlib.new(algorithm, content).digest() == expected:
        return None
    return f"has other contents than when it was built ({len(content)} bytes)" if content else "is empty"


def _sources(package: Path) -> list[str]:
    """The `.py` files of the package, as the digest names them."""
    return [path.relative_to(package).as_posix() for path in sorted(package.rglob("*.py"))]


def _damaged(path: Path, problem: str) -> ImportError:
    return ImportError(f"lora_fused: {path} {problem}. To repair it, {_remedy(path.parent)}", path=str(path))


def _remedy(package: Path) -> str:
    """In the Hub's cache a snapshot links to files that a second download would find and take as they are."""
    for folder in package.parents:
        if folder.name == "snapshots":
            return f"delete {folder.parent} and load the kernel again, which downloads it anew."
    return "build the kernel again or copy its folder again."
