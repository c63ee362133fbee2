"""Writes README's benchmark tables from the results in benchmarks/results.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "h200" / "benchmark_lora.json"
README = ROOT / "README.md"
EMBEDDINGS = ROOT / "benchmarks" / "results" / "h100" / "benchmark_embedding.json"


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
            shape += ", checkpointing" if r.get("checkpointing") else ", in a CUDA graph" if r.get("graph") else ""
        adapter = r["adapter"] + (", autocast" if r["autocast"] else "")
        frozen = r["frozen"]
        base = f"{frozen['ms']:.3g} ms, {frozen['peak_gb']:.1f} GB"
        lines.append(
            f"| {shape} | {r['variant']} | {adapter} | {base} | {cell(r['ours'], frozen)} | {cell(r['peft'], frozen)} |"
        )
    return "\n".join(lines)


def embedding_table() -> str:
    """Markdown of the embeddings' results, and of the norm beside one read of the table."""
    results = json.loads(EMBEDDINGS.read_text())
    lines = ["| H | Variant | Adapter | Tokens | lora-fused | PEFT | PEFT / lora-fused |", "|---|---|---|---|---|---|---|"]
    for r in results["results"]:
        ours, theirs = r["ours"], r["peft"]
        cells = [f"{m['ms']:.2f} ms, {m['peak_gb']:.2f} GB" for m in (ours, theirs)]
        lines.append(
            f"| {r['hidden']} | {'DoRA' if r['dora'] else 'LoRA'} | {r['adapter']} | {r['tokens']} | {cells[0]} | {cells[1]} "
            f"| {theirs['ms'] / ours['ms']:.2f}x |"
        )
    lines += ["", "| H | Adapter | DoRA's norm | One read of the table | Ratio |", "|---|---|---|---|---|"]
    for n in results["norm"]:
        ratio = n["norm_ms"] / n["floor_ms"]
        lines.append(f"| {n['hidden']} | {n['adapter']} | {n['norm_ms']:.3f} ms | {n['floor_ms']:.3f} ms | {ratio:.2f}x |")
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """README's text with the tables between their markers made anew."""
    for name, made in (("benchmark", table), ("embedding", embedding_table)):
        begin, end = f"<!-- {name} table: begin -->", f"<!-- {name} table: end -->"
        head, rest = readme.split(begin)
        readme = f"{head}{begin}\n{made()}\n{end}{rest.split(end)[1]}"
    return readme


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
