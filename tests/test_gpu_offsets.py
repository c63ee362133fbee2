"""Offsets beyond 2³¹ elements, which only a GPU has the memory for."""

import pytest
import torch
from helpers.cases import relative
from helpers.philox import mask_bits

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.xdist_group("far"),  # they share 9 GB and take up to 50: one process runs them all
]
BF16, BACKENDS = torch.bfloat16, ("native", "reference", "triton")
# Rows of which 3200 columns are more than 2³¹ elements.
FAR, WIDE = 700_001, 3200


def ends(t):
    """The first and the last rows, where an offset of 32 bits would wrap around."""
    return torch.cat((t[:40], t[-40:]))


@pytest.fixture(scope="module")
def far():
    """x [FAR, WIDE] in bfloat16 and dy, zero but for the ends."""
    torch.manual_seed(0)
    x = torch.randn(FAR, WIDE, device="cuda", dtype=BF16)
    dy = torch.zeros(FAR, WIDE, device="cuda", dtype=BF16)
    dy[:40].normal_(), dy[-40:].normal_()
    yield x, dy
    del x, dy
    torch.cuda.empty_cache()


def far_operands(lora_fused, n=WIDE, **config):
    weight = torch.randn(n, WIDE, device="cuda", dtype=BF16) * WIDE**-0.5
    a = torch.randn(16, WIDE, device="cuda", dtype=BF16) * WIDE**-0.5
    b = torch.randn(n, 16, device="cuda", dtype=BF16) * 0.25
    magnitude = torch.rand(n, device="cuda") + 0.5 if config.get("dora") else None
    return lora_fused.Operands(weight, None, a.requires_grad_(), b.requires_grad_(), None, magnitude)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
def test_offsets_beyond_32_bits(lora_fused, far, backend, dora):
    """The ends of a call with more than 2³¹ elements are those of a call with the ends alone."""
    x, dy = far
    operands = far_operands(lora_fused, dora=dora)

    def run(x, dy):
        x = x.detach().requires_grad_()
        operands.lora_a.grad = operands.lora_b.grad = None
        y = lora_fused.lora_linear_group(x, [lora_fused.Projection(operands, 0.5)], backend=backend)[0]
        y.backward(dy)
        return y.detach(), x.grad, operands.lora_a.grad, operands.lora_b.grad

    few = run(ends(x), ends(dy))
    y, dx, da, db = run(x, dy)
    assert not dx[1000:-1000].any()
    for ours, expected in zip((ends(y), ends(dx), da, db), few):
        assert relative(ours, expected)[0] < 1e-2


def test_dropout_beyond_32_bits(lora_fused, far):
    x, _ = far
    out = torch.full_like(x, float("nan"))
    lora_fused._ops.ops.dropout(x, torch.tensor([11], device="cuda"), 0.4, out)
    for row in (0, FAR - 1):
        for col in (0, 1, WIDE - 1):
            kept = mask_bits(11, row, col) >= round(0.4 * 2**16)
            expected = x[row, col].float() / 0.6 if kept else torch.zeros((), device="cuda")
            torch.testing.assert_close(out[row, col].float(), expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("backend", ("native", "triton"))
def test_gated_mlp_beyond_32_bits(lora_fused, far, backend):
    """Gate, up, their product and every gradient of them are that large."""
    gate, up, down = (lora_fused.Projection(far_operands(lora_fused), 0.5) for _ in range(3))

    def run(x, dy):
        x = x.detach().requires_grad_()
        for projection in (gate, up, down):
            projection.operands.lora_a.grad = projection.operands.lora_b.grad = None
        y = lora_fused.functional.dispatch.compute_gated(x, (gate, up), down, "silu", backend=backend)
        y.backward(dy)
        grads = [t.grad for p in (gate, up, down) for t in (p.operands.lora_a, p.operands.lora_b)]
        return [ends(y.detach()), ends(x.grad), *grads]

    x, dy = far
    few = run(ends(x), ends(dy))
    for ours, expected in zip(run(x, dy), few):
        assert relative(ours, expected)[0] < 2e-2


def test_row_norm_beyond_32_bits(lora_fused, far):
    """A weight of more than 2³¹ elements."""
    weight, _ = far
    a, b = torch.randn(8, WIDE, device="cuda", dtype=BF16), torch.randn(FAR, 8, device="cuda", dtype=BF16)
    norm = lora_fused.row_norm(weight, a, b, 0.1)
    torch.testing.assert_close(ends(norm), lora_fused.row_norm(ends(weight), a, ends(b), 0.1), rtol=1e-4, atol=0)
