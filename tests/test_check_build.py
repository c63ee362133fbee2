"""What `make check-build` lets pass and what it refuses, on copies of the built variant with a fault each."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernels._rust import Digest, DigestAlgorithm
from kernels.resolver import resolve_local_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import check_build

BUILT = resolve_local_kernel(ROOT / "build", backend=None).variant_path  # this environment's


@pytest.fixture
def variant(tmp_path):
    """A copy of the built variant, without the bytecode that this process's import left there."""
    copy = tmp_path / "build" / BUILT.name
    shutil.copytree(BUILT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def seal(variant):
    """Writes the digest of the files that are there now."""
    path = variant / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["digest"]["files"] = dict(Digest.hash_variant(DigestAlgorithm.SHA256, variant).files)
    path.write_text(json.dumps(metadata))


def compiled(folder, source, *options, name="lib.so"):
    """A shared library of a few lines of C."""
    path = folder / name
    code = path.with_suffix(".c")
    code.write_text(source)
    subprocess.run(["gcc", "-shared", "-fPIC", "-nostdlib", "-o", path, code, *options], check=True)
    return path


def asking_for(folder, symbol, version, soname):
    """A library that asks `soname` for `symbol` of a version of it, which a made-up `soname` offers."""
    (folder / "versions").write_text(f"{version} {{ global: {symbol}; }};")
    offering = compiled(
        folder, f"void {symbol}(void) {{}}", f"-Wl,--version-script={folder}/versions,-soname={soname}", name=soname
    )
    source = (
        f"void {symbol}(void); static void *p = {symbol}; static void *get(void) "
        f"{{ return p; }} __attribute__((used)) static void *(*q)(void) = get;"
    )
    return compiled(folder, source, offering)


def problems_of(library, backend="cpu"):
    return check_build.check_library(library, backend, (2, 11))


def refused(problems, *words):
    """One problem, which has all the words."""
    assert len(problems) == 1, problems
    for word in words:
        assert word in problems[0]


def test_the_build_passes(variant):
    problems, not_seen = check_build.check_variant(variant)
    assert problems == []
    assert not_seen == "" or "without CUDA" in not_seen


def test_command_says_what_is_wrong_and_fails(variant, monkeypatch, capsys):
    (variant / "explain.txt").write_text("notes")
    monkeypatch.setattr(sys, "argv", ["check_build.py", "--build", str(variant.parent)])
    with pytest.raises(SystemExit) as end:
        check_build.main()
    told = capsys.readouterr().out
    assert end.value.code == 1
    assert f"{variant.name}: explain.txt is none of" in told and "2 problems" in told
    shutil.rmtree(variant)
    with pytest.raises(SystemExit, match="no variant in .*: make build"):
        check_build.main()


def test_symbol_of_a_newer_glibc(tmp_path):
    library = asking_for(tmp_path, "made_up", "GLIBC_2.32", "libc.so.6")
    refused(problems_of(library), "made_up@GLIBC_2.32", "manylinux_2_28", "cmake/glibc_2_28.cpp")
    subprocess.run(["strip", library], check=True)  # takes away what kernel_abi_check reads
    refused(problems_of(library), "made_up@GLIBC_2.32")


@pytest.mark.parametrize("version, fine", [("GLIBC_2.28", True), ("GLIBC_2.29", False), ("GLIBC_PRIVATE", False)])
def test_newest_allowed_glibc(version, fine, tmp_path):
    problems = problems_of(asking_for(tmp_path, "made_up", version, "libc.so.6"))
    assert bool(problems) != fine, problems


def test_symbol_of_unstable_torch(tmp_path):
    source = "extern void _ZN3c105ErrorC1Ev(void); void *used(void) { return _ZN3c105ErrorC1Ev; }"
    refused(problems_of(compiled(tmp_path, source, "-fvisibility=hidden", "-Wl,-u,used", "-Wl,--no-gc-sections")),
            "_ZN3c105ErrorC1Ev", "torch/csrc/stable")  # fmt: skip


@pytest.mark.parametrize(
    "name, since, words",
    [
        ("torch_made_up", None, "do not declare"),
        ("torch_list_size", (2, 12), "new in 2.12"),
        ("torch_list_size", (2, 11), ""),
    ],
)
def test_version_of_torchs_stable_interface(name, since, words, tmp_path, monkeypatch):
    known = check_build.shim_versions()
    assert known["torch_list_size"] == (2, 10) and known["aoti_torch_get_dim"] == (0, 0)
    if since:
        monkeypatch.setattr(check_build, "shim_versions", lambda: known | {name: since})
    source = f'extern void {name}(void); __attribute__((visibility("hidden"))) void *used(void) {{ return {name}; }}'
    problems = problems_of(compiled(tmp_path, source))
    if words:
        refused(problems, name, words)
    else:
        assert problems == []


@pytest.mark.parametrize("option", ["--enable-new-dtags", "--disable-new-dtags"])
def test_hidden_rpath(option, tmp_path):
    library = compiled(tmp_path, "", "-Wl,-rpath,$ORIGIN/../lib", f"-Wl,{option}")
    refused(problems_of(library), "PATH [$ORIGIN/../lib]", "CMAKE_SKIP_RPATH")


def test_other_faults_of_a_library(tmp_path):
    other = compiled(tmp_path, "void f(void) {}", "-Wl,-soname,libopenblas.so.0", name="libopenblas.so")
    refused(problems_of(compiled(tmp_path, "", "-Wl,--no-as-needed", other)), "libopenblas.so.0", "link without")
    refused(problems_of(compiled(tmp_path, "void helper(void) {}")), "exports helper", "hide it")
    text = 'static const char *__attribute__((used)) text = "%s";'
    refused(problems_of(compiled(tmp_path, text % "/home/me/lora-fused/x.cpp")), "/home/me/lora-fused/x.cpp", "prefix")
    refused(problems_of(compiled(tmp_path, text % "tmpxft_00000a1b_x.cudafe1.cpp")), "tmpxft_", "--objdir-as-tempdir")
    refused(problems_of(compiled(tmp_path, ""), "cuda"), "CUDA runtime", "CMAKE_CUDA_RUNTIME_LIBRARY")
    python = 'extern void PyList_New(void); __attribute__((visibility("hidden"))) void *f(void) { return PyList_New; }'
    refused(problems_of(compiled(tmp_path, python)), "PyList_New", "PyModule_Create2 alone")
    newer = python.replace("PyList_New", "PyUnicode_AsUTF8AndSize")
    assert any("not in abi3 of Python 3.9" in problem for problem in problems_of(compiled(tmp_path, newer)))


def test_library_cut_short(variant):
    library = next(variant.glob("*.so"))
    library.write_bytes(library.read_bytes()[:20_000])
    assert any("is not a whole ELF library" in problem for problem in problems_of(library))


def test_changed_file(variant):
    with (variant / "__init__.py").open("a") as file:
        file.write("\n")
    refused(check_build.check_metadata(variant), "__init__.py", "do not edit build/")


def test_faults_of_the_layout(variant):
    (variant / "__pycache__").mkdir()
    (variant / "README.md").write_text("")
    (variant / "second.abi3.so").write_bytes(b"")
    (variant / "layers.json").symlink_to("metadata.json")
    (variant / "__init__.py").chmod(0o600)
    (variant / "second.abi3.so").chmod(0o644)
    (variant / "README.md").chmod(0o644)
    (variant / "__pycache__").chmod(0o755)
    text = "\n".join(check_build.check_layout(variant))
    for words in ("__pycache__ holds", "README.md is none of", "second.abi3.so", "layers.json is a link", "0o600"):
        assert words in text, text
    other = variant.rename(variant.with_name("torch211-cpu-x86_64-linux"))
    assert "is no name that `kernels` looks for" in check_build.check_layout(other)[0]


@pytest.mark.parametrize(
    "key, value, word",
    [
        ("version", 2, "version = 2"),
        ("id", "_other_cpu_1234567", "does not name kernel"),
        ("digest", None, "no digest"),
    ],
)
def test_faults_of_the_metadata(key, value, word, variant):
    path = variant / "metadata.json"
    metadata = json.loads(path.read_text()) | {key: value}
    if value is None:
        del metadata[key]
    path.write_text(json.dumps(metadata))
    assert any(word in problem for problem in check_build.check_metadata(variant))


def test_release_wants_every_architecture_and_commit(variant):
    path = variant / "metadata.json"
    metadata = json.loads(path.read_text())
    declared = check_build.config()["kernel"]["ops_cuda"]["cuda-capabilities"]
    cuda = variant.rename(variant.with_name("torch-stable-abi211-cu130-x86_64-linux"))
    for archs, fine, releasable in ((declared, True, True), (declared[:1], True, False), (["6.1"], False, False)):
        changed = metadata | {"id": metadata["id"].removesuffix("_dirty"), "backend": {"type": "cuda", "archs": archs}}
        (cuda / path.name).write_text(json.dumps(changed))
        for release, expected in ((False, fine), (True, releasable)):
            said = [p for p in check_build.check_metadata(cuda, release) if "make build-cuda" in p]
            assert bool(said) != expected
    (cuda / path.name).write_text(json.dumps(metadata | {"id": "_lora_fused_cuda_1234567_dirty"}))
    assert any("not committed" in problem for problem in check_build.check_metadata(cuda, release=True))
    (cuda / path.name).write_text(json.dumps(metadata | {"backend": {"type": "cpu"}}))
    assert any("but the name says cuda" in problem for problem in check_build.check_metadata(cuda))


def test_variant_grown_too_large(variant, monkeypatch):
    monkeypatch.setattr(check_build, "MOST_MEGABYTES", {"cpu": 0.1, "cuda": 0.1})
    refused(check_build.check_size(variant), "more than 0.1", "MOST_MEGABYTES")


# What an import must not do, and what is said of it.
EFFECTS = {
    "import os; open(os.path.join(os.environ['HOME'], 'left'), 'w').close()": ("to write", "left left in the home"),
    "import socket; socket.socket().close()": ("socket.__new__",),
    "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])": ("subprocess.Popen",),
    "import os; os.environ['OMP_NUM_THREADS'] = '1'": ("os.putenv", "changed the environment"),
    "import torch; torch.set_default_dtype(torch.float64)": ("changed torch's default dtype",),
    "import warnings; warnings.filterwarnings('ignore')": ("changed the warning filters",),
    "import torch; torch.library.Library('somebody', 'DEF').define('op() -> ()'); "
    "torch._keep = torch.library.Library('elsewhere', 'DEF'); torch._keep.define('op() -> ()')": (
        "registers elsewhere::op",
    ),
}  # fmt: skip


@pytest.mark.skipif("cuda" in BUILT.name, reason="the import of the CPU variant is looked at in CI")
def test_side_effects_at_import(variant):
    with (variant / "__init__.py").open("a") as file:
        file.write("\n" + "\n".join(EFFECTS))
    seal(variant)
    problems, _ = check_build.check_import(variant)
    text = "\n".join(problems)
    for words in EFFECTS.values():
        for word in words:
            assert word in text, text


def test_import_that_needs_more_than_torch(variant):
    names = ("peft", "numpy", "triton")
    tries = "".join(
        f"try:\n    import {name}\nexcept ImportError as e:\n    missing.append(str(e))\n" for name in names
    )
    with (variant / "__init__.py").open("a") as file:
        file.write(f"\nmissing = []\n{tries}raise ImportError(', '.join(missing))\n")
    seal(variant)
    refused(
        check_build.check_import(variant)[0], "cannot be imported", *(f"No module named '{name}'" for name in names)
    )
