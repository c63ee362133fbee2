#!/usr/bin/env python3
"""Writes the parts of README.md, CARD.md, CONTRIBUTING.md and docs/*.md that are made from results, tests, docstrings
and the Makefile.

A part stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`; who makes it SECTIONS says. tests/test_pages.py
holds every page against this.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("scripts", "benchmarks", "tests")]

import api_page
import tables
import version_matrix

PAGES = (*(ROOT / name for name in ("README.md", "CARD.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").glob("*.md")))
SUPPORT, BUILD = ROOT / "docs" / "support.md", ROOT / "build.toml"
_PART = re.compile(r"<!-- (?P<name>[a-z ]+): begin -->\n(?P<text>.*?)<!-- (?P=name): end -->", re.DOTALL)


def families() -> str:
    from helpers import family_table

    return family_table.section(family_table.read_table()[1])


def in_short() -> str:
    """The summary of docs/support.md, for the first pages."""
    (found,) = re.findall(r"<!-- in short -->\n(.*?)\n<!-- end of in short -->", SUPPORT.read_text(), re.DOTALL)
    return found


def requirements() -> str:
    """The oldest versions that are accepted, and those that tests have run with."""
    source = (ROOT / "torch-ext" / "lora_fused" / "environment" / "versions.py").read_text()
    wanted = json.loads(re.search(r"^WANTED = (\{.*\})$", source, re.MULTILINE)[1])
    rows = json.loads(version_matrix.RESULTS.read_text())["rows"]
    capabilities = re.findall(r'"([\d.]+)a?"', re.search(r"cuda-capabilities = \[(.*)\]", BUILD.read_text())[1])
    lines = ["| Needs | At least | The test suite has run with |", "|---|---|---|"]
    for name, label in (("torch", "torch"), ("kernels", "kernels"), ("peft", "PEFT"), ("transformers", "transformers")):
        tried = sorted(
            {row[name].split("+")[0] for row in rows}, key=lambda text: [int(part) for part in text.split(".")]
        )
        shown = ", ".join(tried) if len(tried) < 3 else f"{tried[0]} to {tried[-1]}"
        lines.append(f"| {label} | {wanted.get(name, tried[0].removesuffix('.0'))} | {shown} |")
    lines.append(
        f"| NVIDIA GPU | compute capability {capabilities[0]} | H200; compiled for {', '.join(capabilities)} |"
    )
    return "\n".join(lines)


def targets() -> str:
    """What `make help` lists."""
    found = re.findall(r"^([a-z-]+):.*## (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    rows = (f"| `make {name}` | {what} |" for name, what in found)
    return "\n".join(["| Target | What it does |", "|---|---|", *rows])


SECTIONS = {
    "api": api_page.page,
    "benchmark table": tables.table,
    "compiled table": tables.compiled_table,
    "embedding table": tables.embedding_table,
    "families table": families,
    "figures": tables.headline,
    "in short": in_short,
    "peers table": tables.peers_table,
    "qlora table": tables.qlora_table,
    "requirements": requirements,
    "targets": targets,
    "training table": tables.training_table,
    "experts table": tables.experts_table,
    "versions table": lambda: version_matrix.table(json.loads(version_matrix.RESULTS.read_text())),
}


def made(text: str) -> str:
    """A page with its parts made anew."""
    return _PART.sub(
        lambda part: f"<!-- {part['name']}: begin -->\n{SECTIONS[part['name']]()}\n<!-- {part['name']}: end -->", text
    )


def parts_of(text: str) -> list[str]:
    return [part["name"] for part in _PART.finditer(text)]


def main() -> None:
    for page in PAGES:
        text = page.read_text()
        if made(text) != text:
            page.write_text(made(text))
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
