#!/usr/bin/env python3
"""Hold every variant in build/ against what the Kernel Hub and a stranger's machine ask of it.

    python scripts/check_build.py [--build DIR] [--release] [--torch DIR]

Each problem is one line: the variant, what is wrong, what to do. The exit status is 1 where there is one. What cannot
be looked at on this machine, as the import of a CUDA variant without a CUDA torch, is said and is no problem.
`--release` asks a CUDA variant for all of build.toml's architectures, and for sources that are committed.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from kernels._rust import Backend, Digest, DigestAlgorithm, DigestValidationError, Metadata
from library import Library

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYTHON_ABI = "3.9"
MANYLINUX = "manylinux_2_28"
NOARCH = re.compile(r"torch-(rocm|xpu)")
VARIANT = re.compile(r"torch-stable-abi(\d)(\d+)-(cpu|cu\d+)-(x86_64|aarch64)-linux")
SUFFIXES = {".py", ".json", ".so"}
MOST_MEGABYTES = {"cpu": 4, "cuda": 64, "rocm": 1, "xpu": 1}
SYSTEM_LIBRARIES = r"lib(stdc\+\+\.so\.6|gcc_s\.so\.1|m\.so\.6|c\.so\.6|dl\.so\.2|pthread\.so\.0|rt\.so\.1)|ld-linux-.*"
TORCH_LIBRARIES = r"lib(torch|torch_cpu|c10)\.so"
CUDA_LIBRARIES = r"lib(torch_cuda|c10_cuda)\.so|libcudart\.so\.\d+"
# Ops that a CPU variant registers and has no kernel of.
GPU_ALONE = {"column_norm", "dt_db", "embedding_backward", "embedding_forward", "gemm", "gemm_group", "skinny"}
MARKERS = {"_edata", "_end", "__bss_start", "_init", "_fini"}  # of the linker's, and on aarch64 as well
MARKERS |= {"__bss_start__", "_bss_end__", "__bss_end__", "__end__"}
TORCH_NAMESPACES = re.compile(r"(?<!\d)(?:3c10|2at|6caffe2|5torch(?!6stable))")
# Absolute paths of at least three parts, as no other string of the library looks.
BUILD_PATH = re.compile(rb"/(?:home|root|tmp|work|nix|build|mnt|opt|usr|var|Users)/[\w.+-]+/[\w.+/-]+")


def backend_of(variant: Path) -> str:
    """What the name says; "cpu" where it is none."""
    noarch, name = NOARCH.fullmatch(variant.name), VARIANT.fullmatch(variant.name)
    return noarch[1] if noarch else "cpu" if not name or name[3] == "cpu" else "cuda"


def config() -> dict:
    return tomllib.loads((ROOT / "build.toml").read_text())


def shim_versions() -> dict[str, tuple[int, int]]:
    """Each function of torch's stable C interface, with the version of torch that brought it, as the installed torch's
    headers have it; (0, 0) where they name none."""
    include, versions = Path(torch.__file__).parent / "include" / "torch" / "csrc", {}
    headers = [include / "stable" / "c" / "shim.h", *(include / "inductor" / "aoti_torch").rglob("*.h")]
    for header in headers:
        conditions = []
        for line in header.read_text().splitlines():
            if re.match(r"\s*#\s*if", line):
                since = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)_\d+", line)
                conditions.append(tuple(map(int, since.groups())) if since else (0, 0))
            elif re.match(r"\s*#\s*endif", line):
                conditions.pop()
            for name in re.findall(r"\b(?:aoti_)?torch_\w+(?=\()", line):
                versions.setdefault(name, max(conditions, default=(0, 0)))
    return versions


def check_layout(variant: Path) -> list[str]:
    """The name, and that nothing lies in the folder but a package of plain files and its library."""
    problems = []
    noarch = NOARCH.fullmatch(variant.name)
    if not noarch and not VARIANT.fullmatch(variant.name):
        problems.append(f"{variant.name} is no name that `kernels` looks for: have build.py name the folder")
    for name in ("__init__.py", "_ops.py", "metadata.json"):
        if not (variant / name).is_file():
            problems.append(f"{name} is missing: build again")
    for path in sorted(variant.rglob("*")):
        name = path.relative_to(variant)
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            problems.append(f"{name} is a link or no plain file, which the Hub does not keep: copy what it stands for")
        elif (path.is_file() and path.suffix not in SUFFIXES) or path.name.startswith("."):
            problems.append(f"{name} is none of {', '.join(sorted(SUFFIXES))}: keep it out of the package")
        elif path.name == "__pycache__":
            problems.append(f"{name} holds this machine's bytecode: delete it")
        elif path.stat().st_mode & 0o777 != (0o755 if path.is_dir() else 0o644):
            mode = oct(path.stat().st_mode & 0o777)
            problems.append(f"{name} has mode {mode}, another than every other build of it: build again")
    libraries = [str(path.relative_to(variant)) for path in variant.rglob("*.so")]
    if noarch and libraries:
        problems.append(f"libraries are {libraries}, expected none in a variant without native code: build again")
    elif not noarch and (len(libraries) != 1 or not libraries[0].endswith(".abi3.so")):
        problems.append(f"libraries are {libraries}, expected a single .abi3.so: build again in an empty folder")
    return problems


def check_metadata(variant: Path, release: bool = False) -> list[str]:
    """metadata.json against build.toml, the variant's name and the files."""
    try:
        metadata = Metadata.read_from_file(variant / "metadata.json")
        written = json.loads((variant / "metadata.json").read_text())
    except Exception as error:
        return [f"metadata.json cannot be read ({error}): build again"]
    general, problems, declared = config()["general"], [], config()["kernel"]["ops_cuda"]["cuda-capabilities"]
    backend = backend_of(variant)
    kinds = {"cpu": Backend.CPU, "cuda": Backend.CUDA, "rocm": Backend.ROCm, "xpu": Backend.XPU}
    expected = {
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "python-depends": general.get("python-depends", []),
    }
    for key, value in expected.items():
        if written.get(key) != value:
            problems.append(f"metadata.json has {key} = {written.get(key)!r}, expected {value!r}: build again")
    archs = written["backend"].get("archs", [])
    if metadata.backend.backend_type != kinds[backend]:
        problems.append(f"metadata.json has backend = {written['backend']!r}, but the name says {backend}: build again")
    elif backend == "cuda" and not (set(archs) == set(declared) if release else archs and set(archs) <= set(declared)):
        problems.append(f"is built for {archs}, and build.toml lists {declared}: make build-cuda")
    if release and metadata.id.endswith("_dirty"):
        problems.append("is built from changes that are not committed: commit and build again")
    if not re.fullmatch(rf"_{general['name'].replace('-', '_')}_{backend}_[0-9a-z_]+", metadata.id):
        problems.append(f"metadata.json has id = {metadata.id!r}, which does not name kernel and backend: build again")
    noarch = NOARCH.fullmatch(variant.name)
    if not noarch and not (variant / f"{metadata.id}.abi3.so").is_file():
        problems.append(f"no {metadata.id}.abi3.so beside metadata.json, whose id it is: build again")
    # kernel-builder's _ops.py of a variant without native code puts the name together when it is imported.
    named = metadata.id.rpartition(f"_{backend}_")[2] if noarch else f"torch.ops.{metadata.id}\n"
    if named not in (variant / "_ops.py").read_text():
        problems.append(f"_ops.py does not import {metadata.id}, metadata.json's id: build again")
    if metadata.digest is None:
        return [*problems, "metadata.json has no digest, so that nobody can tell a damaged file: build again"]
    try:
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    except DigestValidationError as error:
        changed = ", ".join(str(violation) for violation in error.violations)
        problems.append(f"files are not those of metadata.json's digest ({changed}): build again, do not edit build/")
    return problems


