"""The table of model families in docs/support.md: what is measured of each, and held against PEFT."""

from __future__ import annotations

import contextlib
import copy
import json
import pathlib
import warnings
from unittest import mock

import torch
import transformers
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers.cases import randomise_adapters
from helpers.families import Family
from helpers.kernelizing import explain

TABLE = pathlib.Path(__file__).resolve().parent / "families.json"
TOLERANCE = 1e-10  # of the largest element


def build(family: Family) -> nn.Module:
    """A model of random weights in float64."""
    torch.manual_seed(0)
    parts = family.parts() if family.parts else {}
    config = getattr(transformers, family.config)(**family.sizes, **parts)
    config._experts_implementation = "eager"  # torch's grouped product knows no float64
    model = getattr(transformers, family.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model.from_config(config) if hasattr(model, "from_config") else model(config)
    return made.double()


def adapted(family: Family, **config) -> nn.Module:
    """PEFT's model, B drawn at random and magnitudes away from the norm, in training mode."""
    options = LoraConfig(r=3, lora_alpha=5, target_modules=family.targets, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(build(family), options, autocast_adapter_dtype=False)
    randomise_adapters(model, torch.float64)
    return model.train()


def loss_of(output) -> torch.Tensor:
    """The model's loss, or a sum in which every element of its first result has a weight of its own."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    first = output[0].double()
    return (first * torch.linspace(0.5, 1.5, first.numel(), dtype=first.dtype).view(first.shape)).mean()


@contextlib.contextmanager
def counted(lora_fused):
    """What the layers compute meanwhile: "projections", embeddings among them, and "gated" MLPs."""
    counts = dict(projections=0, gated=0)

    def counting(own, weigh):
        def call(*args, **kwargs):
            for kind, number in weigh(*args).items():
                counts[kind] += number
            return own(*args, **kwargs)

        return call

    layers, one = lora_fused.layers, lambda *_: dict(projections=1)
    calls = (
        (layers.dispatch, "compute_group", lambda x, projections, *_: dict(projections=len(projections))),
        (layers.dispatch, "compute_gated", lambda x, inputs, *_: dict(projections=len(inputs) + 1, gated=1)),
        (layers.functional_delta, "add_delta", one),
        (layers.functional_embedding, "compute_embedding", one),
        (
            layers.functional_experts,
            "compute_experts",
            lambda *args: dict(projections=sum(factors is not None for factors in args[-1])),  # as they are stored
        ),
    )
    with contextlib.ExitStack() as stack:
        for module, name, weigh in calls:
            stack.enter_context(mock.patch.object(module, name, counting(getattr(module, name), weigh)))
        yield counts


def compare(results, what: str) -> None:
    """Losses and gradients of the kernelized model and of PEFT's; a parameter without a gradient has none in both."""
    for name, theirs in results[1].items():
        ours = results[0][name]
        assert (ours is None) == (theirs is None), f"{what}: {name} has {'no ' if ours is None else 'a '}gradient"
        if theirs is not None:
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, f"{what}: {name}"
            error = (ours - theirs).abs().max().item()
            assert error <= TOLERANCE * theirs.abs().max().item() + 1e-18, f"{what}: {name} is {error} off"


def measure(lora_fused, family: Family, **config) -> dict:
    """The family's row of the table, after everything was held against PEFT: three passes of training, so that groups
    have formed, one of evaluation, generation."""
    theirs = adapted(family, **config)
    with lora_fused.use_peft_layers():
        ours = kernelize(copy.deepcopy(theirs), mode=Mode.TRAINING, device="cpu")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    inputs = family.inputs()
    for step in range(3):
        results = []
        with counted(lora_fused) as counts:
            for model in (ours, theirs):
                model.zero_grad()
                torch.manual_seed(step)  # of the model's own dropouts
                loss = loss_of(model(**inputs))
                loss.backward()
                grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
                results.append({"the loss": loss.detach(), **grads})
        compare(results, f"pass {step}")
        assert any(grad is not None and grad.abs().max() > 0 for name, grad in results[1].items() if "lora_B" in name)
    rows = explain(lora_fused, ours)
    assert {row.last for row in rows if row.fused} <= {"fused", None}, str(rows)  # None: never called
    ours.eval(), theirs.eval()
    with counted(lora_fused) as evaluated, torch.no_grad():
        compare([{"the loss": loss_of(model(**inputs))} for model in (ours, theirs)], "evaluation")
    if family.generates:
        prompt = {name: value for name, value in inputs.items() if name != "labels" and not name.startswith("decoder_")}
        sequences = [model.generate(**prompt, max_new_tokens=3, do_sample=False) for model in (ours, theirs)]
        assert torch.equal(*sequences) and sequences[0].shape[1] > 1
    return dict(
        modules=len(rows),
        fused=sum(row.fused for row in rows),
        computed=counts["projections"],
        gated=counts["gated"],
        gated_in_evaluation=evaluated["gated"],
        groups=sorted({row.group for row in rows if row.fused and "+" in row.group}),
        reasons=sorted({row.reason for row in rows if row.reason}),
        mlps=sorted({row.mlp for row in rows if row.mlp}),
    )


def without_version(row: dict) -> dict:
    """What every version of transformers has in common: one may fuse projections in its model that another calls
    apart."""
    return dict(
        unfused=row["modules"] - row["fused"], **{key: row[key] for key in ("gated", "gated_in_evaluation", "reasons")}
    )


def read_table() -> tuple[str, dict]:
    """(the version of transformers that it was measured with, rows by family)."""
    table = json.loads(TABLE.read_text())
    return table["transformers"], table["families"]


def write_table(rows: dict) -> None:
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    version = json.dumps(transformers.__version__)
    TABLE.write_text(f'{{\n  "transformers": {version},\n  "families": {{\n{lines}\n  }}\n}}\n')


def section(rows: dict) -> str:
    """The table as docs/support.md has it: families of which the same is to be said share a line."""
    lines = {}
    for name, row in rows.items():
        share = "all" if row["fused"] == row["modules"] else f"{row['fused']} of {row['modules']}"
        gated = str(row["gated"] or "-")
        if row["gated_in_evaluation"] != row["gated"]:
            gated = f"{row['gated_in_evaluation']} in evaluation alone"
        notes = [*row["reasons"], *(f"MLPs: {reason}" for reason in row["mlps"])]
        key = share, gated, "; ".join(row["groups"]) or "-", "; ".join(notes) or "-"
        lines.setdefault(key, []).append(name)
    head = ("Family", "LoRA modules fused", "Gated MLPs, one Function each", "Groups", "What is not, and why")
    body = [(", ".join(names), *key) for key, names in lines.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *body))
