"""The native row_norm against ‖W + s·B·A‖ by row in fp64."""

import itertools

import pytest
import torch

pytestmark = pytest.mark.sm80_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, K, R): tile edges of 4 and 32 rows, 16 columns; odd, empty and large-rank cases.
SHAPES = [
    (1, 1, 1),
    (4, 16, 8),
    (37, 129, 3),
    (64, 256, 16),
    (65, 257, 33),
    (130, 1000, 512),
    (7, 33, 0),
    (5, 0, 4),
    (0, 7, 3),
]
# On a GPU whole tiles, whole 16-byte rows and neither; several row blocks and splits of K.
LARGE = [
    (256, 512, 64),
    (129, 1032, 72),
    (300, 4104, 8),
    (1000, 776, 384),
    (513, 2560, 200),
    (65, 1001, 640),
    (700, 4096, 32),
]
# Large enough for Hopper's own norm.
VERY_LARGE = [(5200, 4104, 32), (1300, 16400, 5), (40500, 520, 17), (5120, 4096, 1), (5200, 4104, 33)]
# fp32 sums of K·R products: 2e-6 is 16 times fp32's rounding error.
RTOL = 2e-6


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory is NaN, so an element that an op leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(n, k, r, dtypes=(torch.float32,) * 3):
    generator = torch.Generator().manual_seed(n + k + r)
    shapes = ((n, k), (r, k), (n, r))
    weight, lora_a, lora_b = (torch.randn(s, generator=generator) for s in shapes)
    lora_b = lora_b / max(r, 1) ** 0.5
    return tuple(t.to(d) for t, d in zip((weight, lora_a, lora_b), dtypes))


def expected(weight, lora_a, lora_b, scaling):
    return (weight.double() + scaling * lora_b.double() @ lora_a.double()).norm(dim=1)


def check(norm, operands, scaling):
    torch.testing.assert_close(norm.double(), expected(*operands, scaling), rtol=RTOL, atol=0)


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def row_norm(lora_fused, request):
    """The op on each device this machine has: operands and result live on the CPU."""

    def call(*args, unaligned=False):
        operands = [t.to(request.param) for t in args[:3]]
        if unaligned:
            operands = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for t in operands]
        return lora_fused._ops.ops.row_norm(*operands, *args[3:]).cpu()

    return call


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(row_norm, shape):
    operands = make(*shape)
    norm = row_norm(*operands, 0.7)
    assert norm.dtype == torch.float32 and norm.shape == (shape[0],)
    check(norm, operands, 0.7)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)), ids=str)
def test_dtypes(row_norm, dtypes):
    operands = make(37, 129, 3, dtypes)
    check(row_norm(*operands, 1.5), operands, 1.5)


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16,) * 3,
        (torch.float16,) * 3,
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32,) * 3,
    ],
    ids=str,
)
def test_large(row_norm, shape, dtypes):
    operands = make(*shape, dtypes)
    first = row_norm(*operands, 0.7)
    check(first, operands, 0.7)
    assert torch.equal(first, row_norm(*operands, 0.7))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the CPU has one path")
@pytest.mark.parametrize("shape", VERY_LARGE, ids=str)
@pytest.mark.parametrize("dtype_b", DTYPES, ids=str)
def test_very_large(lora_fused, shape, dtype_b):
    operands = [t.cuda() for t in make(*shape, (torch.bfloat16, torch.float32, dtype_b))]
    first = lora_fused._ops.ops.row_norm(*operands, 0.7)
    check(first, operands, 0.7)
    assert torch.equal(first, lora_fused._ops.ops.row_norm(*operands, 0.7))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 3, (torch.bfloat16, torch.float32, torch.float32)], ids=str)
@pytest.mark.parametrize("shape", [(300, 1000, 16)] + [(5200, 4096, 16)] * torch.cuda.is_available(), ids=str)
def test_an_adapter_that_nearly_takes_the_weight_away(row_norm, shape, dtypes):
    """Rows a tenth as long as W's: where squares cancel, float32's error grows by what they lose, a hundredfold."""
    noise, lora_a, lora_b = make(*shape, dtypes)
    weight = (0.1 * noise.double() - lora_b.double() @ lora_a.double()).to(dtypes[0])
    truth = expected(weight, lora_a, lora_b, 1.0)
    lost = (weight.double().norm(dim=1) / truth).square()
    assert 50 < lost.mean() < 200
    error = (row_norm(weight, lora_a, lora_b, 1.0).double() - truth).abs() / truth
    assert (error <= RTOL * lost).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_rows(row_norm, dtype):
    """A base address that no vector load can take."""
    operands = make(70, 264, 24, (dtype,) * 3)
    check(row_norm(*operands, 0.7, unaligned=True), operands, 0.7)


