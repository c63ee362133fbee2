"""`kernels benchmark` finds and runs what is for it; what the
other benchmarks compare is checked on small shapes, for their clock needs a GPU."""

import argparse
import contextlib
import functools
import importlib
import json
import re
import sys
import types

import pytest
import torch
from conftest import ROOT
from peft.tuners.lora.dora import DoraLinearLayer

sys.path.insert(0, str(ROOT / "benchmarks"))

import compare_lora
import first_call
import peers
import progress
import run as bench_run
import tables


@pytest.fixture
def benchmark():
    pytest.importorskip("sigstore", reason="the command line of kernels needs it; a bare GPU machine has none")
    from kernels.cli import benchmark

    return benchmark


def test_kernels_benchmark_finds_its_script_alone(benchmark):
    assert [script.name for script in benchmark.discover_benchmark_scripts("lora-fused", ROOT)] == ["benchmark.py"]


def classes(benchmark):
    return benchmark.discover_benchmark_classes(ROOT / "benchmarks" / "benchmark.py", ROOT)


def run(benchmark, cls):
    return benchmark.run_benchmark_class(cls, 1, 0, repo_id=str(ROOT), is_local=True, revision="local")[0]


def test_kernels_benchmark_runs(lora_fused, benchmark):
    (cls,) = classes(benchmark)
    results = run(benchmark, cls)
    assert set(results) == {"lora", "dora", "lora_backward", "group_backward", "row_norm"}
    assert all(result.verified for result in results.values())


def test_kernels_benchmark_verifies(lora_fused, benchmark, monkeypatch):
    (cls,) = classes(benchmark)
    right = cls.verify_lora
    monkeypatch.setattr(cls, "verify_lora", lambda self: 1.5 * right(self))
    with pytest.raises(RuntimeError, match="lora"):
        run(benchmark, cls)


LINEAR = dict(kind="linear", variant="LoRA", m=16, k=64, n=96, rank=4, adapter="bf16", autocast=False)
LLAMA = dict(kind="llama-8b", variant="LoRA", layers=2, batch=1, seq=8, rank=4, adapter="fp32", autocast=True)


def name_of(case):
    return f"{case['kind']} {case['variant']}"


@pytest.fixture
def small(monkeypatch):
    size = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    monkeypatch.setitem(compare_lora.LLAMAS, "llama-8b", size)


@pytest.mark.parametrize("name", bench_run.RUNS)
def test_every_benchmark_takes_its_options_and_wants_a_gpu(name, monkeypatch, capsys):
    if name == "qlora":
        pytest.importorskip("bitsandbytes")
    script, *options = bench_run.RUNS[name]
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [script, *options, "--out", "nowhere.json"])
    with pytest.raises(SystemExit):
        module.main()
    assert "a CUDA GPU is required" in capsys.readouterr().err


