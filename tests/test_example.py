"""examples/finetune.py, the job of `make demo`, as a user runs it."""

import json
import pathlib
import subprocess
import sys

import pytest
from helpers.checkpoints import save_checkpoint

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = ("--steps", "4", "--batch", "2", "--seq", "32")


def finetune(*args):
    command = [sys.executable, str(ROOT / "examples" / "finetune.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def check_result(done, out, modules):
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG\r\n")
    result = json.loads(out.with_suffix(".json").read_text())
    assert result["fused_modules"] == result["lora_modules"] == modules
    assert len(result["peft"]["losses"]) == len(result["lora_fused"]["losses"]) == 4
    assert result["largest_difference"] <= result["tolerance"]
    assert len(set(result["peft"]["losses"])) > 1
    assert f"{modules} of {modules} LoRA modules fused" in done.stdout
    assert "step time" in done.stdout and "peak memory" in done.stdout
    assert ("shows on a GPU" in done.stdout) == (result["device"] == "cpu")
    assert "PEFT + lora-fused" in done.stderr  # the progress bar


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
