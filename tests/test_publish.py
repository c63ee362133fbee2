"""From an upload to a stranger's process: the unmodified clients against a loopback Hub that was uploaded to as
kernel-builder does. What a client cannot do, by its own fault, is an expected failure, so that a fixed one shows.

Steps of one kind of user share a process, since most of a step is importing torch.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from helpers.hub_server import HubServer
from kernels._rust import Digest, DigestAlgorithm
from kernels.compat import tomllib
from kernels.resolver import resolve_local_kernel

ROOT = pathlib.Path(__file__).resolve().parent.parent
REPO_ID = tomllib.loads((ROOT / "build.toml").read_text())["general"]["hub"]["repo-id"]
BUILT = resolve_local_kernel(ROOT / "build", backend=None).variant_path  # this environment's
FOREIGN = "torch-stable-abi211-cpu-aarch64-darwin"

# `step` runs one and notes what it gave or raised, by name; the process prints all of it.
STEPS = """
import contextlib, io, json, os, pathlib, sys
told = {}
def step(name, function):
    try:
        told[name] = {"gave": function()}
    except (Exception, SystemExit) as error:
        told[name] = {"error": type(error).__name__, "message": str(error)}
def command(*arguments):
    from kernels.cli import main
    sys.argv, out = ["kernels", *arguments], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        main()
    return out.getvalue()
def measure(where, branch=None):
    from kernels.cli import benchmark
    benchmark.MISSING_DEPS.clear()
    benchmark.tabulate = lambda *args, **kwargs: ""  # draws the table
    with contextlib.redirect_stderr(io.StringIO()):
        return sorted(benchmark.run_benchmark(where, branch, None, iterations=1, warmup=0).timing_results)
def product(kernel):
    import torch
    x, w, a, b = (torch.ones(shape) for shape in ((2, 4), (3, 4), (1, 4), (3, 1)))
    return kernel.lora_linear(x, w, a, b, 0.5)[0, 0].item()
from kernels import get_kernel, get_locked_kernel, has_kernel, load_kernel
"""
BENCHMARK = """
from kernels.benchmark import Benchmark
class Small(Benchmark):
    def benchmark_nothing(self):
        self.kernel.explain
"""
pytestmark = pytest.mark.xdist_group("publish")  # one process fills the Hub and the homes, for all tests
pytest.importorskip("sigstore", reason="the command line of kernels needs it; a bare GPU machine has none")


def run(script, hub, home, **env):
    """What each step of `script` gave, in a process that knows no other Hub and has `home` to itself."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "KERNELS_", "LOCAL_KERNELS"))}
    for name in ("DISABLE_TELEMETRY", "DO_NOT_TRACK"):  # with these kernels 0.17.2 sends an illegal header
        keep.pop(name, None)
    keep |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", f"{STEPS}\n{script}\nprint(json.dumps(told))"],
        env=keep | env, cwd=home.parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


def variant_of(build, name, ops_id, version):
    """The built variant under another id and version, as another commit's build of it: equally long ids are exchanged
    in the library, whose table of symbols then no longer finds PyInit, so `_ops.py` opens it by its path."""
    variant = build / name
    shutil.copytree(BUILT, variant, ignore=shutil.ignore_patterns("__pycache__"))
    metadata = json.loads((variant / "metadata.json").read_text())
    old = metadata["id"]
    assert len(ops_id) == len(old)
    library = variant / f"{ops_id}.abi3.so"
    (variant / f"{old}.abi3.so").rename(library)
    library.write_bytes(library.read_bytes().replace(old.encode(), ops_id.encode()))
    ops = (variant / "_ops.py").read_text().replace(old, ops_id)
    opens = f"from pathlib import Path\ntorch.ops.load_library(str(Path(__file__).with_name('{library.name}')))"
    (variant / "_ops.py").write_text(ops.replace(f"from . import {ops_id}", opens))
    metadata |= {"id": ops_id, "version": version}
    metadata["digest"]["files"] = dict(Digest.hash_variant(DigestAlgorithm.SHA256, variant).files)
    (variant / "metadata.json").write_text(json.dumps(metadata))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A kernel with two versions of two variants each, its card and its benchmark."""
    folder = tmp_path_factory.mktemp("published")
    old = json.loads((BUILT / "metadata.json").read_text())["id"]
    kernel = folder / "kernel"
    (kernel / "benchmarks" / "results").mkdir(parents=True)
    (kernel / "benchmarks" / "benchmark.py").write_text(BENCHMARK)
    (kernel / "benchmarks" / "tables.py").write_text("# is not uploaded\n")
    second = old[:-7] + ("0000000" if old[-7:] != "0000000" else "1111111")
    with HubServer(REPO_ID) as server:
        for version, ops_id in ((1, old), (2, second)):
            build = folder / f"build{version}"
            if version == 1:
                shutil.copytree(BUILT, build / BUILT.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                variant_of(build, BUILT.name, ops_id, version)
            shutil.copytree(build / BUILT.name, build / FOREIGN)
            (build / "CARD.md").write_text(f"# version {version}\n")
            server.upload(kernel, build, version)
        yield server


@pytest.fixture(scope="module")
def stranger(hub, tmp_path_factory):
    """Somebody to whom nobody vouches for the publisher: (what the steps gave, the home that they filled)."""
    home = tmp_path_factory.mktemp("stranger") / "home"
    script = f"""
