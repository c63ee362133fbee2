"""Every test gets the package as a user does: the built variant, loaded through `kernels`."""

import importlib.util
import os
import pathlib
import sys

# Read by Triton when it is first imported: without a GPU its kernels run in the interpreter.
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config, items):
    """A parametrisation without a case is no test. What is about this machine's own architecture is skipped where the
    suite runs as on another."""
    architecture = config.getoption("architecture")
    elsewhere = {"": (), "sm75": ("own_architecture", "sm80_kernels")}.get(architecture, ("own_architecture",))
    for item in items:
        if any(item.get_closest_marker(marker) for marker in elsewhere):
            item.add_marker(pytest.mark.skip(reason="the suite runs as on another GPU"))
    empty = [
        item.nodeid for item in items for mark in item.iter_markers("skip") if "empty parameter set" in str(mark.kwargs)
    ]
    if empty:
        raise pytest.UsageError(f"no case to run: {', '.join(empty)}")


def pytest_ignore_collect(collection_path, config):
    """Where `kernels_ci` is asked for, files without it are not imported: what they need is not there."""
    chosen = config.option.markexpr == "kernels_ci" and collection_path.suffix == ".py"
    return True if chosen and "pytest.mark.kernels_ci" not in collection_path.read_text() else None


def variant_on_path():
    """The built variant that PYTHONPATH names, as kernel-builder's `ci-test` has it, without `kernels`."""
    (variant,) = [path for path in map(pathlib.Path, sys.path) if (path / "metadata.json").is_file()]
    spec = importlib.util.spec_from_file_location("lora_fused_on_path", variant / "__init__.py")
    package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


def pytest_addoption(parser):
    parser.addoption(
        "--architecture",
        default="",
        help="run another GPU architecture's kernels: sm80, those of every GPU but Hopper; sm75, the library's alone",
    )


@pytest.fixture(scope="session")
def lora_fused(pytestconfig):
    try:
        from kernels import get_local_kernel
    except ImportError:
        package = variant_on_path()
    else:
        package = get_local_kernel(ROOT / "build")
    # Tests are of our forward, however small; `test_fallbacks.py` has those of when PEFT's is preferred.
    package.peft.small_batch.SMALL_ROWS = package.peft.small_batch.FEW_TRACED_ROWS = -1
    architecture = pytestconfig.getoption("architecture")
    package.backends.native.set_architecture(architecture)
    if architecture == "sm75":  # the GPU that stands in has bfloat16's products, whose tests run with them
        package.backends.select.old_gpu_reason = lambda x, *dtypes: None
    return package


@pytest.fixture(scope="session")
def mlp_tracer(lora_fused):
    """The module that recognises gated MLPs, which nothing imports before there is one."""
    return importlib.import_module(f"{lora_fused.__name__}.peft.mlp_tracer")


@pytest.fixture(scope="session")
def activation_formulas(lora_fused):
    """The reference of what a gated MLP computes between its projections."""
    return importlib.import_module(f"{lora_fused.__name__}.backends.reference.activations")


@pytest.fixture
def ops(lora_fused):
    """The native ops, by their schemas' names."""
    return lora_fused._ops.ops


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
        torch.empty(0)  # torch lists its factories at its first call: now, before `poisoned` replaces some
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_tf32():
    """Trainers that compile allow TF32 for the whole process: it ends with the test."""
    yield
    products = torch.backends.cuda.matmul
    if (torch.backends.fp32_precision, products.fp32_precision) != ("none", "none"):
        products.allow_tf32 = False  # first: torch refuses to read it beside the new settings
        torch.backends.fp32_precision = products.fp32_precision = "none"


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty, empty_like and new_empty give NaN, so an element that a kernel leaves out shows."""

    def poison(make):
        def nan(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return nan

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def poisoned_memory():
    """What the ops allocate is NaN on the CPU; `poison` does it on a GPU."""
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernelize_adapted(lora_fused):
    return importlib.import_module(f"{lora_fused.__name__}.binding").kernelize_adapted


@pytest.fixture(params=("NativeGroupFunction", "LoraLinearFunction"), ids=("native", "eager"))
def group_function(lora_fused, request, monkeypatch):
    """The Function that groups run as: native ops, or the chain of operations."""
    if request.param == "LoraLinearFunction":
        monkeypatch.setattr(
            lora_fused.functional.dispatch, "native_path", lambda *_: lora_fused.specs.NativePath(False)
        )
    return request.param


@pytest.fixture
def own_calls(monkeypatch):
    """The modules whose own forward PEFT has entered."""
    from peft.tuners.lora.layer import LoraLayer

    entered, check = [], LoraLayer._check_forward_args

    def counted(self, *args, **kwargs):
        entered.append(self)
        return check(self, *args, **kwargs)

    monkeypatch.setattr(LoraLayer, "_check_forward_args", counted)
    return entered
