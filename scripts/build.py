#!/usr/bin/env python3
"""Build the kernel for this machine, without Nix, into build/<variant>/.

The variant is laid out as the Kernel Hub requires: the Python package, `_ops.py`, the
abi3 library and `metadata.json` with the files' digest and what they were built from. CMake
compiles; sources, versions and capabilities come from build.toml; `kernels` validates
build.toml and hashes the variant. The same commit and tools give the same bytes, wherever
and by whomever they are built. A failing build leaves the former variant in place.
"""

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

from kernels._rust import Build, Digest, DigestAlgorithm
from library import Library

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


class Torch(NamedTuple):
    """A torch package to compile against, installed or unpacked from its wheel: it is not imported.

    `version` without the local part, `full_version` with it, `cuda` such as "13.0", None of a build without CUDA.
    """

    folder: Path
    version: tuple[int, int]
    full_version: str
    cuda: str | None

    @classmethod
    def at(cls, folder: Path) -> "Torch":
        told: dict = {}
        try:
            exec((folder / "version.py").read_text(), told)
        except OSError as error:
            sys.exit(f"build: {folder} is no torch package ({error.strerror}: version.py)")
        major, minor = told["__version__"].split("+")[0].split(".")[:2]
        return cls(folder.resolve(), (int(major), int(minor)), told["__version__"], told["cuda"])

    @classmethod
    def installed(cls) -> "Torch":
        spec = importlib.util.find_spec("torch")
        if spec is None:
            sys.exit("build: torch is not installed (make venv), and no --torch names one")
        return cls.at(Path(spec.origin).parent)


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


def find_nvcc(torch: Torch) -> str | None:
    """In PATH, in CUDA_HOME, or from the wheels beside torch (requirements-cuda.txt)."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    wheels = sorted(torch.folder.parent.glob("nvidia/cu*/bin"))
    return next((p for folder in (None, f"{home}/bin", *wheels) if (p := shutil.which("nvcc", path=folder))), None)


def with_libraries_of_wheel(nvcc: str, work: Path) -> dict[str, str]:
    """Environment in which the nvcc of a wheel finds its libraries: they lie in lib, not lib64, and no link without a
    version leads to the runtime."""
    libraries = Path(nvcc).parent.parent / "lib"
    if "nvidia" not in libraries.parts:
        return {}
    links = work / "lib"
    links.mkdir(parents=True, exist_ok=True)
    for runtime in libraries.glob("libcudart.so.*"):
        (links / "libcudart.so").unlink(missing_ok=True)
        (links / "libcudart.so").symlink_to(runtime)
    return {
        "LIBRARY_PATH": os.pathsep.join([str(libraries), str(links), os.environ.get("LIBRARY_PATH", "")]).rstrip(":")
    }


def choose_backend(torch: Torch) -> tuple[str, str]:
    """(backend, what is left out and why). `kernels` gives a CUDA torch no CPU variant, with a GPU or without."""
    if torch.cuda is None:
        return "cpu", f"left out cuda: torch {torch.full_version} is a build without CUDA"
    if find_nvcc(torch) is None:
        sys.exit(
            f"build: torch {torch.full_version} is a CUDA build, which loads CUDA variants alone; nvcc is not found.\n"
            "Without a GPU take torch's CPU build: pip install torch=="
            f"{torch.full_version.split('+')[0]} --index-url https://download.pytorch.org/whl/cpu\n"
            "With one install the CUDA toolkit, or nvcc's wheels, which requirements-cuda.txt names, of CUDA "
            f"{torch.cuda}."
        )
    return "cuda", "left out nothing: the cuda variant holds the CPU op too"


def choose_archs(requested: str | None, config: dict) -> list[str]:
    """Compute capabilities: as asked for ("all" are build.toml's), else the visible GPU's own, else build.toml's."""
    declared = config["kernel"]["ops_cuda"]["cuda-capabilities"]
    if requested and requested != "all":
        return requested.replace(",", ";").split(";")
    native = None if requested else visible_capability()
    if native is None:
        return declared
    return [next((d for d in declared if d.rstrip("af") == native), native)]


def visible_capability() -> str | None:
    """ "9.0" of the first GPU that the installed torch sees."""
    import torch

    if not torch.cuda.is_available():
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability())