def check_size(variant: Path) -> list[str]:
    size = sum(path.stat().st_size for path in variant.rglob("*") if path.is_file()) / 1e6
    most = MOST_MEGABYTES[backend_of(variant)]
    return [f"{size:.1f} MB, more than {most}: see what grew, or raise MOST_MEGABYTES"] if size > most else []


def check_library(path: Path, backend: str, torch_abi: tuple[int, int]) -> list[str]:
    """The library's symbols, needs and strings, with no look at the rest of the variant."""
    try:
        library = Library.read(path)
    except ValueError as error:
        return [f"{error}: build again"]
    problems = [*_symbols(path, library), *_torch_symbols(library, torch_abi)]
    allowed = "|".join([SYSTEM_LIBRARIES, TORCH_LIBRARIES, *([CUDA_LIBRARIES] if backend == "cuda" else [])])
    for name in library.needed:
        if not re.fullmatch(allowed, name):
            problems.append(f"{path.name} needs {name}, which torch does not bring: link without it")
    if backend == "cuda" and not any(name.startswith("libcudart.so") for name in library.needed):
        problems.append(f"{path.name} holds a CUDA runtime of its own: set CMAKE_CUDA_RUNTIME_LIBRARY to Shared")
    for tag, value in library.searches:
        problems.append(f"{path.name} has {tag} [{value}], a path of the building machine: link with CMAKE_SKIP_RPATH")
    for name in library.offers:
        if name != f"PyInit_{path.name.split('.')[0]}" and name not in MARKERS and not _is_of_libstdcxx(name):
            problems.append(f"{path.name} exports {name}, which another library's could replace: hide it")
    data = path.read_bytes()
    for found in sorted({*BUILD_PATH.findall(data), *re.findall(re.escape(str(ROOT).encode()), data)}):
        problems.append(
            f"{path.name} names {found.decode()}, a path of the building machine: map it (-ffile-prefix-map)"
        )
    for found in sorted(set(re.findall(rb"tmpxft_\w+", data))):
        problems.append(f"{path.name} names {found.decode()}, a process of nvcc's: use --objdir-as-tempdir")
    return problems


