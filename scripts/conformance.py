"""PEFT's own tests, unmodified, with and without this kernel: nothing may fail only with it.

    python scripts/conformance.py            everything that concerns LoRA
    python scripts/conformance.py --quick    a part of it, as the project's own tests run it
    python scripts/conformance.py --compiled compiled models alone
    python scripts/conformance.py --part 2/5 every fifth test, from the second on: all five are the whole

PEFT's source distribution is downloaded once into .conformance/, or given with --sdist; the models that
the tests ask the Hub for are built there (scripts/conformance_hub.py). All modules run twice at the same
time, alone and with scripts/conformance_plugin.py kernelizing every model. A test that fails only with
the kernel is run again alone, both ways, before it counts. Two bars show how far each of the runs is.
The report goes to .conformance/report.json, that of a part to report-2-of-5.json; the exit status is 1
if anything fails only with the kernel, or of the whole if a module ran nothing, if fewer than MIN_FUSED
of the calls were fused, or if torch.compile traced no op of the kernel in a module of compiled models.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = ROOT / ".conformance"
VERSION, SHA256 = "0.21.2", "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"

# Of a module all tests (ALL) or those that name LoRA; methods that only contain the word are others'.
ALL, LORA = "all", "lora"
COMPILED = "test_torch_compile.py"
COMPILED_ELSEWHERE = {  # words in names of tests, some of which compile
    "test_initialization.py": ("TestHotSwapping",),
    "test_lora_conversion.py": ("compile",),
    "test_low_level_api.py": ("compile",),
    "test_gpu_examples.py": ("compile", "hotswap"),
}
MODULES = {
    "test_arrow.py": ALL,
    "test_auto.py": LORA,
    "test_bdlora.py": ALL,
    "test_custom_models.py": LORA,
    "test_decoder_models.py": LORA,
    "test_encoder_decoder_models.py": LORA,
    "test_feature_extraction_models.py": LORA,
    "test_initialization.py": ALL,
    "test_integrations.py": ALL,
    "test_lora_conversion.py": ALL,
    "test_lora_ga.py": ALL,
    "test_lora_intruders.py": ALL,
    "test_lora_variants.py": ALL,
    "test_lorafa.py": ALL,
    "test_loraplus.py": ALL,
    "test_low_level_api.py": ALL,
    "test_mixed.py": ALL,
    "test_other.py": ALL,
    "test_seq_classifier.py": LORA,
    "test_stablediffusion.py": LORA,
    "test_target_parameters.py": ALL,
    "test_token_classification_qa.py": LORA,
    COMPILED: LORA,
    "test_trainable_tokens.py": ALL,
    "test_tuners_utils.py": ALL,
    "test_velora.py": ALL,
    "test_xlora.py": ALL,
}
ON_GPU = {"test_common_gpu.py": ALL, "test_gpu_examples.py": ALL}
QUICK = {"test_custom_models.py": LORA, "test_initialization.py": ALL}
QUICK_CLASSES = (
    "TestMultipleActiveAdapters",
    "TestRequiresGrad",
    "TestMixedAdapterBatches",
    "TestPeftFsdpStateDict",
    "TestHotSwapping",
)
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


def follow(process: subprocess.Popen, out: pathlib.Path, kernel: bool) -> None:
    """A bar of the tests that `process` has done, as the plugin counts them in `out`, until it ends."""
    title, every = "kernelized" if kernel else "PEFT alone", 0.5 if sys.stderr.isatty() else 60
    with tqdm(desc=title, unit="test", position=int(kernel), mininterval=every, maxinterval=every) as bar:
        ended = False
        while not ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            ended = process.poll() is not None
            chosen, done = out / "chosen", out / "done"
            bar.total = int(chosen.read_text() or 0) if chosen.exists() else None
            bar.update((done.stat().st_size if done.exists() else 0) - bar.n)


def run(tests: list[str], folder: pathlib.Path, kernel: bool, workers: int, choice: dict) -> tuple[dict, dict]:
    """(outcome of every test, calls by layer) of one pytest run in PEFT's folder. `choice` says what of
    the modules runs, as the plugin reads it."""
    with tempfile.TemporaryDirectory() as folder_of_results:
        out = pathlib.Path(folder_of_results)
        env = os.environ | {"CONFORMANCE_OUT": str(out), "CONFORMANCE_CHOICE": json.dumps(choice)}
        env |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HOME": str(CACHE / "hf")}
        env |= {"PEFT_DEBUG_WITH_TORCH_COMPILE": "1"}  # PEFT's own leave these tests out, for the time they take
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "scripts"), env.get("PYTHONPATH", "")])
        env.pop("CONFORMANCE_BUILD", None)
        if kernel:
            env["CONFORMANCE_BUILD"] = str(ROOT / "build")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "conformance_plugin", "--continue-on-collection-errors", "-o", "addopts="]
        command += ["-W", "ignore", "--tb=short", *tests]
        if workers:
            command += ["-n", str(workers), "--dist", "load"]
        with open(out / "printed", "w") as printed:
            done = subprocess.Popen(command, cwd=folder, env=env, stdout=printed, stderr=subprocess.STDOUT)
            if workers:
                follow(done, out, kernel)
            done.wait()
        outcomes, calls = {}, collections.Counter()
        for path in out.glob("*.json"):
            part = json.loads(path.read_text())
            outcomes.update(part["outcomes"])
            calls.update(part["calls"])
        if done.returncode not in (0, 1, 5):
            print((out / "printed").read_text()[-4000:])
            outcomes[f"{tests[0]}::collection"] = {"outcome": "failed", "error": f"pytest exits with {done.returncode}"}
        return outcomes, calls


def fails_only_with_the_kernel(test: str, folder: pathlib.Path) -> bool:
    """Whether a test that seemed to do so does, run alone and again."""
    (again, _), (base, _) = (run([test], folder, kernel, 0, {}) for kernel in (True, False))
    fails = not again or any(each["outcome"] == "failed" for each in again.values())
    return fails and not any(each["outcome"] == "failed" for each in base.values())


def compare(module: str, alone: dict, ours: dict, folder: pathlib.Path) -> dict:
    """Counts of one test module and the tests that fail only with the kernel."""
    only, flaky = {}, 0
    for test in sorted(set(alone) | set(ours)):
        theirs = alone.get(test, {"outcome": "not run"})["outcome"]
        result = ours.get(test, {"outcome": "failed", "error": "not run with the kernel"})
        if result["outcome"] == "failed" and theirs != "failed":
            if fails_only_with_the_kernel(test, folder):
                only[test] = result["error"]
            else:
                flaky += 1
    count = collections.Counter(result["outcome"] for result in ours.values())
    both = [t for t, r in ours.items() if r["outcome"] == "failed" and alone.get(t, {}).get("outcome") == "failed"]
    return {
        "run": len(ours),
        "passed": count["passed"],
        "skipped": count["skipped"] + count["xfail"],
        "needs the Hub": count["needs the Hub"],
        "failed both ways": {test: ours[test]["error"] for test in sorted(both)},
        "flaky": flaky,
        "failed only with the kernel": only,
    }


def by_module(outcomes: dict, module: str) -> dict:
    return {test: result for test, result in outcomes.items() if test.split("::")[0].endswith(f"/{module}")}


def size(value) -> int:
    return len(value) if isinstance(value, dict) else value


def build_models() -> None:
    """Fills .conformance/hf/hub, in a process of its own: it is not to load what the tests load."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(CACHE / "hf")}
    command = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / "conformance_hub.py"), str(CACHE / "hf" / "hub")]
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"the models cannot be built\n{done.stderr}")