repo = {REPO_ID!r}
step("untrusted", lambda: get_kernel(repo, version=1).__file__)
step("named", lambda: get_kernel(repo, version=1, trust_remote_code=[repo]).__file__)
step("second", lambda: get_kernel(repo, version=2, trust_remote_code=True).__file__)
one, two = (get_kernel(repo, version=v, trust_remote_code=True) for v in (1, 2))
step("side by side", lambda: [one is not two, one._ops.ops is not two._ops.ops, product(one), product(two)])
step("no version", lambda: get_kernel(repo, version=9, trust_remote_code=True))
step("has", lambda: has_kernel(repo, version=1, trust_remote_code=True))
step("versions", lambda: command("versions", repo))
step("info", lambda: json.loads(command("info", repo, "--json")))
"""
    return run(script, hub, home), home


@pytest.fixture(scope="module")
def project(hub, tmp_path_factory):
    """Somebody whose project locks the kernel, of a publisher that the Hub vouches for: (what the steps gave, the home
    that they filled)."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "pyproject.toml").write_text(f'[tool.kernels.dependencies]\n"{REPO_ID}" = 1\n')
    script = f"""
repo, lock = {REPO_ID!r}, pathlib.Path("kernels.lock")
step("lock", lambda: [command("lock", "."), json.loads(lock.read_text())])
step("download", lambda: command("download", "."))
step("load", lambda: load_kernel(repo, lockfile=lock).__file__)
step("locked", lambda: get_locked_kernel(repo, lockfile=lock).__file__)
step("all variants", lambda: command("download", "--all-variants", "."))
step("load with all variants", lambda: load_kernel(repo, lockfile=lock).__file__)
from huggingface_hub import snapshot_download
step("whole", lambda: snapshot_download(repo, repo_type="kernel", revision={hub.commit_of("v1")!r}))
step("load with all", lambda: load_kernel(repo, lockfile=lock).__file__)
step("benchmark", lambda: measure(repo, "v1"))
step("benchmark of a folder", lambda: measure(told["whole"]["gave"]))
"""
    hub.trusted = True
    told = run(script, hub, folder / "home")
    hub.trusted = False
    return told, folder / "home"


