"""The blocks of docs/usage.md as they stand there, with a small model; the scripts of examples/ in two processes."""

import os
import re
import runpy
import subprocess
import sys
import warnings

import accelerate
import pytest
import torch
from conftest import ROOT
from helpers.checkpoints import save_checkpoint
from helpers.kernelizing import explain, forwards

USAGE = ROOT / "docs" / "usage.md"
RECIPES = dict(re.findall(r"<!-- recipe: (\w+) -->\n```python\n(.*?)```", USAGE.read_text(), re.DOTALL))
NEEDS = {"trl": "trl", "deepspeed": "deepspeed", "qlora": "bitsandbytes"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(
        folder, hidden_size=64, intermediate_size=128, num_hidden_layers=2
    )  # rows of whole blocks in four bits
    return folder


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch, lora_fused):
    """Runs a recipe after the setup, and gives its names, with the calls that were recorded meanwhile."""
    monkeypatch.setenv("LOCAL_KERNELS", f"org/lora-fused={ROOT / 'build'}")
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(variable)  # Trainer leaves its compiler's there, for every later Accelerator of the process
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    def run(name):
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
        setup = RECIPES["setup"]
        assert setup.count('"path/to/a/checkpoint"') == 1
        names = {}
        torch.manual_seed(0)
        exec(compile(setup.replace('"path/to/a/checkpoint"', repr(str(checkpoint))), "setup", "exec"), names)
        names["lora_fused"].peft.small_batch.SMALL_ROWS = -1  # as conftest.py has it
        with names["lora_fused"].record() as calls, warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*lora_fused")
            exec(compile(RECIPES[name], name, "exec"), names)
        return names, calls

    return run


def test_the_page_has_them():
    assert len(RECIPES) == USAGE.read_text().count("```python") >= 12


# The number of LoRA modules, and how often the model has been called: each time four linears and the MLP in two layers.
TRAINED = {
    "loop": (14, 2),
    "trainer": (14, 4),
    "trl": (14, 8),  # it checkpoints: each layer is computed again
    "accelerate": (14, 2),
    "qlora": (14, 2),
    "adapters": (14, 2),
    "merging": (14, 3),
    "record": (14, 1),
}


@pytest.mark.parametrize("name", TRAINED)
def test_trained_fused(run, name, capsys):
    names, calls = run(name)
    modules, passes = TRAINED[name]
    rows = explain(names["lora_fused"], names["model"])
    assert len(rows) == modules and all(row.fused and row.last == "fused" for row in rows), str(rows)
    assert (calls.fused, calls.own) == (10 * passes, 0), str(calls)
    grads = [p.grad for name, p in names["model"].named_parameters() if "lora_" in name and p.grad is not None]
    assert grads == [] or all(grad.isfinite().all() for grad in grads)
    if name in ("loop", "record"):
        assert "14 of 14 LoRA modules fused, 100.0% of the adapter parameters" in capsys.readouterr().out


def test_trainer_reports(run):
    names, _ = run("trainer")
    assert [row.get("lora_fused") for row in names["trainer"].state.log_history][:2] == [1.0, None]


def test_dora_with_an_embedding(run):
    names, calls = run("dora")
    rows = explain(names["lora_fused"], names["model"])
    assert len(rows) == 7 and all(row.fused and row.last == "fused" for row in rows), str(rows)
    assert {row.layer for row in rows} == {"LoraLinear", "LoraEmbedding", "LoraGatedMLP"} and calls.own == 0
    assert any(
        "magnitude" in name and p.grad.abs().max() > 0
        for name, p in names["model"].named_parameters()
        if p.grad is not None
    )


def test_weights_are_sent_merged(run):
    names, _ = run("merging")
    model = names["model"]
    assert not any("lora_" in name for name in names["weights"])
    assert not any(row.reason for row in explain(names["lora_fused"], model))  # unmerged


def test_merging_a_hundred_times_keeps_names_and_values(run, checkpoint):
    """Names as they were, values within rounding of where they began: PEFT adds and takes the same product."""
    names, _ = run("merging")
    model = names["model"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(100):
        model.merge_adapter()
        model.unmerge_adapter()
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5)
    assert all(row.fused for row in explain(names["lora_fused"], model))


def test_undo(run):
    names, _ = run("undo")
    model = names["model"]
    assert forwards(model) == {} and not any("lora_" in name for name, _ in model.named_parameters())


def test_leaves_of_zero_3(run):
    names, _ = run("deepspeed")
    assert all(row.fused for row in explain(names["lora_fused"], names["model"]))


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Runs one of examples/ in this process, and gives its exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return ended.value.code

    return run


def test_trainer_script(script, capsys):
    assert script("train.py", "--steps", "3") == 0
    out = capsys.readouterr().out
    assert "30 fused calls, 0 of the modules' own forwards" in out
    losses = re.search(r"^losses \[(.*)\]$", out, re.MULTILINE)[1].split(", ")
    assert len(losses) == 3 and float(losses[-1]) < float(losses[0])


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_fsdp2_script_in_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [ROOT / "examples" / "fsdp2.py", "--steps", "3", "--cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "30 fused calls, 0 of the modules' own forwards" in done.stdout
    losses = re.findall(r"loss (\d\.\d+)", done.stdout)
    assert len(losses) == 3 and float(losses[-1]) < float(losses[0])
