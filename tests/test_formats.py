"""Numbers that Python and the library have to mean the same by, and formats that an op does not know: refused by name,
or right, never taken for something else."""

import dataclasses

import pytest
import torch
from helpers.cases import DEVICE

pytestmark = pytest.mark.usefixtures("on_device")
N, K, R = 8, 16, 2


@dataclasses.dataclass(frozen=True)
class SevenBit:
    """A format of the future."""

    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32


def eight_bit(lora_fused, magnitude=None, weight=None):
    """(an int8 projection, the same with its weight in floating point)"""
    w, a, b = torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
    scale = w.abs().amax(1)
    codes = (w / scale[:, None] * 127).round().to(torch.int8)
    spec = lora_fused.specs.ProjectionSpec(quantized=lora_fused.specs.EightBit((N, K)))
    stored = lora_fused.Operands(codes, None, a, b, None, magnitude, scale)
    dense = lora_fused.Operands(codes.float() * scale[:, None] * (1 / 127), None, a, b, None, magnitude)
    return lora_fused.Projection(stored, 0.7, spec), lora_fused.Projection(dense, 0.7)


def unknown(lora_fused, magnitude=None):
    projection, _ = eight_bit(lora_fused, magnitude)
    return projection._replace(spec=lora_fused.specs.ProjectionSpec(quantized=SevenBit((N, K))))


@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
def test_eight_bits_are_dequantized(lora_fused, dora):
    """Alone and beside others, forward and backward."""
    magnitude = torch.rand(N) + 1.0 if dora else None
    stored, dense = eight_bit(lora_fused, magnitude)
    plain = lora_fused.Projection(lora_fused.Operands(torch.randn(4, K)))
    results = []
    for projection in (stored, dense):
        x = torch.randn(5, K, generator=torch.Generator(DEVICE).manual_seed(1)).requires_grad_()
        y, other = lora_fused.functional.dispatch.compute_group(x, (projection, plain))
        (y.square().sum() + other.sum()).backward()
        results.append((y.detach(), other.detach(), x.grad))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_gated_mlp_with_eight_bits(lora_fused):
    stored, dense = eight_bit(lora_fused)
    up = lora_fused.Projection(lora_fused.Operands(torch.randn(N, K)))
    down = lora_fused.Projection(lora_fused.Operands(torch.randn(4, N)))
    x = torch.randn(5, K)
    mine, theirs = (
        lora_fused.functional.dispatch.compute_gated(x, (gate, up), down, "silu") for gate in (stored, dense)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
@pytest.mark.parametrize("training", (False, True))
def test_an_unknown_format_is_refused(lora_fused, dora, training):
    projection, x = unknown(lora_fused, torch.ones(N) if dora else None), torch.randn(5, K)
    projection.operands.lora_b.requires_grad_(training)
    plain = lora_fused.Projection(lora_fused.Operands(torch.randn(4, K)))
    for group in ((projection,), (plain, projection)):
        with pytest.raises(TypeError, match="^weight: format SevenBit is unknown, expected FourBit or EightBit"):
            lora_fused.functional.dispatch.compute_group(x, group)
    with pytest.raises(TypeError, match="^weight: format SevenBit"):
        lora_fused.functional.dispatch.compute_gated(x, (projection, projection), plain, "silu")


def test_only_what_the_ops_know_becomes_numbers(lora_fused):
    for form in (SevenBit((N, K)), lora_fused.specs.EightBit((N, K))):
        with pytest.raises(TypeError, match=f"^weight: format {type(form).__name__} is none of the native ops'"):
            lora_fused.quantization.packed([None, form], [lora_fused.Operands(torch.randn(N, K))] * 2)


def forward(lora_fused, quantized, activation=None, scales=()):
    w, x = torch.zeros(N * K // 2, 1, dtype=torch.uint8), torch.randn(5, K)

    def base(weight):
        return [weight, None, None, None, None, None]

    if activation is None:
        operands = [*base(w), *scales]
        return lora_fused.backends.native.lora_forward(x, operands, [1.0], None, None, list(quantized), False)
    operands = base(torch.randn(K, K)) * 3
    return lora_fused.backends.native.gated_forward(
        x, operands, [1.0] * 3, None, None, None, False, activation, 0, False
    )


def test_the_op_refuses_unknown_numbers(lora_fused):
    packed, scale = lora_fused.backends.native.PackedWeight, [torch.ones(N * K // 64)]
    known = packed(lora_fused.backends.native.FORMATS.index("nf4"), N, K, 64)
    assert forward(lora_fused, known, scales=scale)[0].shape == (5, N)
    for change, message in (
        (
            dict(format=len(lora_fused.backends.native.FORMATS)),
            "weight 0: format 3 is unknown, expected one of floating,nf4,fp4",
        ),
        (dict(format=-1), "weight 0: format -1 is unknown"),
        (dict(dtype=3), "weight 0: dtype 3 is unknown, expected one of float32,bfloat16,float16"),
        (dict(first_scale=1), "weight 0: 1 scales, expected at least 2"),
        (dict(nested_blocksize=256), "weight 0: 1 scales, expected at least 4"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(lora_fused, known._replace(**change), scales=scale)
    with pytest.raises(RuntimeError, match="quantized: 6 numbers for 1 weights, expected 7 each"):
        forward(lora_fused, known[:6], scales=scale)
    assert forward(lora_fused, (), activation=len(lora_fused.backends.native.ACTIVATIONS) - 1)[0].shape == (5, K)
    for activation in (-1, len(lora_fused.backends.native.ACTIVATIONS)):
        with pytest.raises(RuntimeError, match=f"activation: {activation} is unknown, expected one of silu,gelu"):
            forward(lora_fused, (), activation=activation)


def test_the_library_names_its_activations(lora_fused):
    """What an index means is the library's to say: each computes what the formula of its name does."""
    maths, x = lora_fused.backends.reference.activations, torch.randn(5, K)
    assert set(lora_fused.backends.native.ACTIVATIONS) == set(maths.ACTIVATIONS) and len(maths.ACTIVATIONS) == 5
    weights = [torch.randn(N, K), torch.randn(N, K), torch.randn(4, N)]
    gate, up, down = (lora_fused.Projection(lora_fused.Operands(w)) for w in weights)
    for name in maths.ACTIVATIONS:
        ours = lora_fused.functional.dispatch.compute_gated(x, (gate, up), down, name)
        right = maths.gated(x @ weights[0].t(), x @ weights[1].t(), name) @ weights[2].t()
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


def test_the_record_s_fields_are_the_library_s(lora_fused):
    names = lora_fused._ops.ops.names
    assert tuple(names("packed_weight").split(",")) == lora_fused.backends.native.PackedWeight._fields
    assert lora_fused.backends.native.QUANTIZED_DTYPES == (torch.float32, torch.bfloat16, torch.float16)
    with pytest.raises(RuntimeError, match="names: nothing is called colours"):
        names("colours")
