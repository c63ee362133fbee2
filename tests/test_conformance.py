"""A part of PEFT's own tests with this kernel in place; `make conformance` runs all that concern LoRA."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts")]

import conformance

REPORT = ROOT / ".conformance" / "report.json"


PACKAGES = ("diffusers", "datasets", "parameterized")  # not there on a bare GPU machine


def test_a_part_and_its_bar(tmp_path, capsys):
    """Every second test, from the second on; the bar knows how many these are."""
    for package in (*PACKAGES, "xdist"):
        pytest.importorskip(package, reason="PEFT's tests import it; requirements-test.txt has it")
    (tmp_path / "test_few.py").write_text(
        "import pytest\n\n\n@pytest.mark.parametrize('i', range(5))\ndef test_one(i):\n    assert i != 3\n"
    )
    choice = {"modules": {"test_few.py": conformance.ALL}, "without": [], "classes": (), "words": {}, "part": (2, 2)}
    outcomes, _ = conformance.run(["test_few.py"], tmp_path, False, 1, choice)
    found = {test.removeprefix("test_few.py::"): each["outcome"] for test, each in outcomes.items()}
    assert found == {"test_one[1]": "passed", "test_one[3]": "failed"}
    assert "PEFT alone: 100%|██████████| 2/2" in capsys.readouterr().err


@pytest.mark.parametrize("text", ("0/2", "3/2", "2", "a/b", "-1/2"))
def test_a_part_that_is_none(text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["conformance.py", f"--part={text}"])
    with pytest.raises(SystemExit):
        conformance.parse_args()
    assert f"'{text}', expected I/N as 2/5" in capsys.readouterr().err


def test_nothing_of_peft_fails_only_with_the_kernel():
    for package in PACKAGES:
        pytest.importorskip(package, reason="PEFT's tests import it; requirements-test.txt has it")
    REPORT.unlink(missing_ok=True)
    workers = str(min(4, os.cpu_count() or 1))
    command = [sys.executable, "scripts/conformance.py", "--quick", "--workers", workers]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(REPORT.read_text())
    assert report["total"]["passed"] > 100 and report["calls"]["LoraLinear: fused"] > 40