@pytest.fixture(scope="module")
def offline(hub, stranger, project):
    """The owner of the project again, without a network: what the steps gave. The last has the stranger's cache, in
    which a single variant is, named as a folder."""
    asked = len(hub.requests)
    script = f"""
repo, commit = {REPO_ID!r}, {hub.commit_of("v1")!r}
step("by version", lambda: get_kernel(repo, version=1, trust_remote_code=True).__file__)
step("by commit", lambda: get_kernel(repo, revision=commit, trust_remote_code=True).__file__)
os.environ["LOCAL_KERNELS"] = repo + "=" + {str(snapshot(stranger[1], hub, "v2"))!r}
step("folder", lambda: get_kernel(repo, version=2).__file__)
"""
    told = run(script, hub, project[1], HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked
    return told


def snapshot(home, hub, branch):
    return home / "hub" / f"kernels--{REPO_ID.replace('/', '--')}" / "snapshots" / hub.commit_of(branch)


def test_upload_as_kernel_builder_does(hub):
    """The card on `main` alone, variants and benchmark on the version's branch, nothing else of the folder."""
    assert hub.branches["main"] == {"README.md": b"# version 2\n"}
    for branch in ("v1", "v2"):
        tops = {"/".join(name.split("/")[:2]) for name in hub.branches[branch]}
        assert tops == {f"build/{BUILT.name}", f"build/{FOREIGN}", "benchmarks/benchmark.py"}


def test_second_upload_replaces_its_variants_alone(hub, tmp_path):
    again = HubServer(REPO_ID)
    again.branches = {branch: dict(files) for branch, files in hub.branches.items()}
    (tmp_path / "build" / FOREIGN).mkdir(parents=True)
    (tmp_path / "build" / FOREIGN / "__init__.py").write_text("")
    again.upload(tmp_path, tmp_path / "build", 1)
    kept = {name: data for name, data in hub.branches["v1"].items() if name.startswith(f"build/{BUILT.name}/")}
    assert again.branches["v1"] == kept | {f"build/{FOREIGN}/__init__.py": b""}
    again._http.server_close()


def test_untrusted_publisher_and_the_two_ways_to_trust(hub, stranger):
    told, home = stranger
    assert told["untrusted"]["error"] == "ValueError"
    assert "is not from a trusted publisher" in told["untrusted"]["message"]
    assert told["named"]["gave"].startswith(str(snapshot(home, hub, "v1") / "build" / BUILT.name))
    assert told["second"]["gave"].startswith(str(snapshot(home, hub, "v2") / "build" / BUILT.name))


def test_only_this_machines_variant_is_downloaded(hub, stranger):
    assert stranger[0]["named"]["gave"]
    assert hub.downloaded() and not any(FOREIGN in name and ".so" in name for name in first_downloads(hub))


def first_downloads(hub):
    """What was fetched before anybody asked for all variants."""
    paths = [path for method, path, status in hub.requests if method == "GET" and status == 200 and "/resolve/" in path]
    return paths[: next((i for i, path in enumerate(paths) if FOREIGN in path), len(paths))]


def test_two_versions_in_one_process(stranger):
    product = 4 + 0.5 * 4
    assert stranger[0]["side by side"]["gave"] == [True, True, product, product]


def test_what_there_is(stranger):
    told, _ = stranger
    assert told["no version"]["error"] == "ValueError"
    assert told["no version"]["message"] == "Version 9 not found, available versions: 1, 2"
    assert told["has"]["gave"] is True
    listed = told["versions"]["gave"]
    assert "Version 1:" in listed and "Version 2:" in listed and listed.count(BUILT.name) == 2
    assert told["info"]["gave"]["version"] == 2 and told["info"]["gave"]["license"] == "Apache-2.0"
    assert "You are using version 1" in told["stderr"]


def test_project_locks_downloads_and_loads(hub, project):
    told, home = project
    lock = told["lock"]["gave"][1]
    assert hub.commit_of("v1") in json.dumps(lock) and REPO_ID in json.dumps(lock)
    assert "Downloading kernel" in told["download"]["gave"] and "Downloading kernel" in told["all variants"]["gave"]
    loaded = str(snapshot(home, hub, "v1") / "build" / BUILT.name / "__init__.py")
    assert told["locked"]["gave"] == told["load with all"]["gave"] == loaded


# huggingface_hub 1.33 refuses a snapshot without some file of the branch, and kernels 0.17.2 asks for all of them.
WANTS_ALL = "kernels downloads one variant and then, without the Hub, wants every file of the branch: {}"


@pytest.mark.xfail(strict=True, raises=KeyError, reason=WANTS_ALL.format("other variants, benchmarks/"))
def test_locked_kernel_is_loaded_after_download(project):
    assert project[0]["load"]["gave"] == project[0]["locked"]["gave"]


@pytest.mark.xfail(
    strict=True, raises=KeyError, reason=WANTS_ALL.format("benchmarks/, which --all-variants leaves out")
)
def test_locked_kernel_is_loaded_after_download_of_all_variants(project):
    assert project[0]["load with all variants"]["gave"] == project[0]["locked"]["gave"]


def test_benchmark_of_a_downloaded_folder(project):
    assert project[0]["benchmark of a folder"]["gave"] == ["Small.nothing"]


@pytest.mark.xfail(strict=True, raises=KeyError, reason="kernels asks for a model repository of that name")
def test_benchmark_by_name(project):
    assert project[0]["benchmark"]["gave"] == ["Small.nothing"]


def test_offline_with_a_whole_snapshot_or_a_folder(hub, stranger, project, offline):
    assert offline["by commit"]["gave"] == project[0]["locked"]["gave"]
    assert offline["folder"]["gave"] == stranger[0]["second"]["gave"]


@pytest.mark.xfail(
    strict=True, raises=KeyError, reason="kernels looks for a branch's name in the cache and wrote commits"
)
def test_offline_by_version(project, offline):
    assert offline["by version"]["gave"] == project[0]["locked"]["gave"]


def test_cache_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "file").write_text("")
    told = run(f"step('get', lambda: get_kernel({REPO_ID!r}, version=1, trust_remote_code=True))", hub,
               tmp_path / "home", HF_HOME=str(tmp_path / "file" / "home"))  # fmt: skip
    assert told["get"]["error"] in ("NotADirectoryError", "FileExistsError")
    assert str(tmp_path / "file") in told["get"]["message"]
