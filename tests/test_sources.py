"""build.toml, CMake, the Makefile and the tree agree on what the sources are, and includes point one way."""

import os
import re
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
CONFIG = tomllib.loads((ROOT / "build.toml").read_text())
KERNELS = {kernel["backend"]: kernel["src"] for kernel in CONFIG["kernel"].values()}
# A source includes its own folder's files and those of what stands to the right of it.
LAYERS = ("ops", "group", "cuda/sm90", "cuda/sm80", "cuda/common", "cpu", "dispatch", "common")


def included_by(path: str) -> list[str]:
    """What a source includes of this repository, relative to its root."""
    names = re.findall(r'^\s*#include "([^"]+)"', (ROOT / path).read_text(), re.MULTILINE)
    return [os.path.normpath(Path(path).parent / name) for name in names]


def layer_of(path: str) -> str:
    folder = str(Path(path).parent)
    return folder.removeprefix("kernel-src/")


def in_tree() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "kernel-src").rglob("*") if path.is_file())


def test_the_tree_is_listed_once_for_each_backend():
    """CUDA has every source, the CPU those that no CUDA source is part of."""
    assert KERNELS.keys() == {"cpu", "cuda"}
    for sources in KERNELS.values():
        assert len(sources) == len(set(sources))
    assert sorted(KERNELS["cuda"]) == in_tree()
    assert set(KERNELS["cpu"]) < set(KERNELS["cuda"])
    assert not [source for source in KERNELS["cpu"] if "/cuda/" in source or source.endswith((".cu", ".cuh"))]


@pytest.mark.parametrize("backend", KERNELS)
def test_what_a_source_includes_is_listed_with_it(backend):
    found = {source: included_by(source) for source in KERNELS[backend]}
    assert any(found.values())
    headers = {*KERNELS[backend], "torch-ext/torch_binding.h", "torch-ext/python_module.h"}
    without_cuda = {
        source: [name for name in names if backend == "cuda" or name not in guarded(source)]
        for source, names in found.items()
    }
    missing = {source: set(names) - headers for source, names in without_cuda.items() if set(names) - headers}
    assert not missing


def guarded(path: str) -> list[str]:
    """What a source includes in CUDA builds alone."""
    text = (ROOT / path).read_text()
    blocks = re.findall(r"#if defined\(CUDA_KERNEL\)(.*?)#(?:else|endif)", text, re.DOTALL)
    names = [name for block in blocks for name in re.findall(r'#include "([^"]+)"', block)]
    return [os.path.normpath(Path(path).parent / name) for name in names]


def test_includes_point_one_way():
    """From the ops down to what all share."""
    sources = in_tree()
    assert {layer_of(source) for source in sources} == set(LAYERS)
    upward = [
        (source, name)
        for source in sources
        for name in included_by(source)
        if name != "torch-ext/torch_binding.h" and LAYERS.index(layer_of(name)) < LAYERS.index(layer_of(source))
    ]
    assert not upward


def test_kernels_are_in_headers_and_launches_in_sources():
    cuda = [source for source in in_tree() if source.endswith((".cu", ".cuh"))]
    assert {Path(source).suffix for source in cuda} == {".cu", ".cuh"}
    kernels = {source for source in cuda if "__global__" in (ROOT / source).read_text()}
    launches = {source for source in cuda if "<<<" in (ROOT / source).read_text()}
    assert kernels and all(source.endswith(".cuh") for source in kernels)
    assert launches and all(source.endswith(".cu") for source in launches)


def test_gpus_are_told_apart_in_one_place():
    """Which GPU it is, the dispatch folder asks alone; kernels and launchers ask for no architecture."""
    tells = re.compile(r"\bcapability;|\.capability\b|ComputeCapability")
    asking = {source for source in in_tree() if tells.search((ROOT / source).read_text())}
    assert asking == {f"kernel-src/dispatch/{name}" for name in ("device.h", "device.cu", "architecture.cpp")}
    asks = re.compile(r"is_sm90\(|has_sm80\(|architecture_of\(")
    choosing = {source for source in in_tree() if asks.search((ROOT / source).read_text())}
    assert {layer_of(source) for source in choosing} == {"dispatch", "ops"}


def test_nothing_else_has_a_list_of_sources():
    """CMake is given build.toml's list."""
    assert "${SOURCES}" in (ROOT / "CMakeLists.txt").read_text()
    for name in ("CMakeLists.txt", "Makefile", "scripts/build.py"):
        assert not re.search(r"kernel-src/[\w/]+\.(cpp|cuh?|h)\b", (ROOT / name).read_text()), name
