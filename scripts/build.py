#!/usr/bin/env python3
"""Build the kernel for this machine, without Nix, into build/<variant>/.

The variant is laid out as the Kernel Hub requires: the Python package, `_ops.py`, the
abi3 library and `metadata.json` with digest and provenance. CMake compiles; sources,
versions and capabilities come from build.toml; `kernels` validates build.toml and hashes
the variant. A failing build leaves the former variant in place.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from kernels import __version__ as kernels_version
from kernels._rust import Build, Digest, DigestAlgorithm

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def git(*args: str) -> str | None:
    """Output of a git command in this repository; None without git or a commit."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git_status() -> dict | None:
    """{"commit", "dirty"} of this checkout; None where it has no repository of its own."""
    top, commit = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
    if not top or not commit or Path(top).resolve() != ROOT:
        return None
    dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
    return {"commit": commit, "dirty": dirty}


def build_id(name: str, backend: str, status: dict | None) -> str:
    """Op namespace `_<name>_<backend>_<7 of the commit>[_dirty]`.

    Without a commit, 7 digits of the hash of all sources take its place.
    """
    if status:
        tail = status["commit"][:7] + "_dirty" * status["dirty"]
    else:
        sources = hashlib.sha256((ROOT / "build.toml").read_bytes())
        for path in sorted(p for d in ("torch-ext", "kernel-src") for p in (ROOT / d).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                sources.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
        tail = sources.hexdigest()[:7]
    return f"_{name.replace('-', '_')}_{backend}_{tail}"


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def choose_backend() -> tuple[str, str]:
    """(backend, what is left out and why)."""
    if torch.version.cuda is None:
        return "cpu", f"left out cuda: torch {torch.__version__} is a build without CUDA"
    if find_nvcc() is None:
        return "cpu", "left out cuda: nvcc not found; a CUDA torch cannot load this variant"
    return "cuda", "left out nothing: the cuda variant holds the CPU op too"


def choose_archs(requested: str | None, config: dict) -> list[str]:
    """Compute capabilities: as asked for, else the visible GPU's own, else build.toml's."""
    if requested:
        return requested.replace(",", ";").split(";")
    declared = config["kernel"]["ops_cuda"]["cuda-capabilities"]
    if not torch.cuda.is_available():
        return declared
    native = "{}.{}".format(*torch.cuda.get_device_capability())
    return [next((d for d in declared if d.rstrip("af") == native), native)]


def variant_name(backend: str, stable_abi: str) -> str:
    compute = "cpu" if backend == "cpu" else "cu" + torch.version.cuda.replace(".", "")
    return f"torch-stable-abi{stable_abi.replace('.', '')}-{compute}-{platform.machine()}-{platform.system().lower()}"


def compile_library(config: dict, backend: str, ops_name: str, archs: list[str]) -> Path:
    """Run CMake in _build/<backend>; returns the library. Up to date: about a second."""
    kernels = [k for k in config["kernel"].values() if k["backend"] == backend]
    sources = list(dict.fromkeys(sum((k["src"] for k in kernels), config["torch"]["src"])))
    major, minor = map(int, config["torch"]["stable-abi"][backend].split("."))
    torch_version = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
    include = sysconfig.get_paths()["include"]
    work = ROOT / "_build" / backend
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "OPS_NAME": ops_name,
        "BACKEND": backend,
        "TORCH_DIR": Path(torch.__file__).parent,
        "PYTHON_INCLUDE": include if Path(include, "Python.h").exists() else "",
        "STABLE_ABI": hex(major << 56 | minor << 48) + "ULL",
        "SOURCES": ";".join(s for s in sources if not s.endswith(".h")),
        "CXX_STD": 20 if torch_version >= (2, 12) else 17,
    }
    if backend == "cuda":
        options["CMAKE_CUDA_COMPILER"] = find_nvcc()
        options["CMAKE_CUDA_ARCHITECTURES"] = ";".join(a.replace(".", "") + "-real" for a in archs)
    # CMake and ninja of the running interpreter's environment come first.
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    cmake = shutil.which("cmake", path=env["PATH"])
    if cmake is None:
        sys.exit("build: cmake not found (pip install cmake)")
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=env["PATH"]) else []
    configure = [cmake, "-S", ROOT, "-B", work, *generator, *(f"-D{key}={value}" for key, value in options.items())]
    if options_changed(work, options):
        configure.insert(1, "--fresh")
    for command in (configure, [cmake, "--build", work, "--parallel"]):
        done = subprocess.run(
            list(map(str, command)), env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode != 0:
            sys.exit(f"{done.stdout}\nbuild: failed: {' '.join(map(str, command))}")
    return work / f"{ops_name}.abi3.so"


def options_changed(work: Path, options: dict) -> bool:
    """Whether the toolchain or torch differ from those of the configured tree."""
    stamp = work / "options.json"
    wanted = json.dumps({k: str(v) for k, v in options.items() if k != "OPS_NAME"})
    changed = not stamp.exists() or stamp.read_text() != wanted
    work.mkdir(parents=True, exist_ok=True)
    stamp.write_text(wanted)
    return changed


def write_variant(
    target: Path, config: dict, backend: str, ops_name: str, library: Path, archs: list[str], status: dict | None
) -> None:
    """Lay the variant out beside `target`, then move it there."""
    general, package = config["general"], config["general"]["name"].replace("-", "_")
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as temp:
        new = Path(temp, target.name)
        shutil.copytree(
            ROOT / "torch-ext" / package, new, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "_ops.py")
        )
        shutil.copy2(library, new)
        (new / "_ops.py").write_text(
            f"import torch\nfrom . import {ops_name}\nops = torch.ops.{ops_name}\n\n"
            "def add_op_namespace_prefix(op_name: str):\n"
            '    """\n    Prefix op by namespace.\n    """\n'
            f'    return f"{ops_name}::{{op_name}}"\n'
        )
        digest = Digest.hash_variant(DigestAlgorithm.SHA256, new)
        # Not built by kernel-builder: its version is given as that of `kernels`, without git.
        provenance = {"kernel-builder": {"version": kernels_version}}
        metadata = {
            "name": general["name"],
            "id": ops_name,
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "kernel-depends": [],
            "backend": {"type": backend} | ({"archs": sorted(archs)} if archs else {}),
            "digest": {"algorithm": "sha256", "files": dict(sorted(digest.files.items()))},
            "provenance": provenance | ({"kernel": status} if status else {}),
        }
        (new / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        if target.exists():
            target.rename(Path(temp, "former"))
        new.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--archs", help="compute capabilities, e.g. '8.0;9.0a' (default: the visible GPU's, else all of build.toml)"
    )
    args = parser.parse_args()
    Build.open(ROOT)
    config = tomllib.loads((ROOT / "build.toml").read_text())
    backend, left_out = choose_backend()
    archs = choose_archs(args.archs, config) if backend == "cuda" else []
    status = git_status()
    ops_name = build_id(config["general"]["name"], backend, status)
    target = ROOT / "build" / variant_name(backend, config["torch"]["stable-abi"][backend])
    library = compile_library(config, backend, ops_name, archs)
    write_variant(target, config, backend, ops_name, library, archs, status)
    shown = f" for {', '.join(archs)}" if archs else ""
    print(f"built {ops_name}{shown} in {target.relative_to(ROOT)} ({left_out})")


if __name__ == "__main__":
    main()