def _is_of_libstdcxx(name: str) -> bool:
    """Whether a mangled name is of namespace std or __gnu_cxx, whose headers make it visible: all libraries share
    it."""
    return re.match(r"_Z(T[ISVT]|GV|Z)*N?K?[RO]?(St|S[absiod]|9__gnu_cxx)", name) is not None


def _symbols(path: Path, library: Library) -> list[str]:
    """abi3 and manylinux: what the loader reads, and kernel-builder's own check, which reads a table that `strip`
    removes and no version that is no number."""
    import kernel_abi_check

    checked, problems = kernel_abi_check.ObjectFile(str(path)), []
    for violation in checked.check_python_abi(PYTHON_ABI):
        problems.append(f"{path.name} asks for {violation.name}, not in abi3 of Python {PYTHON_ABI}: do without it")
    too_new = library.too_new() or [f"{v.name}@{v.dep}_{v.version}" for v in checked.check_manylinux(MANYLINUX)]
    for symbol in too_new:
        problems.append(
            f"{path.name} asks for {symbol}, newer than {MANYLINUX}: give it an old name in cmake/glibc_2_28.cpp"
        )
    python = {name for name, _ in library.asks if re.match(r"_?Py[A-Z_]", name)}
    if python - {"PyModule_Create2"}:
        names = ", ".join(sorted(python - {"PyModule_Create2"}))
        problems.append(f"{path.name} asks Python for {names}: its module needs PyModule_Create2 alone")
    return problems


def _torch_symbols(library: Library, abi: tuple[int, int]) -> list[str]:
    """torch only through the C functions of its stable interface, none newer than `abi`."""
    known, problems, newest = shim_versions(), [], ".".join(map(str, abi))
    for name, _ in library.asks:
        if name.startswith(("torch_", "aoti_torch_")):
            since = known.get(name)
            if since is None:
                problems.append(f"asks torch for {name}, which its stable headers do not declare: do without it")
            elif since > abi:
                problems.append(f"asks torch for {name}, new in {since[0]}.{since[1]}: do without it, or raise the "
                                f"stable-abi of build.toml from {newest}")  # fmt: skip
        elif name.startswith("_Z") and TORCH_NAMESPACES.search(name):
            problems.append(f"asks for {name}, C++ of one version of torch: use torch/csrc/stable alone")
    return problems


