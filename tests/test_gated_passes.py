"""DoRA's scale of gate and up inside the gated activation, forward and backward: which of the two has one, biases and
magnitudes trained or frozen, whole and ragged columns, one row a thread and many."""

import functools

import pytest
import torch
from helpers import formula
from helpers.native_ops import FIELDS, SCALES, backward, compare, draw, flat_on, operands_of, poison, projections_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# tokens, features in, width of gate and up. The last has several rows a thread on a GPU of 132 multiprocessors.
SHAPES = ((1, 16, 24), (130, 32, 136), (70, 33, 101), (4090, 16, 1000) if torch.cuda.is_available() else (300, 16, 520))
# DoRA of gate and of up, whether they have a bias, and what is frozen.
CASES = {
    "both": ((True, True), False, ()),
    "gate": ((True, False), False, ()),
    "up": ((False, True), False, ()),
    "biases": ((True, True), True, ()),
    "frozen biases": ((True, True), True, ("bias",)),
    "frozen biases, gate": ((True, False), True, ("bias",)),
    "frozen magnitudes": ((True, True), True, ("bias", "magnitude")),
    "adapters frozen": ((True, True), False, ("lora_a", "lora_b")),
}
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16))


# Gate and up may be the halves of one projection, which has one magnitude.
LAYOUTS = [(case, half) for case, (dora, *_) in CASES.items() for half in ((None, 0, 1) if all(dora) else (None,))]


@pytest.mark.parametrize("dtype,adapter", DTYPES, ids=str)
@pytest.mark.parametrize("case,gate_half", LAYOUTS)
@pytest.mark.parametrize("m,k,i", SHAPES)
def test_against_the_formula(lora_fused, device, m, k, i, case, gate_half, dtype, adapter):
    dora, bias, frozen = CASES[case]
    generator = torch.Generator().manual_seed(1)
    outs = [(i, each) for each in dora] if gate_half is None else [(2 * i, dora[0])]
    operands = [operands_of(generator, k, out, 8, each, bias) for out, each in outs]
    operands.append(operands_of(generator, i, 24, 8, False, False))
    operands = [[None if t is None else t.to(dtype).double() for t in each] for each in operands]
    x, dy = (draw(generator, m, c).to(dtype).double() for c in (k, 24))
    scalings = (0.5, 0.7, 0.4)[: len(operands)]

    def run(compute, device, dtype, adapter):
        flat, own = flat_on(operands, device, dtype, adapter), x.detach().to(device, dtype).requires_grad_()
        for index, tensor in enumerate(flat):
            field = index % (len(FIELDS) + SCALES)
            if tensor is not None and field < len(FIELDS) and FIELDS[field] in frozen:
                tensor.requires_grad_(False)
        given = dy.to(device, dtype)
        poison(device)
        return backward([compute(own, flat)], [given], own, flat)

    def native(x, flat):
        specs = [lora_fused.ProjectionSpec(0.0)] * len(operands)
        projections = projections_of(lora_fused, flat, scalings, specs)
        return lora_fused.autograd.gated_mlp_native.gated_mlp(x, projections, (0, gate_half or 0), None)

    def formulated(x, flat):
        of = lora_fused.specs.unflatten(flat)
        return formula.gated(lora_fused, x, of, scalings, [0.0] * len(operands), torch.zeros(3), gate_half)

    truth = run(formulated, "cpu", torch.float64, torch.float64)
    trained = sum(t is not None for each in operands for t in each[1:]) - sum(
        each[FIELDS.index(name)] is not None for each in operands for name in frozen
    )
    assert len(truth) == 2 + trained and all(value is not None for value in truth)
    compare(run(native, device, dtype, adapter), truth, dtype, stored=8)
    compare(run(native, "cpu", torch.float64, torch.float64), truth, torch.float64, stored=64)


@pytest.mark.parametrize("activation", range(5))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("i", (72, 71))
def test_activations(lora_fused, device, activation, dtype, i):
    """The MLP that has its scales inside against the one whose gate, up and down are ops of their own."""
    generator = torch.Generator().manual_seed(2)
    gate, up = (operands_of(generator, 32, i, 8, True, False) for _ in range(2))
    operands = [gate, up, operands_of(generator, i, 24, 8, False, False)]
    operands = [[None if t is None else t.to(dtype).double() for t in each] for each in operands]
    x, dy = (draw(generator, 70, c).to(dtype).double() for c in (32, 24))
    scalings, specs = (0.5, 0.7, 0.4), [lora_fused.ProjectionSpec(0.0)] * 3
    maths = lora_fused.backends.reference.activations

    def run(compute, device, dtype):
        flat, own = flat_on(operands, device, dtype, dtype), x.detach().to(device, dtype).requires_grad_()
        poison(device)
        return backward([compute(own, flat)], [dy.to(device, dtype)], own, flat)

    def native(x, flat):
        projections = projections_of(lora_fused, flat, scalings, specs)
        return lora_fused.autograd.gated_mlp_native.gated_mlp(x, projections, (activation, 0), None)

    value = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
        "relu": torch.relu,
        "relu2": lambda g: torch.relu(g).square(),
    }[maths.ACTIVATIONS[activation]]

    def formulated(x, flat):
        of = lora_fused.specs.unflatten(flat)
        g, u = (formula.linear(lora_fused, x, each, s) for each, s in zip(of[:2], scalings))
        return formula.linear(lora_fused, value(g) * u, of[2], scalings[2])

    truth = run(formulated, "cpu", torch.float64)
    compare(run(native, device, dtype), truth, dtype, stored=64 if dtype == torch.float64 else 8)


@pytest.mark.parametrize("bias", (1.0, 1000.0))
@pytest.mark.parametrize("scale", (0.01, 1.0, 1.3))
def test_a_small_scale_rounds_at_its_own_size(lora_fused, device, scale, bias):
    """y = c∘(u - b) + b of a magnitude far below the norm is not rounded at the size of u; u stays u where c is 1."""
    generator = torch.Generator().manual_seed(3)
    weight, a = draw(generator, 40, 32), draw(generator, 8, 32)
    b, x = 20 * draw(generator, 40, 8), draw(generator, 50, 32)
    biases = (bias * draw(generator, 40)).float()
    weight, a, b, x = (t.float() for t in (weight, a, b, x))
    exact = [t.double() for t in (weight, a, b, x)]
    norm = (exact[0] + 0.5 * exact[2] @ exact[1]).norm(dim=1)
    magnitude = (scale * norm).float()
    operands = lora_fused.Operands(*(t.to(device) for t in (weight, biases, a, b)), None, magnitude.to(device))
    projection = lora_fused.Projection(operands, 0.5, lora_fused.ProjectionSpec(0.0))
    (y,) = lora_fused.autograd.group_native.lora_group(x.to(device), [projection], None)
    by = (magnitude.double() / norm)[None]
    product = exact[3] @ (exact[0] + 0.5 * exact[2] @ exact[1]).T
    unit = torch.finfo(torch.float32).eps
    # The product's own error in u, which holds b, times c; c's error and a rounding of each term of the sum.
    size = exact[3].abs() @ (exact[0].abs() + 0.5 * exact[2].abs() @ exact[1].abs()).T + biases.double().abs()
    bound = unit * (8 * by * size + 2 * biases.double().abs() + (4 * (1 - by).abs() * biases.double().abs()))
    error = (y.cpu().double() - (by * product + biases.double())).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.3g} of the bound"
