"""The repository's build files and the variant that was built from them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kernels._rust import Backend, Build, Digest, DigestAlgorithm, DigestValidationError, Metadata

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from library import Library

CONFIG = tomllib.loads((ROOT / "build.toml").read_text())


@pytest.fixture
def variant(lora_fused) -> Path:
    return Path(lora_fused.__file__).parent


def declared_sources() -> set:
    return set(CONFIG["torch"]["src"]).union(*(k["src"] for k in CONFIG["kernel"].values()))


def test_build_toml_is_valid():
    assert Build.open(ROOT).general.backends == [Backend.CPU, Backend.CUDA]
    assert {k["backend"] for k in CONFIG["kernel"].values()} == set(CONFIG["general"]["backends"])


def test_build_toml_lists_every_source():
    found = [*(ROOT / "kernel-src").rglob("*"), *(ROOT / "torch-ext").glob("*")]
    suffixes = {".h", ".cuh", ".cpp", ".cu"}
    assert declared_sources() == {str(p.relative_to(ROOT)) for p in found if p.suffix in suffixes}


def test_variant_digest(variant):
    metadata = Metadata.read_from_file(variant / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))


def test_digest_notices_a_changed_file(variant, tmp_path):
    copy = tmp_path / variant.name
    subprocess.run(["cp", "-r", variant, copy], check=True)
    (copy / "__init__.py").write_text("changed")
    digest = Metadata.read_from_file(copy / "metadata.json").digest
    with pytest.raises(DigestValidationError, match="__init__.py"):
        digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, copy))


def test_metadata_describes_the_build(variant):
    metadata = json.loads((variant / "metadata.json").read_text())
    general = CONFIG["general"]
    assert [metadata[k] for k in ("name", "version", "license")] == [general[k] for k in ("name", "version", "license")]
    backend = metadata["backend"]["type"]
    assert f"-{backend.replace('cuda', 'cu')}" in variant.name
    assert bool(metadata["backend"].get("archs")) == (backend == "cuda")
    assert re.fullmatch(rf"_lora_fused_{backend}_[0-9a-f]{{7}}(_dirty)?", metadata["id"])
    assert "provenance" not in metadata, "kernel-builder did not build this"
    kernel = metadata["local-build"].get("kernel")
    if kernel:
        assert metadata["id"].startswith(f"_lora_fused_{backend}_{kernel['commit'][:7]}")


def test_one_id_everywhere(lora_fused, variant):
    ops_id = json.loads((variant / "metadata.json").read_text())["id"]
    assert [p.name for p in variant.glob("*.so")] == [f"{ops_id}.abi3.so"]
    ops = lora_fused._ops
    assert ops.add_op_namespace_prefix("row_norm") == f"{ops_id}::row_norm"
    assert ops.ops.row_norm.default.name() == f"{ops_id}::row_norm"


def test_library_is_abi3(variant):
    """No symbol of C++ torch or of CPython outside the stable ABIs, no path of this machine."""
    library = next(variant.glob("*.abi3.so"))
    data = library.read_bytes()
    python_api = set(re.findall(rb"\0(_?Py[A-Z]\w+)\0", data))
    assert {n for n in python_api if not n.startswith(b"PyInit_")} <= {b"PyModule_Create2"}
    assert not re.search(rb"\0_ZNK?(2at|5torch8autograd|3c10\w*(Tensor|TypeMeta))", data)
    assert str(ROOT).encode() not in data
    assert b"\0libstdc++.so.6\0" in data, "exceptions need the shared C++ runtime"


def test_lookups_of_torch_have_an_old_name(variant):
    """torch's headers look symbols up from 2.15 on, by a name of glibc 2.34 where a machine has that."""
    asks = dict(Library.read(next(variant.glob("*.abi3.so"))).asks)
    assert {asks["dlopen"], asks["dlsym"]} <= {"GLIBC_2.2.5", "GLIBC_2.17"}


def test_local_kernels_resolves_the_hub_name(variant):
    code = (
        "import sys; from kernels import get_kernel; "
        f"print(get_kernel({CONFIG['general']['hub']['repo-id']!r}, version=1).__file__)"
    )
    env = os.environ | {"LOCAL_KERNELS": f"{CONFIG['general']['hub']['repo-id']}={variant.parent}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == variant


def test_flake_lock():
    lock = json.loads((ROOT / "flake.lock").read_text())
    nodes = lock["nodes"]
    assert lock["version"] == 7 and lock["root"] == "root"
    assert nodes["root"] == {"inputs": {"kernel-builder": "kernel-builder"}}

    def resolve(reference):
        if isinstance(reference, str):
            return reference
        name = "root"
        for step in reference:
            name = resolve(nodes[name]["inputs"][step])
        return name

    reached = {"root"} | {resolve(r) for node in nodes.values() for r in node.get("inputs", {}).values()}
    assert reached == set(nodes)
    for name in set(nodes) - {"root"}:
        locked = nodes[name]["locked"]
        assert re.fullmatch(r"[0-9a-f]{40}", locked["rev"])
        assert re.fullmatch(r"sha256-[A-Za-z0-9+/]{43}=", locked["narHash"])
    builder = nodes["kernel-builder"]
    assert builder["locked"]["rev"] == "8ac69fc542a4306eade0759ef7c45b4f2ae57df0"
    assert builder["locked"]["narHash"] == "sha256-h7n5IcWCjzbAKh+cyvKCZYix4psCEFcAoyWyTABcexs="
    assert builder["original"] == {"owner": "huggingface", "repo": "kernels", "type": "github"}
    assert 'kernel-builder.url = "github:huggingface/kernels"' in (ROOT / "flake.nix").read_text()


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=lambda p: p.name)
def test_requirements_are_pinned(path):
    lines = [x for x in path.read_text().splitlines() if x and not x.startswith(("#", "-r "))]
    assert all(re.match(r"[A-Za-z0-9_-]+==[0-9.]+(;|$)", line) for line in lines), lines


def test_ci_runs_the_test_command():
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make lint", "make types", "make test"]