def check_import(variant: Path, other_torch: Path | None = None) -> tuple[list[str], str]:
    """(problems, what could not be looked at) of importing the variant and nothing else, with the installed torch or,
    for a CUDA variant, with the torch folder `other_torch`."""
    cuda, noarch = backend_of(variant) == "cuda", NOARCH.fullmatch(variant.name)
    if not noarch and not variant.name.endswith(f"-{platform.machine()}-linux"):
        return [], f"not imported: this is a {platform.machine()} machine"
    if cuda and torch.version.cuda is None and other_torch is None:
        return [], f"not imported: torch {torch.__version__} is a build without CUDA"
    keep = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ}
    if cuda and other_torch:
        keep["PYTHONPATH"] = str(other_torch.resolve().parent)
    script = Path(__file__).with_name("bare_import.py")
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(script), str(variant.resolve())],
            cwd=home, env=keep | {"HOME": home, "LC_ALL": "C"}, capture_output=True, text=True,
        )  # fmt: skip
        # Any process that asks CUDA's driver for GPUs has its .nv there: torch's first backward does.
        left = sorted(str(path.relative_to(home)) for path in Path(home).rglob("*"))
        left = [name for name in left if Path(name).parts[0] != ".nv"]
    if done.returncode != 0:
        return [f"its import ended the process (status {done.returncode}): {done.stderr.strip()[-500:]}"], ""
    told = json.loads(done.stdout.splitlines()[-1])
    if "no_torch" in told:
        return [], f"not imported: no torch ({told['no_torch']})"
    problems = [f"its import {effect}: move that to where it is used" for effect in told["effects"]]
    if told["error"]:
        problems.insert(0, f"cannot be imported and used without peft, triton and numpy: {told['error']}")
    problems += [f"its import left {name} in the home folder: move that to where it is used" for name in left]
    namespace = json.loads((variant / "metadata.json").read_text())["id"]
    for op, devices in told["ops"].items():
        if not op.startswith(f"{namespace}::"):
            problems.append(f"registers {op}, outside of its own namespace {namespace}: use TORCH_EXTENSION_NAME")
        elif not devices and (cuda or op.rpartition("::")[2] not in GPU_ALONE):
            problems.append(f"registers {op} without a kernel: add one where it is defined")
    if noarch:
        return problems, ""
    if not told["error"] and not any("CPU" in devices for devices in told["ops"].values()):
        problems.append("registers no op with a CPU kernel: see torch_binding.cpp")
    return problems, ""


def check_variant(variant: Path, release: bool = False, other_torch: Path | None = None) -> tuple[list[str], str]:
    """(problems, what could not be looked at) of one variant."""
    problems = [*check_layout(variant), *check_metadata(variant, release), *check_size(variant)]
    name = VARIANT.fullmatch(variant.name)
    for library in sorted(variant.rglob("*.so")):
        abi = (int(name[1]), int(name[2])) if name else (0, 0)
        problems += check_library(library, backend_of(variant), abi)
        if not problems and "local-build" in json.loads((variant / "metadata.json").read_text()):
            for symbol in Library.read(library).borrowed():
                problems.append(f"{library.name} asks torch's libraries for {symbol}, newer than {MANYLINUX}: define "
                                "it in cmake/glibc_2_28.cpp")  # fmt: skip
    if problems:
        return problems, "not imported, because of the above"
    return check_import(variant, other_torch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="the folder of variants")
    parser.add_argument("--release", action="store_true", help="all architectures, and nothing that is not committed")
    parser.add_argument("--torch", type=Path, help="the folder of a CUDA torch to import a CUDA variant with")
    args = parser.parse_args()
    # kernel-builder's result has a folder of benchmarks, too.
    variants = sorted(
        {path.parent for name in ("metadata.json", "__init__.py") for path in args.build.glob(f"*/{name}")}
    )
    if not variants:
        sys.exit(f"check-build: no variant in {args.build}: make build")
    failed = False
    for variant in variants:
        problems, not_seen = check_variant(variant, args.release, args.torch)
        for problem in problems:
            print(f"{variant.name}: {problem}")
        size = sum(path.stat().st_size for path in variant.rglob("*") if path.is_file()) / 1e6
        verdict = f"{len(problems)} problems" if problems else f"as the Hub asks, {size:.1f} MB"
        print(f"{variant.name}: {verdict}" + f" ({not_seen})" * bool(not_seen))
        failed |= bool(problems)
    sys.exit(failed)


if __name__ == "__main__":
    main()
