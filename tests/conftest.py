"""Every test gets the package as a user does: the built variant, loaded through `kernels`."""

import os
import pathlib

# Read by Triton when it is first imported: without a GPU its kernels run in the interpreter.
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    """A parametrisation without a case is no test."""
    empty = [
        item.nodeid for item in items for mark in item.iter_markers("skip") if "empty parameter set" in str(mark.kwargs)
    ]
    if empty:
        raise pytest.UsageError(f"no case to run: {', '.join(empty)}")


@pytest.fixture(scope="session")
def lora_fused():
    from kernels import get_local_kernel

    package = get_local_kernel(ROOT / "build")
    # Tests are of our forward, however small; `test_fallbacks.py` has those of when PEFT's is preferred.
    package.peft.small_batch.SMALL_ROWS = -1
    return package


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def on_device(device):
    """Tensors and modules that a test makes are on this machine's device, and so is its model."""
    if device == "cpu":
        yield
        return
    with torch.device(device):
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty gives NaN, so an element that a kernel leaves out shows."""
    empty = torch.empty

    def nan(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan)
