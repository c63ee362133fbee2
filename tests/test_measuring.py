"""How benchmarks and checks of kernels measure, on a GPU that is a stand-in: what is timed, in which order, and what is
made of it."""

import contextlib
import itertools
import sys
import types

import peft
import pytest
import torch
from conftest import ROOT

sys.path[:0] = [str(ROOT / name) for name in ("benchmarks", "scripts")]

import compare_embedding
import compare_experts
import compare_lora
import kernel_checks
import measuring


class StandIn:
    """A GPU whose clock and memory a step moves by hand. `log` has what was asked of it, in order."""

    def __init__(self):
        self.ms, self.bytes, self.peak, self.log = 0.0, 0, 0, []

    def event(self, enable_timing):
        assert enable_timing
        event = types.SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.ms)
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def take(self, ms: float, size: int = 0):
        """Time passes, and `size` bytes are held for a moment."""
        self.ms += ms
        self.peak = max(self.peak, self.bytes + size)

    def reset(self):
        self.log.append("reset")
        self.peak = self.bytes


@pytest.fixture
def gpu(monkeypatch):
    gpu = StandIn()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: gpu.log.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", gpu.reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: gpu.bytes)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: gpu.peak)
    cleared = lambda: gpu.log.append("workspaces")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", cleared, raising=False)
    return gpu


def queue(gpu, *times, size=0):
    """(step, before): a step takes the next of `times`, what comes before it is logged and takes long."""
    left = iter(times)

    def step():
        gpu.log.append("step")
        gpu.take(next(left), size)

    def before():
        gpu.log.append("before")
        gpu.take(1000.0)

    return step, before


def test_steps_are_queued_and_timed_alone(gpu):
    gpu.bytes, gpu.peak = 10**9, 7 * 10**9
    found = measuring.measured(*queue(gpu, 5.0, 2.0, 9.0004, size=2 * 10**9), repeats=3)
    assert gpu.log == ["wait", "reset", *["before", "step"] * 3, "wait"]
    assert found["times_ms"] == [5.0, 2.0, 9.0] and found["ms"] == 5.0 and found["min_ms"] == 2.0
    assert found["peak_gb"] == 3.0 and found["transient_gb"] == 2.0


def test_calls_in_a_row_share_their_time(gpu):
    assert measuring.event_times(*queue(gpu, 1.0, 2.0, 3.0, 5.0), repeats=2, calls=2) == [1.5, 4.0]
    assert gpu.log == [*["before", "step", "step"] * 2, "wait"]


def test_all_take_turns_and_each_is_first():
    ran = []

    def way(name, *times):
        left = iter(times)

        def run():
            ran.append(name)
            ms = next(left)
            return {"ms": ms, "min_ms": ms - 1, "times_ms": [ms, ms + 1]}

        return run

    found = measuring.in_turns({"a": way("a", 3, 9, 4), "b": way("b", 5, 5, 6)}, rounds=3)
    assert ran == ["a", "b", "b", "a", "a", "b"]
    assert found == {
        "a": {"ms": 4, "min_ms": 2, "times_ms": [3, 4, 9, 10, 4, 5]},
        "b": {"ms": 5, "min_ms": 4, "times_ms": [5, 6, 5, 6, 6, 7]},
    }


@pytest.fixture
def capture(monkeypatch):
    """What a capture asks of the GPU, in order."""
    log = []

    class Graph:
        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def within(name):
        log.append(f"in {name}")
        yield
        log.append(f"out of {name}")

    stream = types.SimpleNamespace(wait_stream=lambda other: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: within("stream"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: within("graph"))
    return log


def test_a_step_is_captured_after_warming_up(capture):
    replay = measuring.captured(lambda: capture.append("step"), lambda: capture.append("before"))
    replay()
    aside = ["wait", "in stream", "step", "step", "step", "out of stream", "wait"]
    assert capture == [*aside, "before", "in graph", "step", "out of graph", "replay"]


def test_a_graph_of_an_embedding_adds_to_no_gradient(gpu, capture):
    """Nor does any other of its steps but those that warm up the graph."""
    base = torch.nn.Module()
    base.table = torch.nn.Embedding(9, 4)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["table"]))
    seen, table = [], model.base_model.model.table

    def look(*_):
        seen.append(([p.grad for p in model.parameters() if p.requires_grad], capture[-1:]))

    table.register_forward_pre_hook(look)
    found = compare_embedding.measure(model, torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, 4), repeats=2)
    assert set(found) == {"ms", "min_ms", "peak_gb", "graph_ms"}
    assert all(len(grads) == 2 for grads, _ in seen) and ["in graph"] in [where for _, where in seen]
    assert all(grads == [None, None] for grads, where in seen if where != ["in stream"])


