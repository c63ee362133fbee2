"""The tables and pictures of the docs, made from files of results."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import charts
import lora_cases
import tables


def test_tables_name_the_new_kinds():
    small, high = lora_cases.small_cases(10), lora_cases.high_rank_cases(10)
    assert tables.shape_of(small[0]) == "4096→4096, 1 tokens, forward alone"
    assert tables.shape_of(small[-1]) == "Llama-1B shape, 16 layers, 1×512, forward alone"
    assert tables.shape_of(high[1]) == "8192→8192, 4096 tokens"


def compiled_rows(*results):
    """A results file of compare_compiled.py in the place of the H200's."""
    common = dict(kind="llama-8b", variant="LoRA", layers=32, batch=1, seq=2048, base="bf16")
    return json.dumps({"environment": {}, "results": [{**common, **result} for result in results]})


def timed(ms, gb, *graphs):
    return dict(ms=ms, peak_gb=gb, **dict(zip(("graphs", "graph_breaks"), graphs)))


LORA = {
    "frozen, eager": timed(140.0, 24.0),
    "frozen": timed(100.0, 20.0, 1, 0),
    "ours, eager": timed(150.0, 23.0),
    "ours": timed(105.0, 21.0, 2, 0),
    "ours, options": timed(104.6, 21.0, 2, 0),
    "PEFT": timed(120.0, 24.0, 3, 25),
}
NF4 = {
    **LORA,
    "base": "nf4",
    "ours": timed(102.0, 20.4, 1, 0),
    "PEFT": {"failed": "OutOfMemoryError: no"},
}
del NF4["ours, options"]


@pytest.fixture
def results_file(tmp_path, monkeypatch):
    """Writes the H200's results of compiled layers; the others are as they are."""

    def write(*results):
        for path in tables.H200.glob("*.json"):
            if path.name != tables.COMPILED:
                (tmp_path / path.name).symlink_to(path)
        if results:
            (tmp_path / tables.COMPILED).write_text(compiled_rows(*results))
        monkeypatch.setattr(tables, "H200", tmp_path)

    return write


def test_compiled_table(results_file):
    results_file({"failed": "not PEFT's result"}, LORA, NF4)
    lines = tables.compiled_table().splitlines()
    ways = "Frozen, eager | Frozen, compiled | lora-fused, eager | lora-fused, compiled | lora-fused, with options"
    assert lines[0] == f"| Case | {ways} | PEFT, compiled |" and len(lines) == 4
    assert lines[2] == (
        "| LoRA, 32 layers, 1×2048 | 140 ms (1.40x), 1.20x | 100 ms, 20.0 GB, 1/0 | 150 ms (1.50x), 1.15x "
        "| 105 ms (1.05x), 1.05x, 2/0 | 105 ms (1.05x), 1.05x, 2/0 | 120 ms (1.20x), 1.20x, 3/25 |"
    )
    assert lines[3] == (
        "| LoRA, NF4 base, 32 layers, 1×2048 | 140 ms (1.40x), 1.20x | 100 ms, 20.0 GB, 1/0 | 150 ms (1.50x), 1.15x "
        "| 102 ms (1.02x), 1.02x, 1/0 | - | OutOfMemoryError: no |"
    )


def test_what_compiling_adds_is_said_with_figures_where_there_are_some(results_file):
    results_file(NF4, LORA)
    text = " ".join(tables.headline().split())
    expected = (
        "32 layers of that shape, LoRA, 1×2048, all compiled: 105.0 ms (1.05x of the frozen model), PEFT 120.0 (1.20x)."
    )
    assert text.endswith(expected)
    chart = charts.compiled_chart()
    assert "32 layers" in chart.title and chart.cases == ("LoRA\nbf16, 1×2048",)  # in NF4 PEFT has no time
    assert chart.bars["lora-fused, torch.compile"] == [(105.0, 21.0)] and set(chart.bars) <= set(charts.COLORS)


@pytest.mark.parametrize("results", ((), ({"failed": "no"},), ({**LORA, "frozen": {"failed": "no"}},)))
def test_before_there_are_results_of_compiled_layers(results_file, results):
    results_file(*results)
    assert tables.compiled_table() == "No results yet: `python benchmarks/run.py compiled`."
    assert tables.headline().endswith("has both.") and "all compiled" not in tables.headline()
    assert "8 layers" in charts.compiled_chart().title
