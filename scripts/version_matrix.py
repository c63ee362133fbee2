#!/usr/bin/env python3
"""Run some of the tests with other versions of PEFT, kernels and transformers, and write down what passed.

Every row is this environment with some packages in other versions, which pip puts, without their dependencies, into a
folder that comes first on PYTHONPATH. The kernel is the one in `build/` for every row. What is found is merged into
`docs/versions.json` by the versions that ran, so that another torch's rows are added from an environment that has it,
and the table in docs/support.md is made from that (scripts/pages.py).

With --compiled the tests of compiled models run in their place, with the versions as they are: for another torch, in an
environment that has it. Nothing is written, and the exit status is 1 if one fails.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "versions.json"
PACKAGES = ("torch", "kernels", "peft", "transformers")

# Next to what requirements.txt pins. transformers 5.18 is the first line that takes kernels 0.17, 5.20 wants 0.17.2.
ROWS = (
    {},
    {"peft": "0.18.0"},
    {"peft": "0.18.1"},
    {"peft": "0.19.1"},
    {"peft": "0.20.0"},
    {"transformers": "5.18.0"},
    {"transformers": "5.19.0"},
    {"transformers": "5.20.2"},
    {"transformers": "5.21.1"},
    {"transformers": "5.18.0", "kernels": "0.17.0"},
    {"transformers": "5.19.0", "kernels": "0.17.1"},
    {"transformers": "5.18.0", "kernels": "0.17.0", "peft": "0.18.0"},
)
# Those that need no newer variants of PEFT than the oldest has.
TESTS = (
    "test_parity",
    "test_siblings",
    "test_gated",
    "test_embedding",
    "test_dropout",
    "test_changes",
    "test_kernelized",
    "test_use_kernels",
)


def compiled_tests() -> tuple[str, ...]:
    """Their names."""
    return tuple(sorted(path.stem for path in (ROOT / "tests").glob("test_compile*.py")))


def run_row(wanted: dict[str, str], tests: tuple[str, ...] = TESTS) -> dict:
    """The versions that were found, and how many tests passed, failed and were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        if wanted:
            pins = [f"{name}=={version}" for name, version in wanted.items()]
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *pins]
            subprocess.run(pip, check=True)
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        report = Path(folder, "junit.xml")
        files = [f"tests/{name}.py" for name in tests]
        pytest = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            f"--junitxml={report}",
            *files,
        ]
        done = subprocess.run(pytest, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if not report.exists():
            sys.exit(f"{done.stdout}\nversion_matrix: pytest failed to start with {wanted}")
        counts = count(report)
        if counts["failed"]:
            print(done.stdout)
        return versions(env, wanted) | counts


def versions(env: dict[str, str], wanted: dict[str, str]) -> dict[str, str]:
    """What a process with this environment imports; must be what was wanted."""
    code = (
        f"import importlib, json; print(json.dumps({{n: importlib.import_module(n).__version__ for n in {PACKAGES}}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, text=True, capture_output=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found | wanted == found, (found, wanted)
    return {"python": ".".join(platform.python_version_tuple()[:2])} | found


def count(report: Path) -> dict[str, int]:
    """Outcomes in pytest's JUnit report; an error, as of a file that cannot be imported, is a failure."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    total, failures, errors, skipped = (int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped"))
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def key(row: dict) -> tuple:
    """What ran: rows of the same versions replace each other, and are sorted by them."""
    return tuple(
        [int(part) if part.isdigit() else 0 for part in row[name].split("+")[0].split(".")]
        for name in ("python", *PACKAGES)
    )


def merged(rows: list[dict], new: list[dict]) -> list[dict]:
    return sorted({str(key(row)): row for row in (*rows, *new)}.values(), key=key, reverse=True)


def table(results: dict) -> str:
    lines = ["| Python | torch | kernels | PEFT | transformers | Tests |", "|---|---|---|---|---|---|"]
    for row in results["rows"]:
        found = f"{row['passed']} passed" + "".join(
            f", {row[what]} {what}" for what in ("failed", "skipped") if row[what]
        )
        lines.append(f"| {' | '.join(row[name] for name in ('python', *PACKAGES))} | {found} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help="their numbers, e.g. 0,3 (default: all)")
    parser.add_argument("--compiled", action="store_true", help="the tests of compiled models, with this environment")
    args = parser.parse_args()
    if args.compiled:
        row = run_row({}, compiled_tests())
        print(row)
        sys.exit(int(row["failed"] > 0 or row["passed"] == 0))
    numbers = map(int, args.rows.split(",")) if args.rows else range(len(ROWS))
    for number in numbers:
        print(f"row {number}: {ROWS[number] or 'as pinned'}", flush=True)
        row = run_row(ROWS[number])
        print(f"  {row}", flush=True)
        rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
        results = {"tests": list(TESTS), "rows": merged(rows, [row])}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    subprocess.run([sys.executable, ROOT / "scripts" / "pages.py"], check=True)


if __name__ == "__main__":
    main()
