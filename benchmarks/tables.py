"""The tables of figures in README.md, CARD.md and docs/benchmarks.md, from the results in benchmarks/results.

`python scripts/pages.py` puts them there."""

from __future__ import annotations

import json
import pathlib
import textwrap

ROOT = pathlib.Path(__file__).resolve().parent.parent
H200 = ROOT / "benchmarks" / "results" / "h200"
PLAIN = ("LoRA", "DoRA")
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
        variant = "DoRA" if r["dora"] else "LoRA"
        cells = [
            r["hidden"],
            variant,
            r["adapter"],
            r["tokens"],
            *cells,
            f"{theirs['ms'] / ours['ms']:.2f}x",
            in_a_graph(r),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| H | Adapter | DoRA's norm | One read of the table | Ratio |", "|---|---|---|---|---|"]
    for n in results["norm"]:
        ratio = n["norm_ms"] / n["floor_ms"]
        lines.append(
            f"| {n['hidden']} | {n['adapter']} | {n['norm_ms']:.3f} ms | {n['floor_ms']:.3f} ms | {ratio:.2f}x |"
        )
    return "\n".join(lines)


def headline() -> str:
    """What a user gains in three cases of an 8B model, and what torch.compile adds."""
    lines = ["| Training step, one H200, r=32 | lora-fused | PEFT | lora-fused / PEFT |", "|---|---|---|---|"]
    results = {(shape_of(r), r["variant"], r["autocast"]): r for r in read("benchmark_lora.json")["results"]}
    for variant in PLAIN:
        r = results["Llama-8B shape, 32 layers, 4×2048", variant, True]
        lines.append(_headline_row(f"8B, {variant}, 4×2048 tokens", r["ours"], r["peft"]))
    qlora = next(r for r in read("benchmark_qlora.json")["results"] if r["kind"] == "llama-8b")
    lines.append(_headline_row("8B in NF4 (QLoRA), LoRA, 1×2048 tokens", qlora["ours"], qlora["peft"]))
    lines += ["", *textwrap.wrap(_compiled_note(), 120, break_on_hyphens=False)]
    return "\n".join(lines)


def _headline_row(case: str, ours: dict, theirs: dict) -> str:
    cells = [f"{m['ms']:.0f} ms, {m['peak_gb']:.1f} GB" for m in (ours, theirs)]
    time, memory = (ours[key] / theirs[key] for key in ("ms", "peak_gb"))
    return f"| {case} | {cells[0]} | {cells[1]} | {time:.2f}x time, {memory:.2f}x memory |"


def peers_table() -> str:
    """Each way to run the same adapter, times the frozen base; ways that are not installed have no row."""
    lines = ["| Case | Adapter | Frozen base | Way | Time | Peak memory |", "|---|---|---|---|---|---|"]
    for r in read("benchmark_peers.json")["results"]:
        case, adapter = f"{shape_of(r)}, {r['variant']}", r["adapter"] + (", autocast" if r["autocast"] else "")
        frozen = f"{r['frozen']['ms']:.3g} ms, {r['frozen']['peak_gb']:.1f} GB"
        for who, measured in r["peers"].items():
            if "failed" not in measured:
                time, memory = measured["ms"] / r["frozen"]["ms"], measured["peak_gb"]
                lines.append(f"| {case} | {adapter} | {frozen} | {who} | {time:.2f}x | {memory:.1f} GB |")
    return "\n".join(lines)


def qlora_table() -> str:
    """Medians and in brackets the fastest step."""
    lines = ["| | Frozen, bitsandbytes | lora-fused | PEFT |", "|---|---|---|---|"]
    for r in read("benchmark_qlora.json")["results"]:
        if r["kind"] == "llama-8b" and not r["graph"]:
            adapter = f"{r['adapter']} adapters" + (", autocast" if r["autocast"] else "")
            cells = [
                f"{m['ms']:.0f} ms ({m['min_ms']:.0f}), {m['peak_gb']:.1f} GB"
                for m in (r["frozen"], r["ours"], r["peft"])
            ]
            lines.append(f"| {r['variant']}, {adapter} | {' | '.join(cells)} |")
    return "\n".join(lines)


COMPILED = "benchmark_compiled.json"
# Titles of the columns, and what compare_compiled.py calls them.
COMPILED_WAYS = {
    "Frozen, eager": "frozen, eager",
    "Frozen, compiled": "frozen",
    "lora-fused, eager": "ours, eager",
    "lora-fused, compiled": "ours",
    "lora-fused, with options": "ours, options",
    "PEFT, compiled": "PEFT",
}


def compiled_results() -> list[dict]:
    """Cases of which the compiled frozen model has a time, which all others are compared with; none before there is a
    results file."""
    results = read(COMPILED)["results"] if (H200 / COMPILED).exists() else []
    return [result for result in results if "ms" in result.get("frozen", {})]


def compiled_table() -> str:
    """Markdown of every case that was compiled: milliseconds, and time and peak memory over the compiled frozen
    model's."""
    found = compiled_results()
    if not found:
        return "No results yet: `python benchmarks/run.py compiled`."
    lines = [f"| Case | {' | '.join(COMPILED_WAYS)} |", "|---|" + "---|" * len(COMPILED_WAYS)]
    for r in found:
        base = "" if r["base"] == "bf16" else f", {r['base'].upper()} base"
        case = f"{r['variant']}{base}, {r['layers']} layers, {r['batch']}×{r['seq']}"
        cells = (_compiled_cell(r.get(way), r["frozen"]) for way in COMPILED_WAYS.values())
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _compiled_cell(measured: dict | None, frozen: dict) -> str:
    if measured is None:
        return "-"
    if "failed" in measured:
        return measured["failed"]
    cell = f"{measured['ms']:.3g} ms"
    if measured is not frozen:
        time, memory = (measured[key] / frozen[key] for key in ("ms", "peak_gb"))
        cell += f" ({time:.2f}x), {memory:.2f}x"
    else:
        cell += f", {measured['peak_gb']:.1f} GB"
    return cell if "graphs" not in measured else f"{cell}, {measured['graphs']}/{measured['graph_breaks']}"


def compiled_lora() -> dict | None:
    """The case that the first pages show: LoRA of one row, where it has a time every way."""
    chosen = (r for r in compiled_results() if (r["variant"], r["base"], r["batch"]) == ("LoRA", "bf16", 1))
    result = next(chosen, None)
    return result if result and all("ms" in result.get(way, {}) for way in ("ours", "PEFT")) else None


def _compiled_note() -> str:
    note = "`torch.compile` fuses what is not LoRA. Kernelized layers are traced by it, so a compiled model has both"
    r = compiled_lora()
    if r is None:
        return f"{note}."
    ms = [r[way]["ms"] for way in ("frozen", "ours", "PEFT")]
    return (
        f"{note}. {r['layers']} layers of that shape, LoRA, {r['batch']}×{r['seq']}, all compiled: {ms[1]:.1f} ms "
        f"({ms[1] / ms[0]:.2f}x of the frozen model), PEFT {ms[2]:.1f} ({ms[2] / ms[0]:.2f}x)."
    )


TRAINING = ("benchmark_training.json", "benchmark_training_compiled.json", "benchmark_training_fsdp.json")


def training_table() -> str:
    """Each way to train, of those runs that there are results of."""
    found = [result for name in TRAINING if (H200 / name).exists() for result in read(name)["results"]]
    if not found:
        return "No results yet: `python benchmarks/run.py training training_compiled training_fsdp`."
    lines = [
        "| Case | Base | Way | Step | Tokens a second | Peak memory | Loss, first and last |",
        "|---|" + "---|" * 6,
    ]
    for r in found:
        gpus = f", {r['world']} GPUs, FSDP2" if r["world"] > 1 else ""
        case = f"{r['layers']} layers, {r['world']}×{r['seq']}{gpus} | {r['base']}"
        lines += [f"| {case} | {way} | {_training_cells(measured)} |" for way, measured in r["ways"].items()]
    return "\n".join(lines)


def experts_table() -> str:
    """Each shape and number of tokens: the frozen layer's time, and the others' over it; of decoding the faster of
    the frozen layer's implementations."""
    lines = [
        "| Layer | Tokens | Frozen | PEFT | lora-fused | Saved: frozen, PEFT, lora-fused |",
        "|---|---|---|---|---|---|",
    ]
    cases: dict[tuple, list[dict]] = {}
    for r in read("compare_experts.json")["rows"]:
        cases.setdefault((r["kind"], r["shape"], r["tokens"]), []).append(r)
    for (kind, shape, tokens), rows in sorted(cases.items(), key=lambda case: case[0][0], reverse=True):
        frozen = min((r for r in rows if r["variant"].startswith("frozen")), key=lambda r: r["ms"])
        theirs, ours = (next(r for r in rows if r["variant"].startswith(who)) for who in ("PEFT", "lora-fused"))
        ratios = " | ".join(f"{r['ms'] / frozen['ms']:.2f}x" for r in (theirs, ours))
        saved = ", ".join(f"{r['saved_gb']:.2f}" for r in (frozen, theirs, ours)) + " GB" if kind == "training" else ""
        lines.append(f"| {shape}, {kind} | {tokens} | {frozen['ms']:.2f} ms | {ratios} | {saved} |")
    return "\n".join(lines)


def _training_cells(measured: dict) -> str:
    if "failed" in measured:
        return f"{measured['failed']} | | |"
    time, speed = f"{measured['ms']:.0f} ms", f"{measured['tokens_per_s']:.0f}"
    first, last = measured["losses"][0], measured["losses"][-1]
    return f"{time} | {speed} | {measured['peak_gb']:.1f} GB | {first:.3f}, {last:.3f}"
