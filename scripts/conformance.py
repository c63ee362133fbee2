"""PEFT's own tests, unmodified, with and without this kernel: nothing may fail only with it.

    python scripts/conformance.py            everything that concerns LoRA
    python scripts/conformance.py --quick    a part of it, as the project's own tests run it

PEFT's source distribution is downloaded once into .conformance/, or given with --sdist. Each module
runs twice in processes of its own, alone and with scripts/conformance_plugin.py kernelizing every
model. A test that fails only with the kernel is run again alone, both ways, before it counts.
The report goes to .conformance/report.json; the exit status is 1 if anything fails only with the
kernel, if a module ran nothing, or if fewer than MIN_FUSED of the calls were fused.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = ROOT / ".conformance"
VERSION, SHA256 = "0.21.2", "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"
# (module, -k expression); what is left out concerns no LoRA layer, or needs hardware of its own.
LORA = "lora or Lora or LoRA or dora or Dora or DoRA"
MODULES = {
    "test_custom_models.py": LORA,
    "test_lora_variants.py": "",
    "test_initialization.py": "",
    "test_mixed.py": "",
    "test_velora.py": "",
    "test_bdlora.py": "",
    "test_lora_ga.py": "",
    "test_low_level_api.py": "",
    "test_target_parameters.py": "",
    "test_tuners_utils.py": LORA,
    "test_lora_conversion.py": "",
    "test_arrow.py": "",
    "test_loraplus.py": "",
    "test_lorafa.py": "",
    "test_trainable_tokens.py": LORA,
    "test_other.py": LORA,
    "test_xlora.py": "",
    "test_decoder_models.py": LORA,
    "test_gpu_examples.py": LORA,
    "test_common_gpu.py": LORA,
}
QUICK = {
    "test_custom_models.py": f"(TestMultipleActiveAdapters or TestRequiresGrad or TestMixedAdapterBatches) and ({LORA})",
}
# Many of PEFT's cases are merged, disabled or have several adapters, which stay PEFT's to compute.
MIN_FUSED = 0.25


def sdist(given: pathlib.Path | None) -> pathlib.Path:
    """The unpacked source distribution, of which the digest is known."""
    folder = CACHE / f"peft-{VERSION}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    archive = given or CACHE / f"peft-{VERSION}.tar.gz"
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--dest", str(CACHE), f"peft=={VERSION}"]
        done = subprocess.run(command, text=True, capture_output=True)
        if done.returncode:
            sys.exit(f"peft {VERSION}'s source distribution cannot be downloaded; give it with --sdist\n{done.stderr}")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(f"{archive}: sha256 {digest}, expected {SHA256}")
    with tarfile.open(archive) as tar:
        tar.extractall(CACHE, filter="data")
    (folder / "tests" / "__init__.py").touch()  # the archive leaves it out, the modules import each other
    return folder


def run(tests: list[str], folder: pathlib.Path, kernel: bool, workers: int, keep: str = "") -> tuple[dict, dict]:
    """(outcome of every test, calls by layer) of one pytest run in PEFT's folder."""
    with tempfile.TemporaryDirectory() as out:
        env = os.environ | {"CONFORMANCE_OUT": out, "TOKENIZERS_PARALLELISM": "false"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "scripts"), env.get("PYTHONPATH", "")])
        env.pop("CONFORMANCE_BUILD", None)
        if kernel:
            env["CONFORMANCE_BUILD"] = str(ROOT / "build")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "conformance_plugin", "-o", "addopts=", "-W", "ignore", "--tb=short", *tests]
        if workers > 1:
            command += ["-n", str(workers), "--dist", "loadfile" if len(tests) > workers else "load"]
        if keep:
            command += ["-k", keep]
        done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True)
        outcomes, calls = {}, collections.Counter()
        for path in pathlib.Path(out).glob("*.json"):
            part = json.loads(path.read_text())
            outcomes.update(part["outcomes"])
            calls.update(part["calls"])
        if done.returncode not in (0, 1, 5):
            print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
            outcomes[f"{tests[0]}::collection"] = {"outcome": "failed", "error": f"pytest exits with {done.returncode}"}
        return outcomes, calls


def compare(module: str, keep: str, folder: pathlib.Path, workers: int) -> dict:
    """Counts of one test module and the tests that fail only with the kernel."""
    alone, _ = run([f"tests/{module}"], folder, False, workers, keep)
    ours, calls = run([f"tests/{module}"], folder, True, workers, keep)
    only, flaky = {}, 0
    for test in sorted(set(alone) | set(ours)):
        theirs = alone.get(test, {"outcome": "not run"})["outcome"]
        result = ours.get(test, {"outcome": "failed", "error": "not run with the kernel"})
        if result["outcome"] == "failed" and theirs != "failed":
            again, _ = run([test], folder, True, 1)
            base, _ = run([test], folder, False, 1)
            fails = any(each["outcome"] == "failed" for each in again.values()) or not again
            if fails and not any(each["outcome"] == "failed" for each in base.values()):
                only[test] = result["error"]
            else:
                flaky += 1
    count = collections.Counter(result["outcome"] for result in ours.values())
    both = sum(r["outcome"] == "failed" and alone.get(t, {}).get("outcome") == "failed" for t, r in ours.items())
    return {
        "run": len(ours),
        "passed": count["passed"],
        "skipped": count["skipped"] + count["xfail"],
        "needs the Hub": count["needs the Hub"],
        "failed both ways": both,
        "flaky": flaky,
        "failed only with the kernel": only,
        "calls": calls,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a part that takes about a minute")
    parser.add_argument("--sdist", type=pathlib.Path, help="PEFT's source distribution, where it cannot be downloaded")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", help="one module of PEFT's tests")
    arguments = parser.parse_args()
    if not (ROOT / "build").is_dir():
        parser.error("no build folder: run `make build` first")
    folder = sdist(arguments.sdist)
    modules = QUICK if arguments.quick else MODULES
    if arguments.only:
        modules = {arguments.only: MODULES[arguments.only]}
    report, calls = {}, collections.Counter()
    for module, keep in modules.items():
        report[module] = compare(module, keep, folder, arguments.workers)
        calls.update(report[module].pop("calls"))
        shown = {key: value if not isinstance(value, dict) else len(value) for key, value in report[module].items()}
        print(f"{module:28}", ", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
        for test, error in report[module]["failed only with the kernel"].items():
            print(f"    {test}\n        {error}")
    total = {key: sum(each[key] for each in report.values()) for key in ("run", "passed", "needs the Hub", "failed both ways", "flaky")}
    only = sum(len(each["failed only with the kernel"]) for each in report.values())
    fused = sum(count for name, count in calls.items() if name.endswith(": fused"))
    share = fused / max(1, sum(calls.values()))
    (CACHE / "report.json").write_text(json.dumps({"modules": report, "calls": calls, "total": total}, indent=1))
    print(", ".join(f"{key} {value}" for key, value in total.items()) + f", failed only with the kernel {only}")
    print(f"{share:.0%} of {sum(calls.values())} calls fused:", ", ".join(f"{k} {v}" for k, v in sorted(calls.items())))
    nothing_ran = [module for module, each in report.items() if not each["run"]]
    if nothing_ran:
        print("no test ran in", ", ".join(nothing_ran))
    return 1 if only or nothing_ran or share < MIN_FUSED else 0


if __name__ == "__main__":
    sys.exit(main())
