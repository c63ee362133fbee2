"""What torch.compile and torch.export trace, against the ops themselves: the shape functions of the native ops, and
the ops that are traced through to them."""

import pytest
import torch
from helpers.native_ops import GROUPS, flat_on, operands_of, projections_of
from torch.utils._python_dispatch import TorchDispatchMode

OPS = {
    "lora_forward",
    "lora_backward",
    "gated_forward",
    "gated_backward",
    "dora_scales",
    "mag_norm_scale",
    "row_norm",
    "dropout",
}


class Recorded(TorchDispatchMode):
    """Calls of the native ops, with their arguments."""

    def __init__(self, namespace):
        super().__init__()
        self.namespace, self.calls = namespace, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == self.namespace:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def calls(lora_fused, run):
    with Recorded(lora_fused._ops.add_op_namespace_prefix("").removesuffix("::")) as recorded:
        run()
    return recorded.calls


def check(recorded):
    """The fake's results are as those of the op, in number, shape, strides, dtype and device, and the op writes and
    returns what its schema says."""
    for func, args, kwargs in recorded:
        detached = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach(), (args, kwargs))
        torch.library.opcheck(func, *detached, test_utils=("test_schema", "test_faketensor"))
    return {func.overloadpacket.__name__ for func, *_ in recorded}


@pytest.mark.parametrize("elsewhere", (False, True))
@pytest.mark.parametrize("group", ("masks", "mixed", "no masks"))
def test_groups(lora_fused, device, monkeypatch, group, elsewhere):
    generator = torch.Generator().manual_seed(1)
    operands = [operands_of(generator, 64, n, r, dora, bias) for n, r, _, dora, bias in GROUPS[group]]
    specs = [lora_fused.ProjectionSpec(p) for _, _, p, _, _ in GROUPS[group]]
    x, seeds = torch.randn(2, 5, 64, device=device, requires_grad=True), torch.tensor([5, 7, 9], device=device)
    if elsewhere:
        monkeypatch.setattr(lora_fused.backends.select, "norm_is_native", lambda *_: False)

    def run():
        flat = flat_on(operands, device, torch.float32, torch.float32)
        ys = lora_fused.autograd.group_native.lora_group(x, projections_of(lora_fused, flat, (0.5,) * 3, specs), seeds)
        torch.autograd.backward(ys[:2], [torch.ones_like(y) for y in ys[:2]])  # the third goes unused

    assert {"lora_forward", "lora_backward"} <= check(calls(lora_fused, run)) <= OPS


@pytest.mark.parametrize("p", (0.0, 0.3))
@pytest.mark.parametrize("dora", (False, True))
@pytest.mark.parametrize("together", (False, True))
def test_gated(lora_fused, device, together, dora, p):
    generator = torch.Generator().manual_seed(1)
    outs = (128,) if together else (64, 64)
    operands = [operands_of(generator, 48, n, 16, dora, dora) for n in outs]
    operands.append(operands_of(generator, 64, 40, 8, dora, False))
    specs = [lora_fused.ProjectionSpec(p)] * len(operands)
    x, seeds = torch.randn(2, 5, 48, device=device, requires_grad=True), torch.tensor([5, 7, 9], device=device)

    def run():
        flat = flat_on(operands, device, torch.float32, torch.float32)
        projections = projections_of(lora_fused, flat, (0.5,) * len(specs), specs)
        lora_fused.autograd.gated_mlp_native.gated_mlp(x, projections, (0, 0), seeds[: len(specs)]).sum().backward()

    assert {"gated_forward", "gated_backward"} <= check(calls(lora_fused, run)) <= OPS


@pytest.mark.sm80_kernels
def test_norms_alone(lora_fused, device):
    weights, a = [torch.randn(n, 32, device=device) for n in (24, 40)], [torch.randn(4, 32, device=device)] * 2
    b, magnitudes = (
        [torch.randn(n, 4, device=device) for n in (24, 40)],
        [torch.rand(n, device=device) for n in (24, 40)],
    )

    def run():
        lora_fused.backends.select.dora_scales(weights, a, b, magnitudes, [0.5, 2.0])

    assert check(calls(lora_fused, run)) == {"dora_scales"}


# ---- the ops of Dynamo's graphs ----


def traced_calls(lora_fused, device):
    """One of each, with an adapter of rank 4: (name, arguments)."""
    make = dict(device=device, dtype=torch.float32)

    def projection(n, k, base=True):
        weight = torch.randn(n, k, **make) if base else None
        a, b = (torch.randn(*shape, **make, requires_grad=True) for shape in ((4, k), (n, 4)))
        return [weight, torch.randn(n, **make) if base else None, a, b, *[None] * 6]

    stored = lora_fused.compiled.ops.packed(lora_fused.ProjectionSpec())
    x = torch.randn(3, 16, **make, requires_grad=True)
    yield "linear", (x, projection(24, 16), 0.5, 0.0, stored)
    base = torch.randn(3, 24, **make, requires_grad=True)
    yield "delta", (base, x, projection(24, 16, base=False), 0.5, 0.0, stored, False)
    parts = projection(24, 16) + projection(24, 16) + projection(16, 24)
    yield "gated_mlp", (x, parts, [0.5, 1.0, 2.0], [0.0] * 3, stored * 3, "silu", 0)
    a, b = torch.randn(4, 9, **make, requires_grad=True), torch.randn(16, 4, **make, requires_grad=True)
    table = [torch.randn(9, 16, **make), a, b, None, None]
    yield "embedding", (torch.tensor([[1, 2, 8]], device=device), table, 0.5, None, 1.0)


@pytest.mark.parametrize("place,name", list(enumerate(("linear", "delta", "gated_mlp", "embedding"))))
def test_traced_ops(lora_fused, device, place, name):
    """opcheck of all but a registration of autograd, which an op that is traced through has none of: results and
    gradients by AOTAutograd, sizes dynamic and not."""
    found, arguments = list(traced_calls(lora_fused, device))[place]
    assert found == name
    op = getattr(lora_fused._ops.ops, f"traced_{name}").default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