def variant_name(backend: str, torch: Torch, stable_abi: str) -> str:
    compute = "cpu" if backend == "cpu" else "cu" + torch.cuda.replace(".", "")
    return f"torch-stable-abi{stable_abi.replace('.', '')}-{compute}-{platform.machine()}-{platform.system().lower()}"


def compile_library(config: dict, backend: str, torch: Torch, ops_name: str, archs: list[str], limit: int) -> Path:
    """Run CMake in _build/<backend>; returns the library. Up to date: about a second."""
    kernels = [k for k in config["kernel"].values() if k["backend"] == backend]
    components = [config["torch"], *kernels]
    sources = list(dict.fromkeys(itertools.chain.from_iterable(c["src"] for c in components)))
    major, minor = map(int, config["torch"]["stable-abi"][backend].split("."))
    include = sysconfig.get_paths()["include"]
    work = ROOT / "_build" / backend
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "OPS_NAME": ops_name,
        "BACKEND": backend,
        "TORCH_DIR": torch.folder,
        "PYTHON_INCLUDE": include if Path(include, "Python.h").exists() else "",
        "STABLE_ABI": hex(major << 56 | minor << 48) + "ULL",
        "SOURCES": ";".join(s for s in sources if s.endswith((".cpp", ".cu"))),
        "CXX_FLAGS": ";".join(dict.fromkeys(itertools.chain.from_iterable(c.get("cxx-flags", []) for c in components))),
        "CUDA_FLAGS": ";".join(dict.fromkeys(itertools.chain.from_iterable(c.get("cuda-flags", []) for c in kernels))),
        "CXX_STD": 20 if torch.version >= (2, 12) else 17,
    }
    if backend == "cuda":
        options["CMAKE_CUDA_COMPILER"] = find_nvcc(torch)
        options["CMAKE_CUDA_ARCHITECTURES"] = ";".join(a.replace(".", "") + "-real" for a in archs)
    # CMake and ninja of the running interpreter's environment come first.
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if backend == "cuda":
        env |= with_libraries_of_wheel(options["CMAKE_CUDA_COMPILER"], work)
    cmake = shutil.which("cmake", path=env["PATH"])
    if cmake is None:
        sys.exit("build: cmake not found (pip install cmake)")
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=env["PATH"]) else []
    configure = [cmake, "-S", ROOT, "-B", work, *generator, *(f"-D{key}={value}" for key, value in options.items())]
    if options_changed(work, options):
        configure.insert(1, "--fresh")
    run(configure, env, limit, show=False)
    run([cmake, "--build", work, "--parallel"], env, limit, show=True)
    return work / f"{ops_name}.abi3.so"


