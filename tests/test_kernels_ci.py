"""A selection of the suite that needs torch and this package alone, for CI that has no more: the public functions, and
groups and gated MLPs as native ops and as a chain of operations, against the formulas in float64."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from helpers import formula
from helpers.cases import UNIT, relative

TESTS = pathlib.Path(__file__).resolve().parent
M, K, N, R = 70, 136, 72, 8
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16))
by_dtype = pytest.mark.parametrize("dtype,adapter", DTYPES, ids=str)


def operands_of(k, n, dtype, adapter, dora=False, device="cpu"):
    """Of one projection, rounded to the dtypes and in float64: weight, bias, A, B, no lora_bias, magnitude."""
    weight, bias = torch.randn(n, k) * k**-0.5, torch.randn(n)
    a, b = torch.randn(R, k) * k**-0.5, torch.randn(n, R) * R**-0.5
    magnitude = (weight + 0.5 * b @ a).norm(dim=1) * (0.8 + 0.4 * torch.rand(n)) if dora else None
    kept = (dtype, dtype, adapter, adapter, adapter, adapter)
    return [
        None if tensor is None else tensor.to(of).to(device).double()
        for tensor, of in zip((weight, bias, a, b, None, magnitude), kept)
    ]


def leaves(operands, dtype, adapter):
    """The same in the dtypes that they are computed in; the weight is frozen."""
    kept = (dtype, dtype, adapter, adapter, adapter, adapter)
    return [
        None if tensor is None else tensor.to(of, copy=True).requires_grad_(i > 0)
        for i, (tensor, of) in enumerate(zip(operands, kept))
    ]


def assert_close(ours, truth, dtype):
    """y and every gradient, within a few roundings of the dtype, and of float32 for sums of as many terms."""
    assert len(ours) == len(truth) > 3
    for i, (value, exact) in enumerate(zip(ours, truth)):
        error, _ = relative(value, exact)
        assert error <= 6 * UNIT[dtype] + exact.numel() ** 0.5 * 2.0**-22, f"result {i}: {error:.3g}"


def passed(ys, dys, x, operands):
    torch.autograd.backward(ys, dys)
    trained = [tensor for each in operands for tensor in each if tensor is not None and tensor.requires_grad]
    return [*ys, x.grad, *(tensor.grad for tensor in trained)]


@pytest.mark.kernels_ci
@by_dtype
@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
def test_a_linear(lora_fused, device, dora, dtype, adapter):
    exact = operands_of(K, N, dtype, adapter, dora, device)
    x, dy = (torch.randn(M, size, device=device).to(dtype) for size in (K, N))
    results = []
    for of, lora in ((dtype, adapter), (torch.float64, torch.float64)):
        given, leaf = leaves(exact, of, lora), x.to(of, copy=True).requires_grad_()
        weight, bias, a, b, _, magnitude = given
        if of == torch.float64:
            y = formula.linear(lora_fused, leaf, given, 0.5)
        else:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                y = lora_fused.lora_linear(leaf, weight, a, b, 0.5, bias=bias, magnitude=magnitude)
        results.append(passed([y], [dy.to(y.dtype)], leaf, [given]))
    assert_close(*results, dtype)


@pytest.mark.kernels_ci
@by_dtype
def test_a_group(lora_fused, group_function, device, dtype, adapter):
    """Three projections of one x, of which one is DoRA."""
    exact = [operands_of(K, n, dtype, adapter, dora, device) for n, dora in ((N, False), (40, True), (64, False))]
    x, dys = (
        torch.randn(M, K, device=device).to(dtype),
        [torch.randn(M, n, device=device).to(dtype) for n in (N, 40, 64)],
    )
    results = []
    for of, lora in ((dtype, adapter), (torch.float64, torch.float64)):
        given, leaf = [leaves(each, of, lora) for each in exact], x.to(of, copy=True).requires_grad_()
        if of == torch.float64:
            ys = formula.group(lora_fused, leaf, given, (0.5,) * 3, (0.0,) * 3, torch.zeros(3, dtype=torch.int64))
        else:
            projections = [lora_fused.Projection(lora_fused.Operands(*each), 0.5) for each in given]
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                ys = lora_fused.lora_linear_group(leaf, projections)
            assert group_function in ys[0].grad_fn.name()
        results.append(passed(ys, [dy.to(y.dtype) for dy, y in zip(dys, ys)], leaf, given))
    assert_close(*results, dtype)


@pytest.mark.kernels_ci
@by_dtype
def test_a_gated_mlp(lora_fused, group_function, device, dtype, adapter):
    sizes = ((K, N), (K, N), (N, K))
    exact = [operands_of(k, n, dtype, adapter, device=device) for k, n in sizes]
    x, dy = (torch.randn(M, K, device=device).to(dtype) for _ in range(2))
    results = []
    for of, lora in ((dtype, adapter), (torch.float64, torch.float64)):
        given, leaf = [leaves(each, of, lora) for each in exact], x.to(of, copy=True).requires_grad_()
        if of == torch.float64:
            y = formula.gated(lora_fused, leaf, given, (0.5,) * 3, (0.0,) * 3, torch.zeros(3, dtype=torch.int64))
        else:
            gate, up, down = (lora_fused.Projection(lora_fused.Operands(*each), 0.5) for each in given)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                y = lora_fused.functional.dispatch.compute_gated(leaf, (gate, up), down, "silu")
        results.append(passed([y], [dy.to(y.dtype)], leaf, given))
    assert_close(*results, dtype)


@pytest.mark.kernels_ci
def test_a_mask_is_the_same_in_forward_and_backward(lora_fused, device):
    """y = J x with one mask in J, so <dy, y> = <x, Jᵀ dy>."""
    weight, _, a, b, _, _ = (
        None if t is None else t.float() for t in operands_of(K, N, torch.float32, torch.float32, device=device)
    )
    x, dy = torch.randn(M, K, device=device, requires_grad=True), torch.randn(M, N, device=device)
    y = lora_fused.lora_linear(x, weight, a, b, 0.5, dropout=0.3)
    y.backward(dy)
    assert not torch.allclose(y, lora_fused.lora_linear(x, weight, a, b, 0.5))
    torch.testing.assert_close((y * dy).sum(), (x * x.grad).sum(), rtol=1e-3, atol=1e-2)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
def test_an_embedding(lora_fused, device, dora):
    ids = torch.randint(0, 50, (4, 7), device=device)
    weight, a, b = torch.randn(50, 32), torch.randn(R, 50), torch.randn(32, R) * R**-0.5
    magnitude = (weight + 0.5 * (b @ a).t()).norm(dim=0) * (0.8 + 0.4 * torch.rand(32)) if dora else None
    trained = [None if t is None else t.to(device).requires_grad_() for t in (a, b, magnitude)]
    y = lora_fused.lora_embedding(ids, weight.to(device), *trained[:2], 0.5, magnitude=trained[2])
    dy = torch.randn(4, 7, 32, device=device)
    y.backward(dy)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in trained]
    table = weight.to(device).double() + 0.5 * (exact[1] @ exact[0]).t()
    if dora:
        table = table * (exact[2] / table.norm(dim=0).detach())
    expected = table[ids]
    expected.backward(dy.double())
    grads = [(ours.grad, theirs.grad) for ours, theirs in zip(trained, exact) if ours is not None]
    for value, truth in ((y, expected), *grads):
        assert relative(value, truth)[0] <= 1e-5


def test_they_need_torch_and_the_package_alone(lora_fused):
    """As `nix run .#ci-test` runs them: selected by their marker, the package on PYTHONPATH, nothing else there."""
    variant = pathlib.Path(lora_fused.__file__).parent
    code = (
        "import sys\n"
        "for name in ('peft', 'transformers', 'kernels', 'bitsandbytes', 'accelerate', 'hypothesis'):\n"
        "    sys.modules[name] = None\n"
        "import pytest\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-m', 'kernels_ci', {str(TESTS)!r}]))"
    )
    env = os.environ | {"PYTHONPATH": str(variant), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout and "error" not in run.stdout
