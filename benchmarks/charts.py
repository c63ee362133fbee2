"""Draws the pictures of the docs from benchmarks/results: python benchmarks/charts.py

A picture names the figures that it shows in its metadata, so that a test sees one that is out of date.
"""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

import tables

IMAGES = tables.ROOT / "docs" / "images"
COLORS = {"frozen base": "#9aa0a6", "lora-fused": "#1a73e8", "PEFT": "#e8710a"}
COLORS |= {"frozen base, torch.compile": "#dadce0", "lora-fused, torch.compile": "#8ab4f8"}
COLORS |= {"PEFT, torch.compile": "#f6bf8c"}
_SHORT = "Llama-8B shape, 32 layers, "


class Chart(NamedTuple):
    """title: what was measured. cases: their labels. bars: (milliseconds, gigabytes) of each contender, by case."""

    name: str
    title: str
    cases: tuple[str, ...]
    bars: dict[str, list[tuple[float, float]]]

    @property
    def figures(self) -> str:
        """What is drawn, as text."""
        rounded = {who: [[round(value, 2) for value in pair] for pair in pairs] for who, pairs in self.bars.items()}
        return json.dumps([self.title, self.cases, rounded], ensure_ascii=False)


def _pair(measured: dict) -> tuple[float, float]:
    return measured["ms"], measured["peak_gb"]


def model_chart() -> Chart:
    """The 8B model's steps, with float32 adapters under autocast, as Trainer runs them."""
    chosen = [
        result
        for result in sorted(tables.read("benchmark_lora.json")["results"], key=tables.place)
        if result["kind"] == "llama-8b"
        and result["autocast"]
        and not result.get("graph")
        and result["variant"] in tables.PLAIN
    ]
    cases = tuple(f"{r['variant']}\n{tables.shape_of(r).removeprefix(_SHORT).replace(', ', chr(10))}" for r in chosen)
    who = {"frozen base": "frozen", "lora-fused": "ours", "PEFT": "peft"}
    bars = {label: [_pair(result[key]) for result in chosen] for label, key in who.items()}
    return Chart("step", "Llama-8B shape, 32 layers, r=32, one H200: a training step (forward + backward)", cases, bars)


def compiled_chart() -> Chart:
    """What torch.compile adds; before there are results of compiled layers, eight layers beside compiled PEFT."""
    who = {f"{name}, torch.compile": way for name, way in (("lora-fused", "ours"), ("PEFT", "PEFT"))}
    who = {"frozen base": "frozen, eager", "frozen base, torch.compile": "frozen", "lora-fused": "ours, eager", **who}
    chosen = [r for r in tables.compiled_results() if all("ms" in r.get(way, {}) for way in who.values())]
    if chosen:
        bars = {label: [_pair(result[way]) for result in chosen] for label, way in who.items()}
        cases = tuple(f"{r['variant']}\n{r['base']}, {r['batch']}×{r['seq']}" for r in chosen)
        return Chart("compiled", f"Llama-8B shape, {chosen[0]['layers']} layers, r=32, one H200", cases, bars)
    chosen = [r for r in tables.read("benchmark_peers.json")["results"] if r["kind"] == "llama-8b"]
    bars = {"frozen base": [_pair(result["frozen"]) for result in chosen]}
    for who in ("lora-fused", "PEFT", "PEFT, torch.compile"):
        bars[who] = [_pair(result["peers"][who]) for result in chosen]
    shape = tables.shape_of(chosen[0])
    return Chart("compiled", f"{shape}, r=32, one H200", tuple(r["variant"] for r in chosen), bars)


def charts() -> list[Chart]:
    return [model_chart(), compiled_chart()]


def path_of(chart: Chart) -> pathlib.Path:
    return IMAGES / f"{chart.name}.svg"


def draw(chart: Chart) -> None:
    """Two panels: milliseconds and peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": chart.name, "font.size": 9}):
        figure, panels = pyplot.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
        width = 0.8 / len(chart.bars)
        for panel, index, unit in zip(panels, (0, 1), ("ms a step", "GB at the peak")):
            for place, (who, pairs) in enumerate(chart.bars.items()):
                positions = [case + (place - (len(chart.bars) - 1) / 2) * width for case in range(len(pairs))]
                drawn = panel.bar(positions, [pair[index] for pair in pairs], width, label=who, color=COLORS[who])
                panel.bar_label(drawn, fmt="%.0f" if index == 0 else "%.1f", fontsize=7)
            panel.set_xticks(range(len(chart.cases)), chart.cases, fontsize=7)
            panel.set_ylabel(unit)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].legend(frameon=False)
        figure.suptitle(chart.title, fontsize=10)
        IMAGES.mkdir(exist_ok=True)
        figure.savefig(path_of(chart), metadata={"Date": None, "Description": chart.figures})
        pyplot.close(figure)


if __name__ == "__main__":
    for each in charts():
        draw(each)
        print(path_of(each).relative_to(tables.ROOT))
