"""README's figures are those of the results files; `kernels benchmark` finds and runs what is for it."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import tables


def test_readme_agrees_with_the_results():
    readme = tables.README.read_text()
    assert tables.with_table(readme) == readme
    assert "| Llama-8B shape, 32 layers, 1×2048 | LoRA | fp32, autocast |" in readme


@pytest.fixture
def benchmark():
    pytest.importorskip("sigstore", reason="the command line of kernels needs it; a bare GPU machine has none")
    from kernels.cli import benchmark

    return benchmark


def test_kernels_benchmark_finds_its_script_alone(benchmark):
    assert [script.name for script in benchmark.discover_benchmark_scripts("lora-fused", ROOT)] == ["benchmark_ops.py"]


def classes(benchmark):
    return benchmark.discover_benchmark_classes(ROOT / "benchmarks" / "benchmark_ops.py", ROOT)


def run(benchmark, cls):
    return benchmark.run_benchmark_class(cls, 1, 0, repo_id=str(ROOT), is_local=True, revision="local")[0]


def test_kernels_benchmark_runs(lora_fused, benchmark, monkeypatch):
    (cls,) = classes(benchmark)
    monkeypatch.setattr(cls, "tokens", 64)
    monkeypatch.setattr(cls, "features", 128)
    results = run(benchmark, cls)
    assert set(results) == {"lora", "dora", "lora_backward", "group_backward", "row_norm"}
    assert all(result.verified for result in results.values())


def test_kernels_benchmark_verifies(lora_fused, benchmark, monkeypatch):
    (cls,) = classes(benchmark)
    monkeypatch.setattr(cls, "tokens", 64)
    monkeypatch.setattr(cls, "features", 128)
    right = cls.verify_lora
    monkeypatch.setattr(cls, "verify_lora", lambda self: 1.5 * right(self))
    with pytest.raises(RuntimeError, match="lora"):
        run(benchmark, cls)