def part_of(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}, expected I/N as 2/5")
    return int(index), int(count)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a part that takes about a minute")
    parser.add_argument("--sdist", type=pathlib.Path, help="PEFT's source distribution, where it cannot be downloaded")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2, help="processes")
    parser.add_argument("--without", nargs="+", metavar="WORD", default=[], help="words in names of tests to leave out")
    parser.add_argument("--compiled", action="store_true", help="only tests of compiled models")
    parser.add_argument("--only", nargs="+", metavar="MODULE", help="modules of PEFT's tests", choices=MODULES | ON_GPU)
    parser.add_argument("--part", type=part_of, metavar="I/N", default=(1, 1), help="every Nth test, from the Ith on")
    if not (ROOT / "build").is_dir():
        parser.error("no build folder: run `make build` first")
    return parser.parse_args()


def main() -> int:
    arguments = parse_args()
    folder = sdist(arguments.sdist)
    modules = QUICK if arguments.quick else MODULES | (ON_GPU if torch.cuda.is_available() else {})
    if arguments.only or arguments.compiled:
        chosen = arguments.only or [name for name in (COMPILED, *COMPILED_ELSEWHERE) if name in modules]
        modules = {module: (MODULES | ON_GPU)[module] for module in chosen}
    if not arguments.quick:
        build_models()
    choice = {"modules": modules, "without": arguments.without, "part": arguments.part}
    choice["classes"] = QUICK_CLASSES if arguments.quick else ()
    choice["words"] = COMPILED_ELSEWHERE if arguments.compiled else {}
    tests, started = [f"tests/{module}" for module in modules], time.time()
    workers = max(1, arguments.workers // 2)
    with ThreadPoolExecutor(2) as pool:
        both = pool.map(lambda kernel: run(tests, folder, kernel, workers, choice), (False, True))
        (alone, _), (ours, calls) = both
    report = {}
    for module in modules:
        report[module] = compare(module, by_module(alone, module), by_module(ours, module), folder)
        print(f"{module:34}", ", ".join(f"{key} {size(value)}" for key, value in report[module].items()), flush=True)
        for test, error in report[module]["failed only with the kernel"].items():
            print(f"    {test}\n        {error}")
    keys = ("run", "passed", "skipped", "needs the Hub", "failed both ways", "flaky", "failed only with the kernel")
    total = {key: sum(size(each[key]) for each in report.values()) for key in keys}
    traced = calls.pop("traced", 0)
    fused = sum(count for name, count in calls.items() if name.endswith(": fused"))
    share = fused / max(1, sum(calls.values()))
    written = {"modules": report, "calls": calls, "traced": traced, "total": total}
    whole = arguments.part == (1, 1)
    name = "report.json" if whole else "report-{}-of-{}.json".format(*arguments.part)
    (CACHE / name).write_text(json.dumps(written, indent=1))
    print(f"{time.time() - started:.0f} s:", ", ".join(f"{key} {value}" for key, value in total.items()))
    print(f"{share:.0%} of {sum(calls.values())} calls fused:", ", ".join(f"{k} {v}" for k, v in sorted(calls.items())))
    print(f"{traced} ops of the kernel in graphs of torch.compile")
    nothing_ran = [module for module, each in report.items() if not each["run"]]
    if nothing_ran:
        print("no test ran in", ", ".join(nothing_ran))
    if not whole:
        return 1 if total["failed only with the kernel"] or not total["run"] else 0
    nothing_traced = COMPILED in modules and not traced
    return 1 if total["failed only with the kernel"] or nothing_ran or share < MIN_FUSED or nothing_traced else 0


if __name__ == "__main__":
    sys.exit(main())