@pytest.mark.parametrize("factor_a, factor_b", [(1e-20, 1e20), (1e15, 1e-15), (1e-6, 1.0), (0.0, 1.0)])
def test_adapters_beyond_half_range(row_norm, factor_a, factor_b):
    """float32 adapters keep their range and, next to their largest entries, their precision."""
    weight, lora_a, lora_b = make(40, 300, 20)
    lora_a = lora_a * factor_a * 10.0 ** torch.linspace(-3, 3, 300)
    lora_b = lora_b * factor_b * 10.0 ** torch.linspace(-3, 3, 40)[:, None]
    check(row_norm(weight, lora_a, lora_b, 0.7), (weight, lora_a, lora_b), 0.7)


@pytest.mark.parametrize("scaling", [0.0, -2.0, 64.0])
def test_scaling(row_norm, scaling):
    operands = make(33, 65, 5)
    check(row_norm(*operands, scaling), operands, scaling)


def test_public_function(lora_fused):
    operands = make(33, 65, 5, (torch.bfloat16, torch.float32, torch.float32))
    check(lora_fused.row_norm(*operands, 0.5), operands, 0.5)


def test_any_strides(row_norm):
    operands = make(40, 50, 6)
    strided = [torch.cat([t.t(), t.t()]).t()[:, : t.shape[1]] for t in operands]
    assert not any(t.is_contiguous() for t in strided)
    torch.testing.assert_close(row_norm(*strided, 0.5), row_norm(*operands, 0.5), rtol=0, atol=0)


def test_same_bits_for_any_number_of_threads(row_norm):
    operands = make(300, 515, 17)
    before = torch.get_num_threads()
    try:
        norms = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            norms.append(row_norm(*operands, 0.5))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(norms[0], norms[1]) and torch.equal(norms[0], norms[2])


def test_nan_reaches_only_its_row(row_norm):
    weight, lora_a, lora_b = make(6, 20, 2)
    weight[4, 19] = float("nan")
    assert row_norm(weight, lora_a, lora_b, 0.5).isnan().tolist() == [False] * 4 + [True, False]


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((3,), (2, 4), (3, 2)), r"weight must be 2-D, got shape \[3\]"),
        (((3, 4), (2, 5), (3, 2)), r"lora_a of shape \[2, 5\].*weight of shape \[3, 4\]"),
        (((3, 4), (2, 4), (4, 2)), r"lora_b of shape \[4, 2\]"),
        (((3, 4), (2, 4), (3, 3)), r"lora_b of shape \[3, 3\]"),
    ],
)
def test_bad_shapes(row_norm, shapes, message):
    with pytest.raises(RuntimeError, match=message):
        row_norm(*(torch.ones(s) for s in shapes), 1.0)


@pytest.mark.parametrize("position, name", list(enumerate(["weight", "lora_a", "lora_b"])))
def test_bad_dtype(row_norm, position, name):
    operands = list(make(3, 4, 2))
    operands[position] = operands[position].double()
    with pytest.raises(RuntimeError, match=rf"{name} of shape .* must be float32"):
        row_norm(*operands, 1.0)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16,) * 3,
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(256, 512, 64), (130, 264, 136), (100, 1032, 384)], ids=str)
def test_triton(lora_fused, device, monkeypatch, shape, dtypes):
    kernels = pytest.importorskip("triton") and lora_fused.backends.select.get("triton")
    operands = [t.to(device) for t in make(*shape, dtypes)]
    if device == "cpu":  # the interpreter: no bfloat16 dot, no limit
        monkeypatch.setitem(kernels.row_norm_fits.__globals__, "shared_memory", lambda device: 2**20)
        if dtypes[1] != dtypes[2] or dtypes[1] == torch.float32:
            pytest.skip("the interpreter's bfloat16 dot is wrong")
    assert kernels.row_norm_fits(*operands)
    norm = kernels.row_norm(*operands, 0.7)
    check(norm.cpu(), [t.cpu() for t in operands], 0.7)
    assert torch.equal(norm, kernels.row_norm(*operands, 0.7))


def test_triton_leaves_what_it_cannot_read(lora_fused):
    kernels = pytest.importorskip("triton") and lora_fused.backends.select.get("triton")
    for shape, dtype in (
        ((64, 65, 128), torch.float16),
        ((64, 64, 129), torch.float16),
        ((64, 64, 128), torch.float32),
    ):
        assert not kernels.row_norm_fits(*make(*shape, (dtype,) * 3))
