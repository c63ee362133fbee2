"""What `make check-build` lets pass and what it refuses, on copies of the built variant with a fault each; and what a
build says of itself."""

import json
import os
import platform
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

import build

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


def test_variant_of_another_machine_is_not_imported(variant):
    other = variant.rename(variant.with_name("torch-stable-abi211-cpu-riscv64-linux"))
    assert check_build.check_import(other) == ([], f"not imported: this is a {platform.machine()} machine")


def test_command_says_what_is_wrong_and_fails(variant, monkeypatch, capsys):
    (variant / "explain.txt").write_text("notes")
    monkeypatch.setattr(sys, "argv", ["check_build.py", "--build", str(variant.parent)])
    with pytest.raises(SystemExit) as end:
        check_build.main()
    told = capsys.readouterr().out
    assert end.value.code == 1
    assert f"{variant.name}: explain.txt is none of" in told and "2 problems" in told
    shutil.rmtree(variant)
    (variant.parent / "benchmarks").mkdir()
    with pytest.raises(SystemExit, match="no variant in .*: make build"):
        check_build.main()


def test_symbol_of_a_newer_glibc(tmp_path):
    library = asking_for(tmp_path, "made_up", "GLIBC_2.32", "libc.so.6")
    refused(problems_of(library), "made_up@GLIBC_2.32", "manylinux_2_28", "cmake/glibc_2_28.cpp")
    subprocess.run(["strip", library], check=True)  # takes away what kernel_abi_check reads
    refused(problems_of(library), "made_up@GLIBC_2.32")


@pytest.mark.parametrize("version, fine", [("GLIBC_2.28", True), ("GLIBC_2.29", False), ("GLIBC_PRIVATE", False)])
def test_newest_allowed_glibc(version, fine, tmp_path):
    library = asking_for(tmp_path, "made_up", version, "libc.so.6")
    assert bool(problems_of(library)) != fine
    subprocess.run(["strip", library], check=True)
    assert bool(problems_of(library)) != fine


def test_symbol_of_a_newer_libstdcxx_that_torch_lends(variant, tmp_path):
    """A local build defines it; kernel-builder's is held against the versions alone."""
    name = "_ZSt28__throw_bad_array_new_lengthv"
    source = f"extern void {name}(void); void *used(void) {{ return {name}; }}"
    asking = compiled(tmp_path, source, "-fvisibility=hidden", "-Wl,-u,used", "-Wl,--no-gc-sections")
    assert problems_of(asking) == [] and f"{name}@GLIBCXX_3.4.29" in build.portability(asking)
    replaced = next(variant.glob("*.so"))
    replaced.write_bytes(asking.read_bytes())
    seal(variant)
    refused(check_build.check_variant(variant)[0], f"{name}@GLIBCXX_3.4.29", "cmake/glibc_2_28.cpp")


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
    "import torch; from ._ops import ops; torch._own = torch.library.Library(ops.name, 'FRAGMENT'); "
    "torch._own.define('lonely() -> ()')": ("::lonely without a kernel",),
}  # fmt: skip


@pytest.mark.skipif("cuda" in BUILT.name, reason="the import of the CPU variant is looked at in CI")
def test_import_that_does_more_and_needs_more(variant):
    needed = ("peft", "numpy", "triton")
    tries = "".join(f"try:\n    import {n}\nexcept ImportError as e:\n    missing.append(str(e))\n" for n in needed)
    with (variant / "__init__.py").open("a") as file:
        file.write("\n".join(["", *EFFECTS, "missing = []", f"{tries}raise ImportError(', '.join(missing))", ""]))
    seal(variant)
    problems, _ = check_build.check_import(variant)
    assert "cannot be imported and used" in problems[0]
    text = "\n".join(problems)
    for words in [*EFFECTS.values(), [f"No module named '{name}'" for name in needed]]:
        for word in words:
            assert word in text, text


def test_a_build_for_this_machine_only_says_so(tmp_path):
    library = asking_for(tmp_path, "made_up", "GLIBC_2.34", "libc.so.6")
    told = build.portability(library)
    assert told.startswith("FOR THIS MACHINE ONLY") and "made_up@GLIBC_2.34" in told and "cmake/glibc_2_28.cpp" in told
    assert build.portability(next(BUILT.glob("*.so"))) == ""


def test_commands_of_a_build_show_progress_and_end_in_time(capsys):
    shell = ["sh", "-c"]
    build.run([*shell, "echo '[1/2] one -o x'; echo noise"], dict(os.environ), 60, show=True)
    assert capsys.readouterr().out == "[1/2] one\n"
    with pytest.raises(SystemExit, match="(?s)reason.*failed: sh"):
        build.run([*shell, "echo reason; exit 3"], dict(os.environ), 60, show=False)
    with pytest.raises(SystemExit, match=r"stopped after 0.2 s \(--time-limit\)"):
        build.run([*shell, "sleep 60"], dict(os.environ), 0.2, show=False)


def test_torch_to_compile_against_and_its_compiler(tmp_path, monkeypatch):
    folder = tmp_path / "torch"
    folder.mkdir()
    (folder / "version.py").write_text("__version__ = '2.11.0+cu130'\ncuda = '13.0'\n")
    torch = build.Torch.at(folder)
    assert (torch.version, torch.full_version, torch.cuda) == ((2, 11), "2.11.0+cu130", "13.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    told = r"(?s)2\.11\.0\+cu130 is a CUDA build.*pip install torch==2\.11\.0 .*/whl/cpu.*13\.0\.$"
    with pytest.raises(SystemExit, match=told):
        build.choose_backend(torch)
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"  # of a wheel
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("")
    nvcc.chmod(0o755)
    (tmp_path / "nvidia" / "cu13" / "lib").mkdir()
    (tmp_path / "nvidia" / "cu13" / "lib" / "libcudart.so.13").write_text("")
    assert build.choose_backend(torch)[0] == "cuda" and build.find_nvcc(torch) == str(nvcc)
    paths = build.with_libraries_of_wheel(str(nvcc), tmp_path / "work")["LIBRARY_PATH"].split(":")
    assert [sorted(p.name for p in Path(path).iterdir()) for path in paths[:2]] == [
        ["libcudart.so.13"],
        ["libcudart.so"],
    ]
    assert build.variant_name("cuda", torch, "2.11").startswith("torch-stable-abi211-cu130-")
    with pytest.raises(SystemExit, match="is no torch package"):
        build.Torch.at(tmp_path / "work")
