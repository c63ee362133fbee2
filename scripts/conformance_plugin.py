"""pytest plugin for PEFT's own tests: every model that PEFT adapts is kernelized, every call counted.

Loaded with `-p conformance_plugin`. With CONFORMANCE_BUILD (a build folder) in the environment the
layers of that build take PEFT's forwards; without it PEFT runs alone. Results and counts of a process
go to a JSON file of its own in CONFORMANCE_OUT. Nothing may leave the machine in either case: a test
that needs the Hub fails at once, and is told by that.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import pathlib
import socket
import threading

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
BUILD, OUT = os.environ.get("CONFORMANCE_BUILD"), pathlib.Path(os.environ["CONFORMANCE_OUT"])
NEEDS_HUB = ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "offline mode", "not a local folder", "no network here")

outcomes: dict[str, dict] = {}
calls: collections.Counter = collections.Counter()
_inside = threading.local()


def _refuse(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        raise OSError("no network here")
    return _connect(self, address)


_connect, socket.socket.connect = socket.socket.connect, _refuse


def count_calls(layer: type, peft_classes: tuple[type, ...]) -> None:
    """Counts each call of a layer as fused, or as PEFT's own where it called what it replaces."""
    ours = layer.forward

    @functools.wraps(ours)
    def forward(self, *args, **kwargs):
        before, _inside.fell_back = getattr(_inside, "fell_back", False), False
        try:
            return ours(self, *args, **kwargs)
        finally:
            calls[f"{layer.__name__}: {'own forward' if _inside.fell_back else 'fused'}"] += 1
            _inside.fell_back = before

    layer.forward = forward
    for cls in peft_classes:
        count_originals(cls)


def count_originals(cls: type) -> None:
    original = cls.forward

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        _inside.fell_back = True
        return original(self, *args, **kwargs)

    cls.forward = forward


def kernelize_what_peft_adapts() -> None:
    import kernels
    from peft.tuners.lora import Embedding, Linear
    from peft.tuners.tuners_utils import BaseTuner

    lora_fused = kernels.get_local_kernel(pathlib.Path(BUILD))
    originals = {"LoraLinear": (Linear,), "LoraEmbedding": (Embedding,)}
    for name in ("LoraLinear", "LoraEmbedding"):
        if hasattr(lora_fused.layers, name):
            count_calls(getattr(lora_fused.layers, name), originals[name])
    lora_fused.register_peft_layers()
    inject = BaseTuner.inject_adapter

    def inject_adapter(self, model, *args, **kwargs):
        result = inject(self, model, *args, **kwargs)
        parameter = next(model.parameters(), None)
        if parameter is not None and parameter.device.type in ("cpu", "cuda"):
            kernels.kernelize(self, mode=kernels.Mode.TRAINING, device=parameter.device.type)
        return result

    BaseTuner.inject_adapter = inject_adapter


if BUILD:
    kernelize_what_peft_adapts()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
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
