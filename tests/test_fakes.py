"""The shape functions of the native ops, which torch.compile and torch.export trace through, against the ops
themselves."""

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
    """The fake's results are as those of the op, in number, shape, strides, dtype and device."""
    for func, args, kwargs in recorded:
        detached = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach(), (args, kwargs))
        torch.library.opcheck(func, *detached, test_utils="test_faketensor")
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


def test_norms_alone(lora_fused, device):
    weights, a = [torch.randn(n, 32, device=device) for n in (24, 40)], [torch.randn(4, 32, device=device)] * 2
    b, magnitudes = (
        [torch.randn(n, 4, device=device) for n in (24, 40)],
        [torch.rand(n, device=device) for n in (24, 40)],
    )

    def run():
        lora_fused.backends.select.dora_scales(weights, a, b, magnitudes, [0.5, 2.0])

    assert check(calls(lora_fused, run)) == {"dora_scales"}
