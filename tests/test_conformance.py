"""A part of PEFT's own tests with this kernel in place; `make conformance` runs all that concern LoRA."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
REPORT = ROOT / ".conformance" / "report.json"


def test_nothing_of_peft_fails_only_with_the_kernel():
    for package in ("diffusers", "datasets", "parameterized"):  # not there on a bare GPU machine
        pytest.importorskip(package, reason="PEFT's tests import it; requirements-test.txt has it")
    REPORT.unlink(missing_ok=True)
    workers = str(min(4, os.cpu_count() or 1))
    command = [sys.executable, "scripts/conformance.py", "--quick", "--workers", workers]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(REPORT.read_text())
    assert report["total"]["passed"] > 100 and report["calls"]["LoraLinear: fused"] > 40
