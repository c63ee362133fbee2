"""The layers of the code: what may import what, and what an import of the package costs."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "torch-ext" / "lora_fused"

# From the top down; a module imports only what stands below it.
LAYERS = (
    "__init__",
    "explanation",
    "kernelized",
    "mapping",
    "layers",
    "siblings",
    "functional_delta",
    "functional",
    "functional_embedding",
    "checks",
    "autograd",
    "compose",
    "member",
    "base",
    "backend",
    "triton_ops",
    "reference",
    "cuda_embedding",
    "reference_embedding",
    "mlp_state",
    "mlp_structure",
    "activation",
    "ops",
    "peft_embedding",
    "peft_small",
    "peft_state",
    "peft_base",
    "peft_scaling",
    "last_call",
    "genuine",
    "autocast",
    "projection",
    "table",
    "tuned",
    "versions",
    "integrity",
    "errors",
    "_ops",
)
LAZY = {"peft", "kernels", "transformers", "bitsandbytes", "triton"}
FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """(node, absolute top-level names, relative targets) of every import statement."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield node, [alias.name.split(".")[0] for alias in node.names], []
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node, [node.module.split(".")[0]], []
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            yield node, [], [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]


def test_every_file_has_a_layer():
    assert len(FILES) > 8 and {layer_of(path) for path in FILES} | {"_ops"} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = LAYERS.index(layer_of(path))
    for _, _, targets in imports(path):
        for target in targets:
            assert LAYERS.index(target) > own, f"{path.name} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_torch_at_import_time(path):
    tree = ast.parse(path.read_text())
    for node in tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module.split(".")[0]]
        for name in names:
            triton_file = name == "triton" and layer_of(path) == "triton_ops"
            assert name == "torch" or name in sys.stdlib_module_names or triton_file, f"{path.name}: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_loading_imports_neither_triton_nor_peft():
    code = (
        "import sys, torch\n"
        "from kernels import get_local_kernel\n"
        "import pathlib\n"
        "loaded = set(sys.modules)\n"
        f"module = get_local_kernel(pathlib.Path({str(ROOT / 'build')!r}))\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - loaded}\n"
        f"print(sorted(new & {LAZY!r}), module.__name__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("[] "), result.stdout
