"""Writes README's benchmark tables from the results in benchmarks/results.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
H200 = ROOT / "benchmarks" / "results" / "h200"
README = ROOT / "README.md"
KINDS = ("llama-8b", "high-rank", "linear", "small")


def cell(result: dict, who: str) -> str:
    """Time and peak memory; a graph's replay has its memory elsewhere than where the peak is read."""
    if "failed" in result:
        return result["failed"]
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


def place(result: dict) -> tuple:
    """Where a case stands in the table."""
    options = (result.get(name, False) for name in ("checkpointing", "graph", "forward_only"))
    sizes = (result.get(name, 0) for name in ("batch", "m", "k", "n"))
    return KINDS.index(result["kind"]), result.get("shape", result["kind"]), *options, *sizes


def table() -> str:
    """Markdown of every case in the results file."""
    lines = ["| Case | Variant | Adapter | Frozen base | lora-fused | PEFT |", "|---|---|---|---|---|---|"]
    for r in sorted(read("benchmark_lora.json")["results"], key=place):
        variant = r["variant"] + (f", r={r['rank']}" if r["rank"] != 32 else "")
        adapter = r["adapter"] + (", autocast" if r["autocast"] else "")
        cells = [shape_of(r), variant, adapter, *(cell(r, who) for who in ("frozen", "ours", "peft"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_a_graph(r: dict) -> str:
    """The time of the GPU alone, and how many times that PEFT takes."""
    ours, theirs = r["ours"]["graph_ms"], r["peft"]["graph_ms"]
    return f"{ours:.2f} ms, {theirs / ours:.2f}x"


def embedding_table() -> str:
    """Markdown of the embeddings' results, and of the norm beside one read of the table."""
    results = read("benchmark_embedding.json")
    columns = ("H", "Variant", "Adapter", "Tokens", "lora-fused", "PEFT", "PEFT / lora-fused", "in a CUDA graph")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for r in results["results"]:
        ours, theirs = r["ours"], r["peft"]
        cells = [f"{m['ms']:.2f} ms, {m['peak_gb']:.2f} GB" for m in (ours, theirs)]
        lines.append(
            f"| {r['hidden']} | {'DoRA' if r['dora'] else 'LoRA'} | {r['adapter']} | {r['tokens']} "
            f"| {cells[0]} | {cells[1]} | {theirs['ms'] / ours['ms']:.2f}x | {in_a_graph(r)} |"
        )
    lines += ["", "| H | Adapter | DoRA's norm | One read of the table | Ratio |", "|---|---|---|---|---|"]
    for n in results["norm"]:
        ratio = n["norm_ms"] / n["floor_ms"]
        lines.append(
            f"| {n['hidden']} | {n['adapter']} | {n['norm_ms']:.3f} ms | {n['floor_ms']:.3f} ms | {ratio:.2f}x |"
        )
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