def test_benchmarks_run_by_name(monkeypatch, tmp_path, capsys):
    ran = []
    monkeypatch.setattr(bench_run, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(bench_run.subprocess, "run", lambda command, check: ran.append(command[1:]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    for names in (["peers"], ["training_fsdp"], []):
        monkeypatch.setattr(sys, "argv", ["run.py", *names])
        bench_run.main()
    said = re.findall(r"^(\w+): (\d+) of (\d+), 0 min passed$", capsys.readouterr().out, re.MULTILINE)
    assert said[:2] == [("peers", "1", "1"), ("training_fsdp", "1", "1")]
    assert [int(number) for _, number, _ in said[2:]] == list(range(1, len(bench_run.RUNS)))
    results = tmp_path / "results" / "h100"
    options = ["--peers", "--layers", "8", "--out", results / "benchmark_peers.json"]
    assert ran[0] == [tmp_path / "compare_lora.py", *options]
    options = ["--fsdp", "--out", results / "benchmark_training_fsdp.json"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert ran[1] == [*launcher, tmp_path / "compare_training.py", *options]
    alone = [script for name, (script, *_) in bench_run.RUNS.items() if name != "training_fsdp"]
    assert [command[0].name for command in ran[2:]] == alone and len(alone) == len(bench_run.RUNS) - 1
    monkeypatch.setattr(sys, "argv", ["run.py", "lora", "speed"])
    with pytest.raises(SystemExit):
        bench_run.main()
    assert "unknown: speed" in capsys.readouterr().err


def test_a_benchmark_says_where_it_is(monkeypatch, capsys):
    """Three cases of two minutes each."""
    monkeypatch.setattr(progress.time, "monotonic", iter([0, 0, 120, 240]).__next__)
    assert list(progress.numbered(["a", "b", "c"])) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == ["[1/3]", "[2/3, about 4 min left]", "[3/3, about 2 min left]"]
    monkeypatch.undo()
    assert list(progress.numbered([1, 2], shown=False)) == [1, 2] and not capsys.readouterr().err


def test_cases_of_the_model_benchmarks():
    plain, with_peers = compare_lora.cases(10, 32), compare_lora.peer_cases(10, 32)
    first = [dict(case, repeats=1) for case in first_call.cases(2)]
    assert {case["kind"] for case in plain} == set(compare_lora.KINDS)
    for cases in (plain, with_peers, first):
        assert len({json.dumps(case) for case in cases}) == len(cases)
        assert len({compare_lora.head_of(case) for case in cases}) == len(cases)
        for case in cases:
            inputs = compare_lora.inputs_of(case, "meta")
            assert ("dy" in inputs) != case.get("forward_only", False)
            assert case["variant"] in compare_lora.VARIANTS and case["repeats"] > 0
    rows = {(tables.shape_of(case), case["variant"], case["adapter"], case["autocast"]) for case in plain}
    assert len(rows) == len(plain)


def test_cases_of_compiled_layers():
    import compare_compiled

    found = compare_compiled.cases(10, 32)
    assert {"frozen", "ours", "PEFT"} < set(tables.COMPILED_WAYS.values()) == set(compare_compiled.ROWS)
    assert len({(case["variant"], case["base"], case["batch"]) for case in found}) == len(found) == 6
    assert all(case["variant"] in compare_lora.VARIANTS for case in found)


@pytest.mark.parametrize("case", (LINEAR, LLAMA, dict(LLAMA, variant="DoRA")), ids=name_of)
@pytest.mark.parametrize("forward_only", (False, True))
def test_compare_finds_the_same_result(lora_fused, device, small, case, forward_only):
    case = dict(case, forward_only=forward_only)
    result = compare_lora.compare(case, lora_fused, compare_lora.inputs_of(case, device))
    assert "failed" not in result
    assert (result["grad_norm"]["peft"] > 0) != forward_only


def dora_model(device):
    case = dict(LINEAR, variant="DoRA", adapter="fp32")
    base = compare_lora.build(lambda: compare_lora.make_model(case), device=device).float()
    return compare_lora.adapt(base, case, torch.float32)


def gradients(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def test_dense_norm_gives_dora_and_goes_away(device, monkeypatch):
    """PEFT's result without its identity matrix, which is back afterwards."""
    model, x, own = dora_model(device), torch.randn(16, 64, device=device), DoraLinearLayer.get_lora_weight
    eye, identities = torch.eye, []
    monkeypatch.setattr(torch, "eye", lambda *args, **kwargs: identities.append(args) or eye(*args, **kwargs))
    theirs = gradients(model, x)
    assert len(identities) == 1 and "magnitude" in str(theirs.keys())
    with peers.dense_norm(model):
        dense = gradients(model, x)
    assert len(identities) == 1
    assert DoraLinearLayer.get_lora_weight is own
    assert dense.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(dense[name], value)
    with pytest.raises(ZeroDivisionError), peers.dense_norm(model):
        raise ZeroDivisionError
    assert DoraLinearLayer.get_lora_weight is own


@contextlib.contextmanager
def wrong_scaling(model):
    layer = model.get_base_model().proj
    layer.scaling["default"] *= 2
    yield
    layer.scaling["default"] /= 2


@contextlib.contextmanager
def broken(model):
    raise ValueError("first\nsecond")
    yield


def test_a_peer_that_is_not_peft_has_no_speed(lora_fused, device):
    ways = {
        "PEFT": contextlib.nullcontext,
        "lora-fused": lambda model: compare_lora.fused(model, lora_fused),
        "wrong": wrong_scaling,
        "broken": broken,
        "missing": peers.package("no_such_package.kernels"),
    }
    rows = compare_lora.against_peft(LINEAR, ways, compare_lora.inputs_of(LINEAR, device))
    assert rows["PEFT"]["output_difference"] == 0 and "failed" not in rows["lora-fused"]
    assert rows["PEFT"]["grad_norm"] == pytest.approx(rows["lora-fused"]["grad_norm"], rel=1e-2)
    assert rows["wrong"]["failed"].startswith("not PEFT's result")
    assert rows["broken"]["failed"] == "ValueError: first"
    assert rows["missing"]["failed"].startswith("not installed")


def test_a_gradient_alone_that_is_wrong_is_seen():
    y = torch.ones(4)
    assert "failed" not in compare_lora.agreement((y, 1.0), (y, 1.0))
    for grad in (1.1, 0.0, float("nan")):
        assert "failed" in compare_lora.agreement((y, 1.0), (y, grad))
    assert "failed" in compare_lora.agreement((y, 1.0), (y * float("nan"), 1.0))


def test_a_package_runs_through_its_output_projection(device, monkeypatch):
    """What both packages have: attention and x of three dimensions in, y out."""
    calls = []

    def apply_lora_o(attention, x):
        calls.append(x.shape)
        layer = attention.o_proj
        return layer.base_layer(x) + layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]

    monkeypatch.setitem(sys.modules, "stand_in", types.SimpleNamespace(apply_lora_o=apply_lora_o))
    inputs = compare_lora.inputs_of(LINEAR, device)
    rows = compare_lora.against_peft(LINEAR, {"PEFT": contextlib.nullcontext, "it": peers.package("stand_in")}, inputs)
    assert "failed" not in rows["it"] and calls == [(1, 16, 64)]


@pytest.mark.parametrize("case", (LINEAR, dict(LLAMA, variant="DoRA")), ids=name_of)
def test_compiled_runs_compiled_and_goes_away(device, monkeypatch, small, case):
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compile_module, backend="aot_eager"))
    model = compare_lora.build(lambda: compare_lora.make_model(case), device=device)
    model, inputs = compare_lora.adapt(model, case, torch.bfloat16), compare_lora.inputs_of(case, device)
    theirs = compare_lora.norms(model, inputs, case["autocast"])
    with peers.compiled(model) as notes:
        ours = compare_lora.norms(model, inputs, case["autocast"])
    assert "failed" not in compare_lora.agreement(theirs, ours)
    assert notes["graphs"] > 0
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_peers_of_a_case():
    assert set(peers.of(LLAMA)) == {"PEFT, torch.compile"}
    assert set(peers.of(dict(LLAMA, variant="DoRA"))) == {"PEFT, torch.compile", "PEFT, dense norm"}
    assert set(peers.of(LINEAR)) == {"PEFT, torch.compile", "axolotl", "unsloth"}


@pytest.fixture
def measured(monkeypatch):
    """For each model that is measured how many of its modules have a forward of their own, as `kernelize` sets it;
    nothing is timed."""
    seen = []

    def measure(model, inputs, case):
        compare_lora.step(model, inputs, case["autocast"])
        seen.append(sum("forward" in vars(module) for module in model.modules()))
        return dict(ms=1.0 + len(seen), min_ms=1.0, peak_gb=1.0, transient_gb=0.5)

    monkeypatch.setattr(compare_lora, "measure", measure)
    return seen


def test_a_case_measures_frozen_ours_and_peft(lora_fused, device, measured):
    result = compare_lora.run_case(LINEAR, lora_fused, device)
    assert measured == [0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0, 0]  # in turns, each once a round
    assert "frozen    9.000 ms" in compare_lora.describe(result) and "ours  1.11x" in compare_lora.describe(result)
    assert "PEFT  0.89x" in compare_lora.describe(result)


def test_results_are_written_a_line_a_case():
    results = [dict(LINEAR, times_ms=[1.0, 2.5]), LLAMA]
    text = compare_lora.written({"gpu": "none"}, results)
    assert json.loads(text) == {"environment": {"gpu": "none"}, "results": results}
    assert len(text.splitlines()) == len(results) + 2


def test_a_model_is_measured_once_each_way(lora_fused, device, measured, small):
    result = compare_lora.run_case(LLAMA, lora_fused, device)
    assert [count > 0 for count in measured] == [False, True, False]
    assert "PEFT  2.00x" in compare_lora.describe(result)


def test_peers_of_a_case_are_measured_and_described(lora_fused, device, measured, monkeypatch):
    @contextlib.contextmanager
    def noted(model):
        notes = {}
        yield notes
        notes.update(graphs=2, graph_breaks=1)

    monkeypatch.setattr(peers, "of", lambda case: {"noted": noted, "wrong": wrong_scaling, "broken": broken})
    lines = compare_lora.describe_peers(compare_lora.run_peers(LINEAR, lora_fused, device)).splitlines()
    assert measured == [0, 0, 1, 0]
    assert "2.000 ms" in lines[0]
    assert [line.split()[:2] for line in lines[1:4]] == [["PEFT", "1.50x"], ["lora-fused", "2.00x"], ["noted", "2.50x"]]
    assert all("|grad|" in line for line in lines[1:5]) and lines[3].endswith(", 2 graphs, 1 breaks")
    assert "not PEFT's result" in lines[4] and lines[5].split(maxsplit=1) == ["broken", "ValueError: first"]


@pytest.mark.parametrize("who", ("PEFT", "lora-fused"))
def test_first_call_in_a_process_of_its_own(lora_fused, device, tmp_path, who):
    arguments = argparse.Namespace(kernel=ROOT / "build", device=device)
    row = first_call.in_a_process(LINEAR, who, "empty", str(tmp_path), arguments)
    assert row["first_s"] > 0 and row["later_s"] > 0
    assert ("kernelize_s" in row) == (who == "lora-fused")
    assert who in first_call.describe(row)


@pytest.fixture
def qlora():
    pytest.importorskip("bitsandbytes")
    import compare_qlora

    return compare_qlora


def test_what_cannot_be_captured_says_so(qlora, monkeypatch):
    def refuse(*_):
        raise RuntimeError("operation not permitted\nwhen capturing")

    case = dict(qlora.model_cases(32, 10)[-1], frozen=dict(ms=1.0, peak_gb=1.0), peft=dict(ms=2.0, peak_gb=1.0))
    assert case["graph"]
    monkeypatch.setattr(qlora.common, "measure", refuse)
    case["ours"] = qlora.measure(None, None, case)
    assert "ours not captured (RuntimeError: operation not permitted), peft 2.0 ms (2.00x)" in qlora.describe(case)
    case["frozen"] = case["ours"]
    assert "peft 2.0 ms" in qlora.describe(case)
    with pytest.raises(RuntimeError):
        qlora.measure(None, None, dict(case, graph=False))


@pytest.mark.parametrize("storage", (torch.uint8, torch.bfloat16), ids=str)
def test_a_base_in_four_bits(qlora, device, storage):
    base = torch.nn.ModuleDict({"proj": torch.nn.Linear(64, 64, bias=False), "lm_head": torch.nn.Linear(64, 8)})
    given = base["proj"].weight.detach().to(device)
    model = compare_lora.four_bit(base.to(device, torch.bfloat16), storage)
    weight = model["proj"].weight
    assert type(model["lm_head"]) is torch.nn.Linear and weight.dtype == storage and not weight.requires_grad
    assert weight.quant_state.nested and weight.quant_state.quant_type == "nf4"
    back = qlora.bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    assert 0 < (back - given).norm() / given.norm() < 0.15


def test_qlora_models_with_and_without_graph(qlora):
    found = [(case["variant"], case["adapter"], case["graph"]) for case in qlora.model_cases(32, 10)]
    assert len(set(found)) == len(found) == 6
    assert {("DoRA", "fp32", True), ("DoRA", "fp32", False)} < set(found)


def test_experts_are_compared(monkeypatch, tmp_path, capsys):
    """On small shapes, on the CPU: every variant has a time, and ours gives PEFT's results in bfloat16."""
    import compare_experts

    out = tmp_path / "rows.json"
    given = ["--small", "--shapes", "gpt_oss", "--decoding", "1", "--adapters", "float32", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["compare_experts.py", *given])
    compare_experts.main()
    rows = json.loads(out.read_text())["rows"]
    assert {row["kind"] for row in rows} == {"training", "decoding"} and all(row["ms"] > 0 for row in rows)
    (ours,) = [row for row in rows if "differs" in row]
    assert ours["variant"] == "lora-fused, float32" and 0 < ours["differs"] < 0.02
    assert "saved" in capsys.readouterr().out
