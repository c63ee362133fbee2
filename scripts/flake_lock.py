#!/usr/bin/env python3
"""Recompute hashes of flake.lock from clones of the inputs, without Nix.

    python scripts/flake_lock.py kernel-builder=PATH [systems=PATH ...]

PATH is a git clone that has the locked commit. An input's `narHash` is the SHA-256 of its tree in Nix's archive format:
strings with their length before them and padded to 8 bytes, folders sorted by name.
"""

import argparse
import base64
import hashlib
import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "flake.lock"


def nar_hash(tree: Path) -> str:
    """`sha256-…` of a folder, as Nix writes it."""
    digest = hashlib.sha256()

    def put(*strings: bytes) -> None:
        for string in strings:
            digest.update(struct.pack("<Q", len(string)) + string + b"\0" * (-len(string) % 8))

    def node(path: Path) -> None:
        put(b"(", b"type")
        if path.is_symlink():
            put(b"symlink", b"target", os.fsencode(os.readlink(path)))
        elif path.is_dir():
            put(b"directory")
            for name in sorted(map(os.fsencode, os.listdir(path))):
                put(b"entry", b"(", b"name", name, b"node")
                node(path / os.fsdecode(name))
                put(b")")
        else:
            put(b"regular", *((b"executable", b"") if path.stat().st_mode & 0o100 else ()), b"contents")
            put(path.read_bytes())
        put(b")")

    put(b"nix-archive-1")
    node(tree)
    return "sha256-" + base64.b64encode(digest.digest()).decode()


def hash_of_commit(repository: Path, commit: str) -> str:
    """`nar_hash` of what a commit's archive holds."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as archive:
        done = subprocess.run(["git", "-C", repository, "archive", commit], stdout=archive, stderr=subprocess.PIPE)
        if done.returncode != 0:
            sys.exit(f"flake-lock: {repository} has no commit {commit} ({done.stderr.decode().strip()})")
        archive.seek(0)
        with tarfile.open(fileobj=archive) as tar:
            tar.extractall(folder, filter="tar")
        return nar_hash(Path(folder))


def main() -> None:
    nodes = json.loads(LOCK.read_text())["nodes"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sources", nargs="+", metavar="NAME=PATH", help=f"of {', '.join(sorted(set(nodes) - {'root'}))}"
    )
    failed = False
    for source in parser.parse_args().sources:
        name, _, path = source.partition("=")
        if name not in nodes or not path:
            parser.error(f"{source!r} is no NAME=PATH of an input")
        locked = nodes[name]["locked"]
        found = hash_of_commit(Path(path), locked["rev"])
        same = found == locked["narHash"]
        print(f"{name} {locked['rev'][:7]}: {'as locked' if same else 'is ' + found + ', locked ' + locked['narHash']}")
        failed |= not same
    sys.exit(failed)


if __name__ == "__main__":
    main()