def test_a_linear_is_measured_with_new_parameters_each_step(gpu, monkeypatch):
    case = dict(kind="linear", variant="LoRA", m=4, k=16, n=8, rank=2, adapter="fp32", autocast=False, repeats=3)
    base = compare_lora.build(lambda: compare_lora.make_model(case), device="cpu").float()
    model, inputs = compare_lora.adapt(base, case, torch.float32), compare_lora.inputs_of(case, "cpu")
    inputs = {name: value.detach().float().requires_grad_(name != "dy") for name, value in inputs.items()}
    inputs["leaf"] = inputs["x"]
    step, seen = compare_lora.step, []

    def timed(model, inputs, autocast, cache):
        a = next(p for name, p in model.named_parameters() if "lora_A" in name)
        seen.append((a.detach().clone(), a.grad, inputs["leaf"].grad, cache))
        gpu.take(4.0, size=5 * 10**8)
        return step(model, inputs, autocast, cache)

    monkeypatch.setattr(compare_lora, "step", timed)
    found = compare_lora.measure(model, inputs, case)
    assert found == {"ms": 4.0, "min_ms": 4.0, "times_ms": [4.0] * 3, "peak_gb": 0.5, "transient_gb": 0.5}
    assert len(seen) == compare_lora.WARM_UP + 3
    assert all(grad is None and cache for _, grad, _, cache in seen)
    assert all(dx is None for _, _, dx, _ in seen[-3:])
    assert not any(torch.equal(one, other) for (one, *_), (other, *_) in itertools.pairwise(seen))


def test_an_embedding_warms_up_and_lets_workspaces_go(gpu):
    warm_up = compare_embedding.WARM_UP
    found = compare_embedding.timed(*queue(gpu, *[50.0] * warm_up, 2.0, 4.0, 3.0, size=10**9), repeats=3)
    assert found == {"ms": 3.0, "min_ms": 2.0, "peak_gb": 1.0}
    assert gpu.log[: 2 * warm_up] == ["before", "step"] * warm_up
    assert gpu.log[2 * warm_up : 2 * warm_up + 4] == ["wait", "workspaces", "wait", "reset"]


def test_experts_say_what_a_step_needs_besides(gpu):
    gpu.bytes = 10**9
    found = compare_experts.timed(*queue(gpu, 90.0, 5.0, 7.0, 6.0, size=10**9), 3, 1, "cuda")
    assert found == {"ms": 6.0, "peak_gb": 1.0}
    steps = []
    on_cpu = compare_experts.timed(lambda: steps.append(1), lambda: None, 3, 2, "cpu")
    assert on_cpu["ms"] > 0 and on_cpu["peak_gb"] is None and len(steps) == 5


class Graph:
    """Takes the time of what was captured, the first time ten times that."""

    def __init__(self, gpu):
        self.gpu, self.ms, self.replays = gpu, 0.0, 0

    def replay(self):
        self.replays += 1
        self.gpu.take(self.ms * (10 if self.replays == 1 else 1))

    @contextlib.contextmanager
    def capture(self):
        start = self.gpu.ms
        yield
        self.ms, self.gpu.ms = self.gpu.ms - start, start


def test_kernels_are_timed_by_replays(gpu, monkeypatch):
    graphs = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(Graph(gpu)) or graphs[-1])
    monkeypatch.setattr(torch.cuda, "graph", Graph.capture)
    ways = {"once": gpu.take, "twice": lambda ms: gpu.take(2 * ms)}
    assert kernel_checks.medians(ways, [(1.0,), (3.0,)], rounds=2) == {"once": 2000.0, "twice": 4000.0}
    assert [graph.replays for graph in graphs] == [2, 2]
    assert kernel_checks.microseconds(gpu.take, [1.0, 3.0, 5.0], repeats=1) == 3000.0
    assert graphs[-1].ms == 18.0 and graphs[-1].replays == 2


def test_a_check_begins_where_its_kernel_is(monkeypatch, capsys):
    monkeypatch.setattr(kernel_checks, "get_local_kernel", lambda path: path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(sys, "argv", ["check.py", "--sanitize"])
    assert kernel_checks.begin("what it does") == (ROOT / "build", True)
    with pytest.raises(SystemExit) as end:
        kernel_checks.begin("what it does", hopper="gemm")
    assert not end.value.code and "gemm: for compute capability 9.0 alone" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(sys, "argv", ["check.py"])
    assert kernel_checks.begin("what it does", hopper="gemm") == (ROOT / "build", False)
