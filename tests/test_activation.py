"""The gated activation and its backward against float64 autograd of PyTorch's own functions.

Both backends: plain PyTorch everywhere, Triton on a GPU as it runs and elsewhere under the
interpreter.
"""

import pytest
import torch
from helpers.cases import UNIT, assert_as_good, relative
from helpers.mlps import ACTIVATIONS

ON_GPU = torch.cuda.is_available()
HALF = (torch.float16, torch.bfloat16)
TRITON_DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if ON_GPU else ())
# No rows, one element, odd widths below and above one block of columns.
SHAPES = ((0, 5), (1, 1), (7, 33), (3, 2051))
NAMES = ("h", "dgate", "dup")

BACKENDS = [("reference", dtype) for dtype in (torch.float64, torch.float32, *HALF)]
BACKENDS += [("triton", dtype) for dtype in TRITON_DTYPES]


def backend_of(lora_fused, name):
    if name == "triton":
        pytest.importorskip("triton")
        return lora_fused.backends.select.get("triton")
    return lora_fused.backends.reference.activations


@pytest.fixture
def activations(lora_fused):
    """The package with its activation module loaded, which nothing imports at the start."""
    import importlib

    importlib.import_module(f"{lora_fused.__name__}.backends.reference.activations")
    return lora_fused


def draw(shape, dtype, device):
    return (2.5 * torch.randn(shape, device=device)).to(dtype)


def eager(dh, gate, up, name):
    """(h, dgate, dup) as autograd gives them for the model's own two operations."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    h = ACTIVATIONS[name](gate) * up
    return (h.detach(), *torch.autograd.grad(h, (gate, up), dh))


def wide_rows(count, shape, dtype, device):
    """`count` tensors with contiguous rows, cut from one: its row stride is `count` times their width."""
    whole = torch.full((shape[0], count * shape[1]), float("nan"), dtype=dtype, device=device)
    return whole.chunk(count, dim=-1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend,dtype", BACKENDS, ids=str)
def test_as_good_as_eager(activations, poisoned, device, backend, dtype, shape, activation):
    maths = backend_of(activations, backend)
    dh, gate, up = (draw(shape, dtype, device) for _ in range(3))
    truth = eager(dh.double(), gate.double(), up.double(), activation)
    theirs = eager(dh, gate, up, activation)
    ours = maths.gated_backward(dh, gate, up, activation)
    # In float64 eager is the truth itself, its own error unknown.
    unit = 1e-13 if dtype == torch.float64 else UNIT[dtype]
    for name, mine, peer, true in zip(NAMES, ours, theirs, truth):
        assert mine.dtype == dtype and mine.shape == gate.shape
        for error, bound in zip(relative(mine, true), relative(peer, true)):
            assert error <= bound + unit, name
    assert_as_good("h", maths.gated(gate, up, activation), theirs[0], truth[0], dtype)
    without = maths.gated_backward(dh, gate, up, activation, need_h=False)
    assert without[0] is None
    assert torch.equal(without[1], ours[1]) and torch.equal(without[2], ours[2])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_rounded_once(activations, dtype, activation):
    """The float64 result, rounded: no more than half a unit in the last place, where eager has more."""
    dh, gate, up = (draw((40, 50), dtype, "cpu") for _ in range(3))
    truth = eager(dh.double(), gate.double(), up.double(), activation)
    for name, mine, true in zip(
        NAMES, activations.backends.reference.activations.gated_backward(dh, gate, up, activation), truth
    ):
        off = (mine.double() - true).abs()
        allowed = 0.51 * torch.finfo(dtype).eps * true.abs() + UNIT[torch.float32] * true.abs().max()
        assert (off <= allowed).double().mean() > 0.999, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activations, activation):
    maths = activations.backends.reference.activations

    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return maths.gated(gate, up, activation)

        @staticmethod
        def backward(ctx, dh):
            return maths.gated_backward(dh, *ctx.saved_tensors, activation, need_h=False)[1:]

    gate = torch.linspace(-4.1, 4.3, 24, dtype=torch.float64).view(4, 6).requires_grad_()
    up = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Gated.apply, (gate, up))


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's; inf is then the right step
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend,dtype", BACKENDS, ids=str)
def test_saturated_gates(activations, device, backend, dtype, activation):
    """Far from zero f is 0 or g (g² for relu2) and f' 0 or 1 (2g), without overflow on the way."""
    maths = backend_of(activations, backend)
    far = torch.tensor([[40.0, 200.0, -40.0, -200.0, 60000.0, -60000.0]], device=device).to(dtype)
    if dtype in (torch.float32, torch.bfloat16, torch.float64) and activation != "relu2":
        far = torch.cat([far, torch.tensor([[1e30, -1e30]], device=device).to(dtype)], dim=1)
    one = torch.full_like(far, 0.25)
    h, dgate, dup = maths.gated_backward(torch.ones_like(far), far, one, activation)
    positive = far.double().clamp(min=0)
    value = positive.square() if activation == "relu2" else positive
    slope = 2 * positive if activation == "relu2" else (far > 0).double()
    for result, expected in ((h, value / 4), (dgate, slope / 4), (dup, value)):
        assert torch.allclose(result.double(), expected.to(dtype).double(), rtol=UNIT[dtype], atol=1e-15)
    assert torch.equal(maths.gated(far, one, activation), h)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ("reference", "triton"))
