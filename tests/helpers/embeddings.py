"""AdaptedLinear embeddings for the tests: cases, models, and PEFT's result beside ours."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers.cases import OwnForwards, assert_as_good, randomise_adapters
from helpers.kernelizing import kernelize_in_place


@dataclass(frozen=True)
class Case:
    """ids of a shape into a table [v, h] with rank r."""

    lead: tuple[int, ...]
    v: int
    h: int
    r: int
    padding: int | None = None
    scaling: float = 0.7

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.lead)) or 'scalar'}-v{self.v}-h{self.h}-r{self.r}-pad{self.padding}"


# Odd sizes, no token, a single id, every leading shape, ranks below, at and above a dot's tile, more
# tokens than rows (all repeated) and fewer.
CASES = (
    Case((), 11, 16, 2),
    Case((0,), 20, 32, 4),
    Case((7,), 33, 17, 5, padding=0),
    Case((2, 65), 40, 130, 16, padding=39),
    Case((3, 2, 11), 301, 72, 33),
    Case((40,), 129, 257, 100, padding=3),
)
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
)
VARIANTS = (False, True)


class Model(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, ids):
        return self.table(ids)


def adapt(table, case, base, adapter, device="cpu", dora=False):
    config = LoraConfig(r=case.r, lora_alpha=case.scaling * case.r, target_modules=["table"], use_dora=dora)
    model = get_peft_model(Model(table.to(device, base)), config, autocast_adapter_dtype=False)
    randomise_adapters(model, adapter)
    return model


def peft_embedding(case, base=torch.float32, adapter=torch.float32, device="cpu", dora=False, **options):
    table = nn.Embedding(case.v, case.h, padding_idx=case.padding, **options)
    table.weight.data.normal_()  # the padding row too: an adapted table need not hold zeros there
    return adapt(table, case, base, adapter, device, dora)


def draw_ids(case, device="cpu", dtype=torch.int64):
    ids = torch.randint(0, case.v, case.lead, device=device, dtype=dtype)
    if case.padding is not None and ids.numel() > 2:
        ids.view(-1)[::3] = case.padding
    return ids


def fused(lora_fused, model, device="cpu"):
    model = kernelize_in_place(lora_fused, model, device)
    rows = lora_fused.explain(model)
    assert len(rows) > 0 and all(row.fused for row in rows), str(rows)
    return model


def run(model, ids, dy, autocast=None):
    """Output and every gradient of one forward and backward, by name."""
    scope = torch.autocast(ids.device.type, dtype=autocast) if autocast else contextlib.nullcontext()
    with scope:
        y = model(ids)
    y.backward(dy.to(y.dtype))
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values())
    return {"y": y, **grads}


def assert_parity(lora_fused, model, ids, dy, device="cpu", autocast=None, terms=0):
    unit = autocast or next(p.dtype for p in model.parameters())
    truth = run(copy.deepcopy(model).double(), ids, dy.double())
    theirs = run(copy.deepcopy(model), ids, dy, autocast)
    model = fused(lora_fused, model, device)
    with OwnForwards() as calls:
        ours = run(model, ids, dy, autocast)
    assert not calls
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert_as_good(name, value, theirs[name], truth[name], unit, terms=terms)
    return ours
