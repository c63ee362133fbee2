"""The rooms of the code: what may import what, and what an import of the package costs."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "torch-ext" / "lora_fused"

# Rooms, modules and folders of the package, from the top down. A room imports rooms of lower layers alone, and inside a folder
# files import each other without a circle. docs/design.md draws this.
LAYERS = (
    ("__init__",),
    ("explanation", "binding"),
    ("mapping",),
    ("layers",),
    ("shared_input",),
    ("functional",),
    ("autograd",),
    ("quantization", "peft"),
    ("backends",),
    ("specs", "last_call"),
    ("call_context", "environment", "_ops"),
)
LAYER_OF = {room: number for number, layer in enumerate(LAYERS) for room in layer}
MOST_ROOMS = 16
LAZY = {"peft", "kernels", "transformers", "bitsandbytes", "triton"}
FILES = sorted(PACKAGE.rglob("*.py"))
by_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path):
    """Its parts below the package; a folder's `__init__` is the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def imports(path):
    """Modules of this package that a file imports anywhere, each as its parts."""
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple((node.module or "").split(".") if node.module else ())
            for alias in node.names:
                full = (*base, alias.name)
                is_module = (PACKAGE.joinpath(*full).with_suffix(".py")).exists() or PACKAGE.joinpath(*full).is_dir()
                yield full if is_module or not base else base


def test_every_file_has_a_layer():
    rooms = {room_of(path) for path in FILES}
    assert rooms | {"_ops"} == set(LAYER_OF) and len(rooms) <= MOST_ROOMS


@by_file
def test_imports_point_downwards(path):
    own = room_of(path)
    for target in imports(path):
        assert target[0] == own or LAYER_OF[target[0]] > LAYER_OF[own], f"{path.name} imports {'.'.join(target)}"


def test_files_import_each_other_without_a_circle():
    known = {module_of(path): path for path in FILES}
    graph = {module: {target for target in imports(path) if target in known} for module, path in known.items()}
    assert sum(map(len, graph.values())) > len(FILES)
    while graph:
        leaves = {module for module, targets in graph.items() if not targets - {module}}
        assert leaves, f"a circle among {sorted('.'.join(module) for module in graph)}"
        graph = {module: targets - leaves for module, targets in graph.items() if module not in leaves}


@by_file
def test_only_torch_at_import_time(path):
    tree = ast.parse(path.read_text())
    for node in tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module.split(".")[0]]
        for name in names:
            triton_file = name == "triton" and path.parent == PACKAGE / "backends" / "triton"
            assert name == "torch" or name in sys.stdlib_module_names or triton_file, f"{path.name}: {name}"


@by_file
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
