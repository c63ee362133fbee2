"""Writes README's benchmark tables from the results in benchmarks/results.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
H200 = ROOT / "benchmarks" / "results" / "h200"
README = ROOT / "README.md"
EARLIER = "†"  # marks cases that were last measured with the sources of commit 7a3b825


def cell(result: dict, who: str) -> str:
    """Time and peak memory; a graph's replay has its memory elsewhere than where the peak is read."""
    measured, frozen = result[who], result["frozen"]
    if measured is None:
        return "out of memory"
    time = f"{frozen['ms']:.3g} ms" if who == "frozen" else f"{measured['ms'] / frozen['ms']:.2f}x"
    return time if result.get("graph") else f"{time}, {measured['peak_gb']:.1f} GB"


def read(name: str) -> dict:
    return json.loads((H200 / name).read_text())


def shape_of(result: dict) -> str:
    name = result.get("shape", result["kind"])
    if name == "linear":
        shape = f"{result['k']}→{result['n']}, {result['m']} tokens"
    else:
        shape = f"{name.title()} shape, {result['layers']} layers, {result['batch']}×{result['seq']}"
    options = (("checkpointing", "checkpointing"), ("graph", "in a CUDA graph"), ("forward_only", "forward alone"))
    return ", ".join([shape, *(text for option, text in options if result.get(option))])


def table() -> str:
    """Markdown of every case in the results files."""
    results = read("benchmark_lora.json")["results"]
    results += [{**r, "earlier": True} for r in read("benchmark_lora_7a3b825.json")["results"]]
    lines = ["| Case | Variant | Adapter | Frozen base | lora-fused | PEFT |", "|---|---|---|---|---|---|"]
    for r in results:
        shape = shape_of(r) + (EARLIER if r.get("earlier") else "")
        variant = r["variant"] + (f", r={r['rank']}" if r["rank"] != 32 else "")
        adapter = r["adapter"] + (", autocast" if r["autocast"] else "")
        cells = " | ".join(cell(r, who) for who in ("frozen", "ours", "peft"))
        lines.append(f"| {shape} | {variant} | {adapter} | {cells} |")
    return "\n".join(lines)


def embedding_table() -> str:
    """Markdown of the embeddings' results, and of the norm beside one read of the table."""
    results = read("benchmark_embedding.json")
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
