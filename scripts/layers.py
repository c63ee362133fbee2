#!/usr/bin/env python3
"""The layers of the package: what may import what. Writes the picture of them in docs/design.md (--write) or prints it.

tests/test_structure.py holds the imports, and the picture, against LAYERS.
"""

from __future__ import annotations

import argparse
import ast
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "torch-ext" / "lora_fused"
DESIGN = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- layers: written by scripts/layers.py -->\n", "<!-- end of layers -->\n"

# From the top down. A room is a module or a folder of the package; it imports rooms of lower layers alone.
LAYERS = (
    {"__init__": "the public names"},
    {"binding": "binds our forwards on a model's adapted modules alone, and takes them away: apply(), restore()"},
    {"explanation": "what runs and why, and what ran: explain(), record()"},
    {"mapping": "which class gets which layer, for kernelize"},
    {"layers": "the forwards that kernelize binds"},
    {
        "shared_input": "modules that are called with one input run as one group",
        "compiled": "the forwards that torch.compile traces, and the merge of siblings in its graphs",
    },
    {"functional": "public functions on tensors, their input errors, and the dispatch to a Function"},
    {"autograd": "the Functions, native and eager"},
    {
        "peft": "what PEFT's modules hold, and whether another tool has replaced a part of them",
        "quantization": "quantized base weights, one file a format",
    },
    {"backends": "who computes: native ops, Triton, plain PyTorch"},
    {
        "specs": "descriptions of projections, groups and embeddings",
        "last_call": "what the last call of each module ran",
    },
    {
        "call_context": "autocast and device of a call",
        "environment": "the package's files, and versions of peft, kernels and torch",
        "_ops": "the library, written by the build",
    },
)
LAYER_OF = {room: number for number, layer in enumerate(LAYERS) for room in layer}


def files() -> list[pathlib.Path]:
    """The package's modules."""
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: pathlib.Path) -> str:
    """The module or folder of the package that a file is or lies in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: pathlib.Path) -> tuple[str, ...]:
    """Its parts below the package; a folder's `__init__` is the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def imports(path: pathlib.Path) -> Iterator[tuple[str, ...]]:
    """Modules of this package that a file imports anywhere, each as its parts."""
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (tuple(node.module.split(".")) if node.module else ())
            for alias in node.names:
                full = (*base, alias.name)
                inside = PACKAGE.joinpath(*full)
                yield full if inside.with_suffix(".py").exists() or inside.is_dir() or not base else base


def picture() -> str:
    """Each layer's rooms, what they are for, and the rooms that they import."""
    found: dict[str, set[str]] = {room: set() for room in LAYER_OF}
    for path in files():
        found[room_of(path)] |= {target[0] for target in imports(path)} - {room_of(path)}
    lines = []
    for layer in LAYERS:
        lines.append("-" * 100)
        for room, purpose in layer.items():
            lines.append(f"{room:<14}{purpose}")
            below = sorted(found[room], key=lambda name: (LAYER_OF[name], name))
            if below:
                lines.append(f"{'':<14}-> {', '.join(below)}")
    return "\n".join(["```text", *lines, "-" * 100, "```", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write it in docs/design.md")
    if not parser.parse_args().write:
        print(picture())
        return
    text = DESIGN.read_text()
    head, rest = text.split(BEGIN)
    DESIGN.write_text(head + BEGIN + picture() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
