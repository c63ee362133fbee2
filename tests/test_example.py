"""examples/finetune.py, the job of `make demo`, as a user runs it."""

import json
import pathlib
import runpy
import subprocess
import sys

import pytest
import torch
from helpers.checkpoints import save_checkpoint
from torch._dynamo.backends.registry import lookup_backend

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = ("--steps", "4", "--batch", "2", "--seq", "32")
TITLES = ["PEFT", "lora-fused", "PEFT, compiled", "lora-fused, compiled"]


def finetune(*args):
    command = [sys.executable, str(ROOT / "examples" / "finetune.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def check_files(out, titles):
    """The picture, and the runs with their losses."""
    assert out.read_bytes().startswith(b"\x89PNG\r\n")
    result = json.loads(out.with_suffix(".json").read_text())
    assert list(result["runs"]) == titles
    for run in result["runs"].values():
        assert len(run["losses"]) == 4 and len(set(run["losses"])) > 1 and run["step_ms"] > 0
        assert run["largest_difference"] <= result["tolerance"] < 0.1
    return result


def check_result(done, out, modules):
    assert done.returncode == 0, done.stderr
    result = check_files(out, TITLES if torch.cuda.is_available() else TITLES[:2])
    assert result["fused_modules"] == result["lora_modules"] == modules
    assert f"{modules} of {modules} LoRA modules fused" in done.stdout
    assert "step time" in done.stdout and "peak memory" in done.stdout
    assert ("shows on a GPU" in done.stdout) == (result["device"] == "cpu")
    assert "lora-fused  " in done.stderr and "step/s" in done.stderr  # the progress bar


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    return path


def test_demo(tmp_path):
    out = tmp_path / "loss.png"
    check_result(finetune(*SMALL, "--out", out), out, modules=21)


def test_own_checkpoint_and_text(checkpoint, text, tmp_path):
    out = tmp_path / "own.png"
    check_result(finetune(*SMALL, "--model", checkpoint, "--data", text, "--out", out), out, modules=7)


@pytest.fixture
def in_this_process(monkeypatch, capsys):
    """Runs the script with another compiler than Inductor, and gives its exit status and what it prints."""

    def run(compiler, *args):
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compiler)
        monkeypatch.setattr(sys, "argv", ["finetune.py", *SMALL, *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "examples" / "finetune.py"), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


def test_compiled_as_well(in_this_process, checkpoint, text, tmp_path):
    """Each decoder layer is a graph; that of the kernelized model has its ops, and explain's line says so."""
    ops = []

    def aot_eager(module, inputs, **_):
        found = [node.target for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        ops.append(sum("lora_fused" in target.namespace for target in found))
        return lookup_backend("aot_eager")(module, inputs)

    out = tmp_path / "own.png"
    code, printed, errors = in_this_process(
        aot_eager, "--model", checkpoint, "--data", text, "--out", out, "--compiled"
    )
    assert code == 0, printed + errors
    check_files(out, TITLES)
    assert ops == [0, 5]  # four linears and the MLP, of the one layer
    assert "compiled: 7 of 7 LoRA modules fused" in printed
    assert all(f" {title}" in printed and title in errors for title in TITLES)


def test_a_compiler_that_fails(in_this_process, checkpoint, text, tmp_path):
    """What ran without it is shown."""

    def fails(module, inputs, **_):
        raise RuntimeError("no compiler here")

    out = tmp_path / "own.png"
    code, printed, errors = in_this_process(fails, "--model", checkpoint, "--data", text, "--out", out, "--compiled")
    assert code == 1
    for title in TITLES[2:]:
        assert f"{title}: failed: backend='inductor' raised: RuntimeError: no compiler here" in errors
    assert "FAILED: a compiled model did not run" in errors
    check_files(out, TITLES[:2])


def test_bad_input_is_named(checkpoint, text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    binary = tmp_path / "binary.dat"
    binary.write_bytes(b"\xff\xfe\xff")
    cases = [
        (("--data", tmp_path / "absent.txt"), "absent.txt"),
        (("--data", binary), "binary.dat"),
        (("--data", short), "too short: 9 tokens"),
        (("--model", tmp_path, "--data", text), "no config.json"),
        (("--model", checkpoint, "--seq", "10000000"), "too short"),
        (("--steps", "0"), "--steps"),
    ]
    for args, message in cases:
        done = finetune(*SMALL, *args, "--out", tmp_path / "never.png")
        assert done.returncode == 2, (args, done.stderr)
        assert message in done.stderr and "Traceback" not in done.stderr, (args, done.stderr)
    assert not (tmp_path / "never.png").exists()