def run(command: list, env: dict, limit: int, show: bool) -> None:
    """Run a command for at most `limit` seconds, its lines of progress shown on request and all of them on failure."""
    command, lines, late = list(map(str, command)), [], threading.Event()
    process = subprocess.Popen(
        command, env=env, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    def stop() -> None:
        late.set()
        os.killpg(process.pid, 9)

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        for line in process.stdout:
            lines.append(line)
            if show and line.startswith("["):
                print(line.split(" -o ")[0].rstrip(), flush=True)
        status = process.wait()
    finally:
        timer.cancel()
    shown = f"{''.join(lines)}\nbuild:"
    if late.is_set():
        sys.exit(f"{shown} stopped after {limit} s (--time-limit): {' '.join(command)}")
    if status != 0:
        sys.exit(f"{shown} failed: {' '.join(command)}")


def options_changed(work: Path, options: dict) -> bool:
    """Whether the toolchain or torch differ from those of the configured tree."""
    stamp = work / "options.json"
    wanted = json.dumps({k: str(v) for k, v in options.items() if k != "OPS_NAME"})
    changed = not stamp.exists() or stamp.read_text() != wanted
    work.mkdir(parents=True, exist_ok=True)
    stamp.write_text(wanted)
    return changed


def tools(work: Path, torch: Torch) -> dict[str, str]:
    """What has to be the same for the same bytes: torch and the compilers that CMake found."""
    found = {"torch": torch.full_version}
    for language in ("CXX", "CUDA"):
        for path in sorted(work.glob(f"CMakeFiles/*/CMake{language}Compiler.cmake")):
            told = dict(re.findall(r'set\((\w+) "(.*)"\)', path.read_text()))
            prefix = f"CMAKE_{language}_COMPILER"
            found[language] = f"{told[prefix + '_ID']} {told[prefix + '_VERSION']}"
    return found


def write_variant(
    target: Path, config: dict, backend: str, ops_name: str, library: Path | None, archs: list[str], origin: dict
) -> None:
    """Lay the variant out beside `target`, then move it there."""
    general, package = config["general"], config["general"]["name"].replace("-", "_")
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as temp:
        new = Path(temp, target.name)
        shutil.copytree(
            ROOT / "torch-ext" / package, new, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "_ops.py")
        )
        if library:
            shutil.copy2(library, new)
        opened = f"from . import {ops_name}\n" if library else ""
        (new / "_ops.py").write_text(
            f"import torch\n{opened}ops = torch.ops.{ops_name}\n\n"
            "def add_op_namespace_prefix(op_name: str):\n"
            '    """\n    Prefix op by namespace.\n    """\n'
            f'    return f"{ops_name}::{{op_name}}"\n'
        )
        digest = Digest.hash_variant(DigestAlgorithm.SHA256, new)
        # `provenance` is for builds of kernel-builder's, which this is not.
        metadata = {
            "name": general["name"],
            "id": ops_name,
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "kernel-depends": [],
            "backend": {"type": backend} | ({"archs": sorted(archs)} if archs else {}),
            "digest": {"algorithm": "sha256", "files": dict(sorted(digest.files.items()))},
            "local-build": origin,
        }
        (new / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        for path in (new, *new.rglob("*")):  # as in every other build, whatever the umask
            path.chmod(0o755 if path.is_dir() else 0o644)
        if target.exists():
            target.rename(Path(temp, "former"))
        new.rename(target)


def portability(library: Path) -> str:
    """What stands in the way of other machines; empty where nothing does."""
    if platform.system() != "Linux":
        return ""
    read = Library.read(library)
    too_new = read.too_new() + read.borrowed()
    if not too_new:
        return ""
    return (
        f"FOR THIS MACHINE ONLY: {library.name} asks for {', '.join(too_new)}, which manylinux_2_28 does not have. "
        "Do not publish it; cmake/glibc_2_28.cpp is where older names are given."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--archs",
        help="compute capabilities, e.g. '8.0;9.0a', or 'all' of build.toml (default: the visible GPU's, else all)",
    )
    parser.add_argument(
        "--torch",
        type=Path,
        help="the torch folder of an unpacked wheel to compile against (default: the installed one)",
    )
    parser.add_argument("--backend", choices=("cpu", "cuda"), help="fail rather than build another")
    parser.add_argument("--time-limit", type=int, default=5400, help="seconds (%(default)s)")
    args = parser.parse_args()
    Build.open(ROOT)
    config = tomllib.loads((ROOT / "build.toml").read_text())
    torch = Torch.at(args.torch) if args.torch else Torch.installed()
    backend, left_out = choose_backend(torch)
    if args.backend not in (None, backend):
        sys.exit(f"build: cannot build {args.backend} ({left_out}); --torch names another torch")
    archs = choose_archs(args.archs, config) if backend == "cuda" else []
    status = git_status()
    ops_name = build_id(config["general"]["name"], backend, status)
    target = ROOT / "build" / variant_name(backend, torch, config["torch"]["stable-abi"][backend])
    library = compile_library(config, backend, torch, ops_name, archs, args.time_limit)
    origin = tools(ROOT / "_build" / backend, torch) | ({"kernel": status} if status else {})
    write_variant(target, config, backend, ops_name, library, archs, origin)
    shown = f" for {', '.join(archs)}" if archs else ""
    print(f"built {ops_name}{shown} in {target.relative_to(ROOT)} ({left_out})")
    if warning := portability(library):
        print(f"build: {warning}", file=sys.stderr)


if __name__ == "__main__":
    main()
