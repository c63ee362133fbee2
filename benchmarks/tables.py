"""Writes README's benchmark table from the results in benchmarks/results.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "h200" / "benchmark_lora.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmark table: begin -->", "<!-- benchmark table: end -->"


def cell(measured: dict | None, frozen: dict) -> str:
    if measured is None:
        return "out of memory"
    return f"{measured['ms'] / frozen['ms']:.2f}x, {measured['peak_gb']:.1f} GB"


def table() -> str:
    """Markdown of every case in the results file."""
    results = json.loads(RESULTS.read_text())["results"]
    lines = ["| Case | Variant | Adapter | Frozen base | lora-fused | PEFT |", "|---|---|---|---|---|---|"]
    for r in results:
        if r["kind"] == "linear":
            shape = f"{r['k']}→{r['n']}, {r['m']} tokens"
        else:
            shape = f"Llama-8B shape, {r['layers']} layers, {r['batch']}×{r['seq']}"
            shape += ", checkpointing" if r.get("checkpointing") else ""
        adapter = r["adapter"] + (", autocast" if r["autocast"] else "")
        frozen = r["frozen"]
        base = f"{frozen['ms']:.3g} ms, {frozen['peak_gb']:.1f} GB"
        lines.append(
            f"| {shape} | {r['variant']} | {adapter} | {base} | {cell(r['ours'], frozen)} | {cell(r['peft'], frozen)} |"
        )
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """README's text with the table between its markers made anew."""
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
