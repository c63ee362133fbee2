"""What makes the file and the table of tried versions counts and merges right."""

import json
import sys

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

sys.path.insert(0, str(ROOT / "scripts"))

import version_matrix as matrix

REPORT = '<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10"/></testsuites>'


@pytest.fixture
def results():
    return json.loads(matrix.RESULTS.read_text())


def test_every_failure_is_in_the_table(results):
    broken = dict(results["rows"][0], failed=3, skipped=0)
    assert matrix.table(results | {"rows": [broken]}).endswith(f"{broken['passed']} passed, 3 failed |")


def test_results_cover_the_pins_and_the_oldest(results, lora_fused):
    """The row of the pinned versions, and of each limit that is claimed and can be tried here."""
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    wanted = [each for each in map(Requirement, lines) if each.marker is None or each.marker.evaluate()]
    pins = {each.name: str(each.specifier).removeprefix("==") for each in wanted}
    rows = results["rows"]
    assert any(all(row[name].split("+")[0] == pins[name] for name in matrix.PACKAGES) for row in rows)
    for name in ("kernels", "peft"):
        oldest = min(Version(row[name]) for row in rows)
        assert oldest.release[:2] == Version(lora_fused.environment.versions.WANTED[name]).release
    assert results["tests"] == list(matrix.TESTS) and all(
        (ROOT / "tests" / f"{name}.py").exists() for name in matrix.TESTS
    )


def test_outcomes_are_counted(tmp_path):
    """A file that cannot be imported is an error of pytest's, and no test that passed."""
    (tmp_path / "junit.xml").write_text(REPORT)
    assert matrix.count(tmp_path / "junit.xml") == {"passed": 4, "failed": 3, "skipped": 3}


def row(**changes):
    return {
        "python": "3.11",
        "torch": "2.13.0+cpu",
        "kernels": "0.17.2",
        "peft": "0.9.1",
        "transformers": "5.22.2",
        "passed": 1,
    } | changes


def test_rows_are_merged_by_what_ran():
    rows = [row(), row(peft="0.18.0"), row(torch="2.11.0")]
    found = matrix.merged(rows, [row(passed=2), row(peft="0.20.0rc1")])
    assert [(r["torch"], r["peft"], r["passed"]) for r in found] == [
        ("2.13.0+cpu", "0.20.0rc1", 1),
        ("2.13.0+cpu", "0.18.0", 1),
        ("2.13.0+cpu", "0.9.1", 2),
        ("2.11.0", "0.9.1", 1),
    ]


@pytest.mark.parametrize("counts,status", (((3, 0), 0), ((3, 1), 1), ((0, 0), 1)))
def test_compiled_models_with_the_torch_that_is_here(monkeypatch, counts, status):
    ran = []
    passed, failed = counts
    monkeypatch.setattr(matrix, "run_row", lambda *given: ran.append(given) or dict(passed=passed, failed=failed))
    monkeypatch.setattr(matrix, "RESULTS", None)  # nothing is written
    monkeypatch.setattr(sys, "argv", ["version_matrix.py", "--compiled"])
    with pytest.raises(SystemExit) as ended:
        matrix.main()
    assert ended.value.code == status
    ((wanted, tests),) = ran
    assert wanted == {} and {"test_compile_changes", "test_compile_merge"} <= set(tests)
