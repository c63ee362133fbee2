"""Active modes that see operations get PEFT's, those that see nothing of a layer leave it fused."""

import copy
import functools

import pytest
import torch
from helpers.cases import DEVICE
from helpers.kernelizing import explain, kernelize_in_place
from helpers.replaceable import (
    MLP,
    EmbeddingOperands,
    adapted,
    assert_close,
    linear,
    values,
)
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.usefixtures("on_device")


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is F.linear else result


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", (Doubling, Counting, lambda: FlopCounterMode(display=False)), ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    "base", (linear, lambda: adapted(EmbeddingOperands()), lambda: adapted(MLP())), ids=("linear", "table", "mlp")
)
def test_an_active_mode_sees_peft_s_operations(lora_fused, base, mode):
    theirs = base()
    ours = kernelize_in_place(lora_fused, copy.deepcopy(theirs))
    values(ours, False)
    results, seen = [], []
    for model in (ours, theirs):
        with mode() as active:
            results.append(values(model, False))
        seen.append(active.get_total_flops() if isinstance(active, FlopCounterMode) else getattr(active, "seen", None))
    assert_close(*results)
    assert seen[0] == seen[1]
    with mode():
        rows = explain(lora_fused, ours)
    assert all(not row.fused and "sees every operation" in row.reason for row in rows)
    values(ours, False)
    assert all(row.fused and row.last == "fused" for row in explain(lora_fused, ours))


def test_a_default_device_and_selective_checkpoints_keep_the_model_fused(lora_fused):
    theirs = adapted(MLP())
    ours = kernelize_in_place(lora_fused, copy.deepcopy(theirs))
    with torch.device(DEVICE):
        assert_close(values(ours, False), values(theirs, False))
        assert all(row.fused and row.last == "fused" for row in explain(lora_fused, ours))
    from torch.utils import checkpoint

    save = functools.partial(checkpoint.create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    checkpoint.checkpoint(ours, x, use_reentrant=False, context_fn=save).sum().backward()
    assert all(row.last == "fused" for row in explain(lora_fused, ours))
