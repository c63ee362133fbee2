"""Triton kernels against float64: on a GPU as they run, elsewhere under the interpreter.

The interpreter's bfloat16 dot is wrong, so half precision is float16 there.
"""

import contextlib
import importlib
from types import SimpleNamespace

import pytest
import torch
from helpers.cases import CASES, UNIT, assert_as_good, relative

triton = pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if ON_GPU else ())
MATRIX_CASES = [case for case in CASES if case.lead]


def draw(*shape, dtype, device, scale=1.0):
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def operands(case, dtype, adapter, device):
    m = int(torch.Size(case.lead).numel())
    x = draw(m, case.k, dtype=dtype, device=device)
    weight = draw(case.n, case.k, dtype=dtype, device=device, scale=case.k**-0.5)
    lora_a = draw(case.r, case.k, dtype=adapter, device=device, scale=case.k**-0.5)
    lora_b = draw(case.n, case.r, dtype=adapter, device=device, scale=case.r**-0.5)
    bias = draw(case.n, dtype=dtype, device=device) if case.bias else None
    return x, weight, lora_a, lora_b, bias


@pytest.mark.parametrize("case", MATRIX_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("descriptors", (True, False), ids=("descriptors", "pointers"))
def test_kernels_match_float64(lora_fused, poisoned, device, case, dtype, descriptors):
    kernels = lora_fused.backends.select.get("triton")
    x, weight, lora_a, lora_b, bias = operands(case, dtype, torch.float32, device)
    t = kernels.shrink(x, lora_a, case.scaling)
    y = kernels.linear_expand(x, weight, t, lora_b, bias, descriptors=descriptors)
    dy = draw(x.shape[0], case.n, dtype=dtype, device=device)
    dt = kernels.shrink(dy, lora_b.t(), case.scaling)
    dx = kernels.linear_expand(dy, weight.t(), dt, lora_a.t(), descriptors=descriptors)
    tensors = (x, weight, lora_a, lora_b, bias, dy, t, dt)
    x64, weight64, a64, b64, bias64, dy64, t64, dt64 = [None if v is None else v.double() for v in tensors]
    plain = lora_fused.backends.reference
    results = {
        "t": (t, plain.shrink(x, lora_a, case.scaling, dtype), case.scaling * x64 @ a64.t()),
        "y": (y, plain.linear_expand(x, weight, t, lora_b, bias), plain.linear_expand(x64, weight64, t64, b64, bias64)),
        "dt": (dt, plain.shrink(dy, lora_b.t(), case.scaling, dtype), case.scaling * dy64 @ b64),
        "dx": (dx, plain.linear_expand(dy, weight.t(), dt, lora_a.t()), dy64 @ weight64 + dt64 @ a64),
    }
    for name, (ours, theirs, truth) in results.items():
        assert_as_good(name, ours, theirs, truth, dtype, terms=max(case.k, case.n) + case.r)


@pytest.mark.parametrize("backend,adapter", (("native", None), ("native", torch.float32), ("triton", torch.float32)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in MATRIX_CASES if case.lead != (0,)], ids=str)
def test_dropped_dora_rounds_after_the_gain(lora_fused, poisoned, device, case, dtype, backend, adapter):
    """A large delta has a large norm and so a small mag_norm_scale: y is far smaller than x weightᵀ + t upᵀ."""
    kernels = lora_fused.backends.select.get(backend)
    x, weight, lora_a, lora_b, bias = operands(case, dtype, adapter or dtype, device)
    d, mag_norm_scale = x * 1.25, 0.02 * (0.5 + torch.rand(case.n, device=device))
    t = 50 * kernels.shrink(d, lora_a, case.scaling)
    operands64 = [None if v is None else v.double() for v in (x, d, weight, t, lora_b, mag_norm_scale, bias)]
    x64, d64, weight64, t64, b64, gain64, bias64 = operands64
    z64 = d64 @ weight64.t() + t64 @ b64.t()
    y64 = x64 @ weight64.t() + t64 @ b64.t() + (gain64 - 1) * z64 + (0 if bias is None else bias64)
    y, z = kernels.linear_expand_dropped(x, d, weight, t, lora_b, mag_norm_scale, bias)
    wide = torch.float32 if dtype == torch.float16 else dtype  # z may be beyond float16's range where y is not
    for name, ours, truth, stored in (("y", y, y64, dtype), ("z", z, z64, wide)):
        assert ours.dtype == stored
        assert_as_good(name, ours, truth.to(stored), truth, dtype, terms=case.k + case.r)


@pytest.mark.parametrize("case", MATRIX_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_function_on_triton_is_as_good_as_reference(lora_fused, device, case, dtype):
    """Forward and every gradient through the autograd Function, both backends, float64 truth."""

    def run(backend, cast):
        torch.manual_seed(1)
        tensors = [
            None if v is None else cast(v).requires_grad_() for v in operands(case, dtype, torch.float32, device)
        ]
        x, weight, lora_a, lora_b, bias = tensors
        y = lora_fused.lora_linear(x, weight, lora_a, lora_b, case.scaling, bias, backend=backend)
        dy = draw(*y.shape, dtype=torch.float32, device=device)
        y.backward(dy.to(dtype).to(y.dtype))
        grads = {name: v.grad for name, v in zip(("x", "weight", "lora_a", "lora_b", "bias"), tensors) if v is not None}
        return {"y": y, **grads}

    truth = run("reference", lambda v: v.double())
    theirs = run("reference", lambda v: v)
    for name, value in run("triton", lambda v: v).items():
        assert_as_good(name, value, theirs[name], truth[name], dtype, terms=max(case.k, case.n) + case.r)


def test_unaligned_rows_go_through_pointers(lora_fused, device):
    """A base address or a row stride that no descriptor can take still gives the right result."""
    kernels = lora_fused.backends.select.get("triton")
    storage = torch.randn(64 * 67 + 1, device=device).half()
    x = storage[1:].view(64, 67)
    weight = torch.randn(48, 67, device=device).half()
    up, t = torch.randn(48, 5, device=device).half(), torch.randn(64, 5, device=device).half()
    y = kernels.linear_expand(x, weight, t, up)
    truth = x.double() @ weight.double().t() + t.double() @ up.double().t()
    assert relative(y, truth)[0] <= UNIT[torch.float16]


def test_unknown_backend(lora_fused):
    with pytest.raises(ValueError, match="^backend: 'cutlass'"):
        lora_fused.backends.select.get("cutlass")


class Kernel:
    """Counts compilations and launches; a tensor, two numbers and a constant."""

    params = tuple(
        SimpleNamespace(name=name, is_constexpr=name == "BLOCK") for name in ("x_ptr", "N", "scale", "BLOCK")
    )

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            made = Compiled(self)
            self.compiled.append((arguments, options))
            return made

        return run


class Compiled:
    packed_metadata, function = "metadata", "handle"

    def __init__(self, kernel):
        self.kernel, self.watched = kernel, 0

    def run(self, x, y, z, stream, *given):
        assert given[:5] == ("handle", "metadata", None, None, None)
        self.kernel.launched.append(((x, y, z), given[5:], stream))

    def __getitem__(self, grid):
        self.watched += 1
        return lambda *arguments, stream: self.run(*grid, stream, "handle", "metadata", None, None, None, *arguments)


@contextlib.contextmanager
def setting(current, number):
    before, current[0] = current[0], number
    yield
    current[0] = before


def test_a_launch_compiles_what_triton_would(lora_fused, monkeypatch):
    """Once for what Triton tells apart: dtypes, addresses, integers that are 1 or multiples of 16 or wide, what is not
    there, constants and warps; not for other values of the same kind."""
    launch = importlib.import_module(f"{lora_fused.__name__}.backends.triton.launch")
    kernel, buffer = Kernel(), torch.empty(64, dtype=torch.float32, device="cpu")

    class OnGpu(torch.Tensor):
        is_cuda = True

        def get_device(self):
            return 2

    def on_gpu(tensor):
        return torch.Tensor._make_subclass(OnGpu, tensor)

    current = [2]
    monkeypatch.setattr(launch, "_current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", lambda number: setting(current, number))
    monkeypatch.setattr(launch, "_current_stream", lambda device: (device, current[0]))
    monkeypatch.setattr(launch, "_compiled", {})
    aligned = on_gpu(buffer)
    assert buffer.data_ptr() % 16 == 0
    first = aligned, 32, 0.5, 7
    others = (
        (aligned, 1, 0.5, 7), (aligned, 33, 0.5, 7), (aligned, 2**31, 0.5, 7), (aligned, None, 0.5, 7),
        (aligned, 32, 0.5, 8), (on_gpu(buffer[1:]), 32, 0.5, 7), (on_gpu(buffer.view(torch.int32)), 32, 0.5, 7),
        (aligned, 32, None, 7),
    )  # fmt: skip
    same = (aligned, 48, 0.25, 7), (on_gpu(buffer[4:]), 2**20, 0.5, 7)
    for number, arguments in enumerate((first, *others), 1):
        launch.launch(kernel, (number, 1, 1), arguments, num_warps=4)
        assert len(kernel.compiled) == number and not kernel.launched
    launch.launch(kernel, (1, 1, 1), first, num_warps=8)
    assert len(kernel.compiled) == len(others) + 2 and kernel.compiled[-1][1]["num_warps"] == 8
    for arguments in (first, *others, *same):
        current[0] = 2 if arguments is first else 0  # a launch goes to the tensor's GPU, whichever is current
        launch.launch(kernel, (5, 2, 1), arguments, num_warps=4)
        grid, launched, stream = kernel.launched[-1]
        given = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
        assert (grid, list(launched), stream) == ((5, 2, 1), given, (2, 2))
    assert len(kernel.compiled) == len(others) + 2 and len(kernel.launched) == len(others) + 3
    each = [compiled for compiled, *_ in launch._compiled.values()]
    assert not any(compiled.watched for compiled in each)
    for name in ("launch_enter_hook", "launch_exit_hook"):  # a profiler's, called by Triton's own launch
        with monkeypatch.context() as patched:
            patched.setattr(launch._runtime, name, lambda metadata: None)
            launch.launch(kernel, (5, 2, 1), first, num_warps=4)
    assert sum(compiled.watched for compiled in each) == 2 and len(kernel.launched) == len(others) + 5
