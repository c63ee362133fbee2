"""dequantize_4bit: the native op, its Triton twin and the formula, against bitsandbytes, bit for bit."""

import itertools

import pytest
import torch

bnb = pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from helpers.quantized import random_four_bit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Whole rows of blocks, odd counts, a last byte half used, less than one group, several thread blocks.
SHAPES = ((64, 4096), (3, 8192), (33, 17), (7, 130), (1, 1), (2, 3), (5, 1001), (129, 260), (257, 96))
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(tensor):
    """The bits of a tensor, zeros without their sign: bitsandbytes' own backends differ in it."""
    return (tensor + 0.0).contiguous().view(INTEGERS[tensor.dtype])


def native(lora_fused, operands, spec, dtype):
    return lora_fused.quantization.dequantize(operands, spec, dtype)


@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
@pytest.mark.parametrize("nested", (False, True), ids=("plain", "nested"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_as_bitsandbytes(lora_fused, poisoned, device, quant_type, nested, dtype, blocksize):
    for shape in SHAPES:
        operands, spec, packed, state = random_four_bit(lora_fused, shape, blocksize, quant_type, nested, dtype, device)
        formula = lora_fused.backends.reference.dequantize_4bit(
            operands, spec, 0, torch.full(shape, float("nan"), dtype=dtype, device=device)
        )
        ours = native(lora_fused, operands, spec, dtype)
        assert torch.equal(bits(ours), bits(formula)), shape
        if device == "cuda":
            assert torch.equal(ours.view(INTEGERS[dtype]), dequantize_4bit(packed, state).view(INTEGERS[dtype])), shape
        elif shape[1] % blocksize == 0:  # its CPU kernel reads blocks that cross rows in another way
            assert torch.equal(bits(ours), bits(dequantize_4bit(packed, state))), shape


@pytest.mark.parametrize("storage", (torch.uint8, torch.bfloat16, torch.float32), ids=str)
def test_storage_dtypes_and_other_compute_dtypes(lora_fused, device, storage):
    """The storage is bytes whatever it is called; a weight may be made in another dtype than its own."""
    operands, spec, packed, state = random_four_bit(
        lora_fused, (64, 256), 64, "nf4", True, torch.float16, device, storage
    )
    assert torch.equal(bits(native(lora_fused, operands, spec, torch.float16)), bits(dequantize_4bit(packed, state)))
    state.dtype = torch.bfloat16
    assert torch.equal(bits(native(lora_fused, operands, spec, torch.bfloat16)), bits(dequantize_4bit(packed, state)))
    state.dtype = torch.float32
    wide = native(lora_fused, operands, spec, torch.float64)
    assert wide.dtype == torch.float64 and torch.equal(wide, dequantize_4bit(packed, state).double())


@pytest.mark.parametrize("shape", ((40, 64), (24, 33), (19, 1001)), ids=str)
@pytest.mark.parametrize("offset", (0, 1), ids=("aligned", "unaligned"))
def test_pieces_and_unaligned_memory(lora_fused, device, shape, offset):
    """Any even first element; operands that begin at an odd address; nothing outside is written."""
    operands, spec, *_ = random_four_bit(lora_fused, shape, 64, "nf4", True, torch.bfloat16, device)
    whole = native(lora_fused, operands, spec, torch.bfloat16).flatten()
    shifted = torch.cat([operands.weight.flatten().new_zeros(offset), operands.weight.flatten()])[offset:]
    moved = operands._replace(weight=shifted)
    for first in (0, 2, 8, 62, 64, 130):
        for count in (1, 7, 8, 9, 300):
            buffer = torch.full((count + offset + 3,), float("nan"), dtype=torch.bfloat16, device=device)
            out = buffer[offset : offset + count]
            lora_fused.backends.select.dequantize_4bit(moved, spec, first, out)
            assert torch.equal(out, whole[first : first + count]), (first, count)
            assert buffer[:offset].isnan().all() and buffer[offset + count :].isnan().all()


@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
@pytest.mark.parametrize("nested", (False, True), ids=("plain", "nested"))
@pytest.mark.parametrize("dtype", [d for d in DTYPES if torch.cuda.is_available() or d != torch.bfloat16], ids=str)
def test_triton_twin(lora_fused, poisoned, device, quant_type, nested, dtype):
    """The interpreter cuts where bfloat16 is to be rounded: not there."""
    pytest.importorskip("triton")
    kernels = lora_fused.backends.select.get("triton")
    for shape, blocksize in itertools.product(((33, 17), (3, 4096), (129, 260)), (32, 64, 4096)):
        operands, spec, *_ = random_four_bit(lora_fused, shape, blocksize, quant_type, nested, dtype, device)
        for first in (0, 34):
            out = torch.full((shape[0] * shape[1] - first,), float("nan"), dtype=dtype, device=device)
            kernels.dequantize_4bit(operands, spec, first, out)
            assert torch.equal(bits(out), bits(native(lora_fused, operands, spec, dtype).flatten()[first:]))


@pytest.mark.parametrize(
    "change, message",
    (
        (dict(blocksize=48), "blocksize is 48, expected a power of two"),
        (dict(blocksize=32), "absmax must be contiguous uint8 of at least 64 elements, got 32"),
        (dict(first=3), "first is 3, expected an even element"),
        (dict(first=2), "packed has 1024 bytes, expected at least 1025"),
        (dict(nested_code=None), "nested_code or offset is missing"),
        (dict(nested_blocksize=2), "nested_absmax must be contiguous float32 of at least 16 elements, got 1"),
        (dict(absmax=torch.zeros(32)), "absmax must be contiguous uint8 of at least 32 elements, got 32"),
        (dict(out=torch.empty(32, 64, dtype=torch.int32)), "out must be contiguous float32, bfloat16 or float16"),
    ),
    ids=range(8),
)
def test_the_op_refuses(lora_fused, device, change, message):
    """What would read past the end of a tensor raises, and says what it saw."""
    operands, *_ = random_four_bit(lora_fused, (32, 64), 64, "nf4", True, torch.float32, device)
    arguments = dict(
        packed=operands.weight, absmax=operands.absmax, nested_absmax=operands.nested_absmax,
        nested_code=operands.nested_code, offset=operands.offset, blocksize=64, nested_blocksize=256, fp4=False,
        first=0, out=torch.empty(32, 64, device=device),
    )  # fmt: skip
    change = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    with pytest.raises(RuntimeError, match=message):
        lora_fused.backends.native.dequantize_4bit(*{**arguments, **change}.values())


def test_int8_rows(lora_fused):
    """int8 with a scale a row, as bitsandbytes makes floating point of it."""
    codes, scale = torch.randint(-127, 128, (24, 40), dtype=torch.int8), torch.rand(24) + 0.1
    spec = lora_fused.specs.EightBit((24, 40))
    ours = lora_fused.quantization.dequantize(lora_fused.Operands(codes, absmax=scale), spec, torch.float32)
    assert torch.equal(ours, bnb.functional.int8_vectorwise_dequant(codes, scale))


def test_norm_in_pieces(lora_fused, device, monkeypatch):
    """DoRA's norm from the packed weight: as of the whole weight, a bounded part of it in floating point."""
    shape, rank = (100, 96), 5
    lora_a, lora_b = torch.randn(rank, shape[1], device=device), torch.randn(shape[0], rank, device=device)
    operands, spec, *_ = random_four_bit(lora_fused, shape, 32, "nf4", True, torch.float32, device)
    operands = operands._replace(lora_a=lora_a, lora_b=lora_b)
    weight = native(lora_fused, operands, spec, torch.float32)
    made = []
    whole = lora_fused.quantization.four_bit.rows
    monkeypatch.setattr(lora_fused.quantization, "NORM_ELEMENTS", 24 * shape[1])
    monkeypatch.setattr(
        lora_fused.quantization.four_bit, "rows", lambda *args: made.append(whole(*args).shape) or whole(*args)
    )
    norm = lora_fused.quantization.row_norm(operands, spec, 0.7)
    truth = (weight.double() + 0.7 * lora_b.double() @ lora_a.double()).norm(dim=1)
    torch.testing.assert_close(norm.double(), truth, rtol=2e-6, atol=0)
    assert made == [(24, 96)] * 4 + [(4, 96)]


def test_norms_and_gains_of_a_mixed_group(lora_fused, poisoned, device):
    """Of dense and packed members of any dtype in one op, the packed ones larger than what is made floating point at
    a time; a member without a magnitude has neither."""
    shapes, rank = ((24, 96), (300, 2**16), (33, 96), (129, 96), (8, 96)), 3
    formats, members = [], []
    for i, (n, k) in enumerate(shapes):
        if i == 0:
            spec, operands = None, lora_fused.Operands(torch.randn(n, k, device=device) * 0.3)
        else:
            dtype = (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16)[i - 1]
            operands, spec, *_ = random_four_bit(
                lora_fused, (n, k), 32, "nf4" if i % 2 else "fp4", i != 2, dtype, device
            )
        a, b = torch.randn(rank, k, device=device) * k**-0.5, torch.randn(n, rank, device=device)
        magnitude = None if i == 4 else torch.rand(n, device=device).to(torch.bfloat16 if i == 3 else torch.float32)
        formats.append(spec)
        members.append(operands._replace(lora_a=a, lora_b=b, magnitude=magnitude))
    scalings = [0.5, 0.7, 2.0, 0.1, 1.0]
    norms, mag_norm_scales = lora_fused.quantization.dora_scales(
        [p.weight for p in members], members, formats, scalings
    )
    assert norms[4] is mag_norm_scales[4] is None
    for p, spec, s, norm, mag_norm_scale in list(zip(members, formats, scalings, norms, mag_norm_scales))[:4]:
        weight = p.weight if spec is None else native(lora_fused, p, spec, spec.dtype)
        truth = (weight.double() + s * p.lora_b.double() @ p.lora_a.double()).norm(dim=1)
        torch.testing.assert_close(norm.double(), truth, rtol=2e-6, atol=0)
        torch.testing.assert_close(mag_norm_scale.double(), p.magnitude.double() / truth, rtol=4e-6, atol=0)


def test_quant_state_is_as_read(lora_fused):
    """The attributes that `peft_base` reads are those of this bitsandbytes."""
    state = quantize_4bit(torch.randn(64, 64))[1]
    assert isinstance(state, QuantState) and state.state2 is None and state.nested is False
