#!/usr/bin/env python3
"""Build the last commit twice, from two clones that have nothing in common, and compare the variants byte by byte.

    python scripts/reproduce.py [--backend cpu|cuda] [--archs "9.0a"] [--torch DIR] [--against VARIANT]

The clones lie at paths of different length and are built under another umask, time zone, locale, home and temporary
folder. Files and modes must be equal. `--against` compares with a variant that somebody else has built, a downloaded
one for example, whose metadata.json names the commit and the tools to have. Where `kernel-builder` is installed, the
CPU library is built twice by its own CMake, too.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# (folder, umask, environment) of each clone.
SURROUNDINGS = (
    ("a", 0o022, {"TZ": "UTC", "LC_ALL": "C", "LANGUAGE": "C"}),
    ("another/much longer path", 0o077, {"TZ": "Pacific/Apia", "LC_ALL": "tr_TR.UTF-8", "LANGUAGE": "tr"}),
)


def run(command: list, umask: int = 0o022, **options) -> None:
    done = subprocess.run(list(map(str, command)), preexec_fn=lambda: os.umask(umask), **options)
    if done.returncode != 0:
        sys.exit(f"reproduce: failed: {' '.join(map(str, command))}")


def clone(folder: Path, umask: int, commit: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, folder], umask)
    run(["git", "-C", folder, "checkout", "--quiet", commit], umask)


def files(variant: Path) -> dict[str, tuple[str, str]]:
    """Of each file and folder: its mode and the hash of what is in it. Bytecode is this machine's and left out."""
    found = {}
    for path in sorted(variant.rglob("*")):
        name = str(path.relative_to(variant))
        if "__pycache__" in name:
            continue
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[name] = (oct(path.stat().st_mode & 0o777), content)
    return found


def differences(one: Path, other: Path, modes: bool = True) -> list[str]:
    """What is not the same in two variants; without modes, since the Hub keeps none."""
    first, second = files(one), files(other)
    told = [f"{name} is only in {one if name in first else other}" for name in sorted(set(first) ^ set(second))]
    for name in sorted(set(first) & set(second)):
        (mode, content), (other_mode, other_content) = first[name], second[name]
        if content != other_content:
            told.append(f"{name} has other contents")
        if modes and mode != other_mode:
            told.append(f"{name} has mode {mode}, and {other_mode} in the other")
    return told


def build_apart(temp: Path, commit: str, arguments: list[str]) -> list[Path]:
    """The variant folders of two builds of `commit`."""
    variants = []
    for name, umask, environment in SURROUNDINGS:
        folder, home = temp / name / "lora-fused", temp / name / "home"
        clone(folder, umask, commit)
        home.mkdir(parents=True)
        scratch = {"HOME": str(home), "TMPDIR": str(home)}
        run([sys.executable, folder / "scripts" / "build.py", *arguments], umask,
            cwd=home, env=os.environ | environment | scratch)  # fmt: skip
        variants += [path for path in (folder / "build").iterdir() if path.is_dir()]
    return variants


def build_by_kernel_builder(temp: Path, commit: str) -> list[Path]:
    """The libraries of two builds by kernel-builder's own CMake."""
    libraries = []
    for name, umask, environment in SURROUNDINGS:
        folder = temp / "by kernel-builder" / name / "lora-fused"
        clone(folder, umask, commit)
        # CMake and ninja of the running interpreter's environment come first.
        env = os.environ | environment | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        run(["kernel-builder", "create-pyproject", "--unique-id", commit[:7], "--force", folder], umask, env=env)
        work = folder / "_build"
        run(["cmake", "-S", folder, "-B", work, "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_SKIP_RPATH=ON",
             f"-DPython3_EXECUTABLE={sys.executable}"], umask, env=env)  # fmt: skip
        run(["cmake", "--build", work, "--parallel"], umask, env=env)
        libraries += list(work.glob("*.abi3.so"))
    return libraries


def commit_to_build(against: Path | None) -> str:
    """The other variant's commit, else this checkout's."""
    if against is None:
        return subprocess.check_output(["git", "-C", ROOT, "rev-parse", "HEAD"], text=True).strip()
    metadata = json.loads((against / "metadata.json").read_text())
    origin = metadata.get("provenance") or metadata.get("local-build") or {}
    if "kernel" not in origin:
        sys.exit(f"reproduce: {against}/metadata.json names no commit")
    if origin["kernel"]["dirty"]:
        sys.exit(f"reproduce: {against} was built from changes that are not committed")
    return origin["kernel"]["commit"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("cpu", "cuda"), help="fail rather than build another")
    parser.add_argument("--archs", help="compute capabilities of a CUDA variant (default: build.toml's)")
    parser.add_argument("--torch", type=Path, help="the torch folder of an unpacked wheel")
    parser.add_argument("--against", type=Path, help="a variant to compare with")
    args = parser.parse_args()
    commit = commit_to_build(args.against)
    arguments = ["--archs", args.archs or "all"]
    arguments += ["--backend", args.backend] if args.backend else []
    arguments += ["--torch", str(args.torch.resolve())] if args.torch else []
    with tempfile.TemporaryDirectory() as folder:
        temp, told = Path(folder), []
        one, other = build_apart(temp, commit, arguments)
        told += differences(one, other)
        if args.against:
            told += differences(one, args.against, modes=False)
        if shutil.which("kernel-builder"):
            first, second = build_by_kernel_builder(temp, commit)
            told += [f"{first.name} by kernel-builder has other contents"] * (first.read_bytes() != second.read_bytes())
        else:
            print("reproduce: kernel-builder is not installed, its own CMake is not tried")
        library = next(one.glob("*.so"))
        hashed = hashlib.sha256(library.read_bytes()).hexdigest()
        for line in told:
            print(f"reproduce: {line}")
        print(f"reproduce: {one.name} of {commit[:7]}: " + ("not the same" if told else "the same bytes each time"))
        print(f"{hashed}  {library.name}")
    sys.exit(bool(told))


if __name__ == "__main__":
    main()
