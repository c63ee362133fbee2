"""What `explain` says of a small Llama, held against the modules whose own forward PEFT enters."""

import torch
from peft import LoraConfig

from helpers.cases import DEVICE, LINEARS
from helpers.kernelizing import explain

TOKENS = 18


def tokens():
    return torch.randint(0, 64, (2, TOKENS // 2), generator=torch.Generator(DEVICE).manual_seed(3))


def train(model):
    model.train()
    ids = tokens()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()


def evaluate(model):
    model.eval()
    with torch.no_grad():
        model(input_ids=tokens())


def holds(lora_fused, model, own_calls, run=train, *, fused, again=True, rows=TOKENS, root=None):
    """What `explain` says of the next call and of the last one is what PEFT's forward has been entered for; `fused` is
    how many LoRA modules are. Asked of `root`, where the model that runs is another one's copy or wrapper."""
    root = model if root is None else root
    for _ in range(2 if again else 1):
        before = explain(lora_fused, root, rows)
        own_calls.clear()
        run(model)
    after = explain(lora_fused, root, rows)
    modules = dict(root.named_modules())
    entered = {id(module) for module in own_calls}
    assert len(after) == len(before) and len(after) > 0
    for row, earlier in zip(after, before):
        own = id(modules[row.module]) in entered
        if row.last != lora_fused.last_call.TRACED:  # by a graph, which tells nobody what it ran
            assert (row.last == "fused") != own, (row, own)
        assert row.fused != own, (row, own)
        assert row.fused == (row.reason is None) or row.backend == "fused delta", row
        if again:
            assert earlier.fused == row.fused, (earlier, row)
    assert sum(row.fused for row in after) == fused
    return after


def in_graphs(rows):
    return len(rows) > 0 and {(row.fused, row.backend) for row in rows} == {(True, "native, compiled")}


def disable(model):
    model.base_model.disable_adapter_layers()


def add_adapter(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=LINEARS))
    model.base_model.set_adapter(["default", "other"])