def test_slope_at_zero(activations, device, backend, activation):
    """The derivative where ReLU has none is autograd's: zero."""
    maths = backend_of(activations, backend)
    zero, one = torch.zeros(1, 2, device=device), torch.ones(1, 2, device=device)
    results = maths.gated_backward(one, zero, one, activation)
    for mine, peer in zip(results, eager(one, zero, one, activation)):
        assert torch.equal(mine, peer)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ("reference", "triton"))
def test_not_a_number_stays(activations, device, backend, activation):
    maths = backend_of(activations, backend)
    gate = torch.tensor([[float("nan"), 1.0]], device=device)
    one = torch.ones_like(gate)
    results = (maths.gated(gate, one, activation), *maths.gated_backward(one, gate, one, activation)[::2])
    for result in results:
        assert result.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend,dtype", BACKENDS, ids=str)
def test_strided_rows_and_given_outputs(activations, poisoned, device, backend, dtype, shape):
    """Every operand and result is a slice of rows of its own stride."""
    maths = backend_of(activations, backend)
    dh, gate, up = (draw(shape, dtype, device) for _ in range(3))
    expected = maths.gated_backward(dh, gate, up, "silu")
    slices = [wide_rows(count, shape, dtype, device)[-1] for count in range(2, 8)]
    third, first, second, dup, dgate, out = slices
    third.copy_(dh), first.copy_(gate), second.copy_(up)
    h, given_dgate, given_dup = maths.gated_backward(third, first, second, "silu", dgate=dgate, dup=dup)
    assert given_dgate is dgate and given_dup is dup and h.is_contiguous()
    assert maths.gated(first, second, "silu", out=out) is out
    for mine, fresh in zip((h, dgate, dup, out), (*expected, expected[0])):
        assert max(relative(mine, fresh)) <= UNIT[dtype]
    assert torch.equal(first, gate) and torch.equal(second, up)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend,dtype", BACKENDS, ids=str)
def test_results_take_the_place_of_operands(activations, device, backend, dtype, activation):
    maths = backend_of(activations, backend)
    dh, gate, up = (draw((5, 1100), dtype, device) for _ in range(3))
    expected = maths.gated_backward(dh, gate, up, activation)
    kept = gate.clone(), up.clone()
    results = maths.gated_backward(dh, gate, up, activation, dgate=gate, dup=up)
    assert results[1] is gate and results[2] is up
    for mine, fresh in zip(results, expected):
        assert torch.equal(mine, fresh)
    assert maths.gated(*kept, activation, out=kept[0]) is kept[0]
    assert torch.equal(kept[0], expected[0])
