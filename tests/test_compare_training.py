"""The benchmark of training on small shapes, on the CPU, and its table."""

import argparse
import json
import re
import subprocess
import sys
import types

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import compare_training
import first_step
import tables


@pytest.fixture
def training(monkeypatch, tmp_path):
    """The rows of a run on small shapes."""

    def run(*options):
        out = tmp_path / "training.json"
        given = ["--tiny", "--steps", "1", "--base", "bf16", *options, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["compare_training.py", *given])
        compare_training.main()
        return json.loads(out.read_text())["results"]

    return run


def test_training_is_compared(lora_fused, training, capsys, monkeypatch):
    """Each contender has a time, and the same losses; the frozen base learns nothing."""
    monkeypatch.setattr(compare_training, "LEARNING_RATE", 2e-4)  # of so small a model
    results = training()
    assert [row["seq"] for row in results] == [32, 64]
    for row in results:
        frozen, theirs, ours = (row["ways"][way] for way in ("frozen base", "PEFT", "lora-fused"))
        assert all(found["ms"] > 0 and len(found["losses"]) == 4 for found in (frozen, theirs, ours))
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=5e-3)
        first, last = (frozen["losses"][i] - theirs["losses"][i] for i in (0, -1))
        assert last > first + 1e-3
    assert "tokens/s" in capsys.readouterr().out


def test_training_that_is_not_pefts_has_no_speed(lora_fused, training, monkeypatch):
    own = compare_training.train

    def wrong(model, rows, device):
        found = own(model, rows, device)
        ours = any("forward" in vars(module) for module in model.modules())
        return {**found, "losses": [loss + 0.1 * ours for loss in found["losses"]]}

    monkeypatch.setattr(compare_training, "train", wrong)
    ways = training()[0]["ways"]
    assert ways["lora-fused"]["failed"].startswith("not PEFT's losses") and "ms" in ways["PEFT"]


def test_training_that_is_not_fused_has_no_speed(lora_fused, training, monkeypatch):
    monkeypatch.setattr(compare_training.kernels, "get_local_kernel", lambda _: unapplied)
    unapplied = types.SimpleNamespace(apply=lambda model: model, record=lora_fused.record)
    assert training()[0]["ways"]["lora-fused"]["failed"].startswith("not all of it is fused: 0 fused calls, 0 of")


def test_training_on_a_base_in_four_bits(lora_fused, training):
    pytest.importorskip("bitsandbytes")
    (row, _) = training("--base", "NF4")
    assert row["ways"]["lora-fused"]["losses"] == pytest.approx(row["ways"]["PEFT"]["losses"], abs=5e-3)


def test_training_on_what_is_not_installed_says_so(lora_fused, training, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (row, _) = training("--base", "NF4")
    assert all("bitsandbytes" in found["failed"] for found in row["ways"].values())


def test_ways_of_training():
    options = argparse.Namespace(fsdp=False, compiled=True)
    assert compare_training.ways_of(options)[0] == "frozen base" and len(compare_training.ways_of(options)) == 5
    assert compare_training.ways_of(argparse.Namespace(fsdp=True, compiled=False)) == ["PEFT", "lora-fused"]


@pytest.mark.slow
def test_sharded_training_is_compared(lora_fused, tmp_path):
    out = tmp_path / "training.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [ROOT / "benchmarks" / "compare_training.py", "--tiny", "--fsdp", "--steps", "1", "--out", out]
    subprocess.run(command, check=True, timeout=300)
    results = json.loads(out.read_text())["results"]
    assert len(results) == 4 and all(row["world"] == 2 for row in results)
    for row in results:
        assert row["ways"]["lora-fused"]["losses"] == pytest.approx(row["ways"]["PEFT"]["losses"], abs=5e-3)


def test_the_table_of_training(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "H200", tmp_path)
    assert tables.training_table().startswith("No results yet")
    measured = dict(ms=1234.5, tokens_per_s=6636.0, peak_gb=61.26, losses=[11.8, 11.2, 10.123])
    case = dict(kind="llama-8b", layers=32, batch=1, base="NF4", seq=8192, world=2)
    rows = [dict(case, ways={"PEFT": dict(failed="out of memory"), "lora-fused": measured})]
    (tmp_path / "benchmark_training_fsdp.json").write_text(json.dumps(dict(environment={}, results=rows)))
    lines = tables.training_table().splitlines()
    head = "| 32 layers, 2×8192, 2 GPUs, FSDP2 | NF4 |"
    assert lines[2:] == [
        f"{head} PEFT | out of memory | | | |",
        f"{head} lora-fused | 1234 ms | 6636 | 61.3 GB | 11.800, 10.123 |",
    ]
    assert {line.count("|") for line in lines} == {8}


def test_a_first_step(lora_fused, monkeypatch, capsys):
    """Each way begins with the same loss and learns; bfloat16 keeps less of it than float32."""
    monkeypatch.setattr(sys, "argv", ["first_step.py", "--tiny"])
    first_step.main()
    found = [
        [float(number) for number in re.findall(r"-?\d+\.\d+", line)] for line in capsys.readouterr().out.splitlines()
    ]
    (before, _, exact), *rounded = found
    assert len(rounded) == 2 and exact > 0
    for own_before, _, fall in rounded:
        assert own_before == pytest.approx(before, abs=2e-3) and 0 < fall < exact
