"""pytest plugin for PEFT's own tests: every model that PEFT adapts is kernelized, every call counted.

Loaded with `-p conformance_plugin`. With CONFORMANCE_BUILD (a build folder) in the environment the
layers of that build take PEFT's forwards; without it PEFT runs alone. Results and counts of a process
go to a JSON file of its own in CONFORMANCE_OUT, beside the numbers of tests chosen and done; what runs
of each module, and which part of all, is in CONFORMANCE_CHOICE. Nothing may leave the machine: models
come from the cache that scripts/conformance_hub.py filled, and a test that needs more of the Hub fails
at once, and is told by that.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import pathlib
import socket
import sys

import conformance_hub
import datasets
import pytest
import torch

BUILD, OUT = os.environ.get("CONFORMANCE_BUILD"), pathlib.Path(os.environ["CONFORMANCE_OUT"])
CHOICE = json.loads(os.environ.get("CONFORMANCE_CHOICE", "{}"))
# Methods of PEFT that are not LoRA, in whose names the word is.
OTHER_METHODS = ("adalora", "vblora", "randlora", "delora", "gralora", "tinylora", "unilora")
NEEDS_HUB = (
    "OfflineModeIsEnabled",
    "LocalEntryNotFoundError",
    "offline mode",
    "not a local folder",
    "no network here",
    "adapter model file not found in peft-internal-testing/",
)

outcomes: dict[str, dict] = {}
calls: collections.Counter = collections.Counter()


def _refuse(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        raise OSError("no network here")
    return _connect(self, address)


_connect, socket.socket.connect = socket.socket.connect, _refuse
datasets.load_dataset = conformance_hub.load_dataset


def count_calls(layer: type, name: str, last_call) -> None:
    """Counts each call of a layer as fused or as the module's own forward, as `last_call` of the kernel has it. Not
    what torch.compile traces, where a count would be a graph break: `count_ops` does."""
    ours = layer.forward

    @functools.wraps(ours)
    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return ours(self, *args, **kwargs)
        try:
            return ours(self, *args, **kwargs)
        finally:
            calls[f"{name}: {'fused' if last_call.of(self) is None else 'own forward'}"] += 1

    layer.forward = forward


def count_ops(ops) -> None:
    """Counts the ops that torch.compile traces for linears and gated MLPs, once a graph."""
    read = ops._projections

    def projections(*args):
        calls["traced"] += 1
        return read(*args)

    ops._projections = projections


def kernelize_what_peft_adapts() -> None:
    import kernels
    from peft.tuners.tuners_utils import BaseTuner

    lora_fused = kernels.get_local_kernel(pathlib.Path(BUILD))
    layers, last_call = lora_fused.layers, lora_fused.last_call
    count_calls(layers.LoraLinear, "LoraLinear", last_call)
    count_calls(layers.LoraEmbedding, "LoraEmbedding", last_call)
    count_calls(layers.LoraExperts, "LoraExperts", last_call)
    for layer in layers.GATED_MLP_BY_INPUT.values():
        count_calls(layer, "LoraGatedMLP", last_call)
    count_ops(lora_fused.compiled.ops)
    lora_fused.register_peft_layers()
    inject, default = BaseTuner.inject_adapter, "cuda" if torch.cuda.is_available() else "cpu"

    def inject_adapter(self, model, *args, **kwargs):
        result = inject(self, model, *args, **kwargs)
        parameter = next(model.parameters(), None)
        device = default if parameter is None or parameter.is_meta else parameter.device.type
        kernels.kernelize(self, mode=kernels.Mode.TRAINING, device=device)
        return result

    BaseTuner.inject_adapter = inject_adapter


if BUILD:
    kernelize_what_peft_adapts()


def is_chosen(nodeid: str) -> bool:
    """Whether a test is one that CONFORMANCE_CHOICE asks for."""
    path, _, name = nodeid.partition("::")
    if not CHOICE:
        return True
    if any(word in name for word in CHOICE["without"]):
        return False
    module = path.rpartition("/")[2]
    if not any(word in name for word in CHOICE["words"].get(module, ("",))):
        return False
    if CHOICE["classes"] and not name.startswith(tuple(f"{each}::" for each in CHOICE["classes"])):
        return False
    if CHOICE["modules"][module] == "all":
        return True
    name = name.lower()
    for method in OTHER_METHODS:
        name = name.replace(method, "")
    return "lora" in name or "dora" in name


class _EverythingWasSeen(dict):
    """PEFT's tests go online for a model that they ask for the first time: there is none."""

    def __contains__(self, key):
        return True

    def __missing__(self, key):
        return 0


def pytest_collection_modifyitems(config, items):
    first, every = CHOICE.get("part", (1, 1))
    chosen = [item for item in items if is_chosen(item.nodeid)][first - 1 :: every]
    kept = set(map(id, chosen))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = chosen
    (OUT / "chosen").write_text(str(len(chosen)))
    utils = sys.modules.get("tests.testing_utils")
    if utils is not None:
        utils._HUB_MODEL_ACCESSES = _EverythingWasSeen()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "teardown":
        with open(OUT / "done", "ab") as done:  # a byte a test, whoever runs it
            done.write(b".")
    if report.when != "call" and report.outcome == "passed":
        return
    text = "" if report.outcome == "passed" else str(report.longrepr)
    outcome = report.outcome if not hasattr(report, "wasxfail") else "xfail"
    if outcome == "failed" and any(sign in text for sign in NEEDS_HUB):
        outcome = "needs the Hub"
    known = outcomes.get(item.nodeid)
    if known is None or known["outcome"] == "passed":
        lines = [line for line in text.splitlines() if line.startswith("E  ")]
        outcomes[item.nodeid] = {"outcome": outcome, "error": lines[0][1:].strip() if lines else ""}


def pytest_sessionfinish(session):
    if outcomes:
        path = OUT / f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-{os.getpid()}.json"
        path.write_text(json.dumps({"outcomes": outcomes, "calls": calls}))
