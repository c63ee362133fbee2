"""The layers of the code (scripts/layers.py): what may import what, and what an import of the package costs."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import layers
from layers import LAYER_OF, PACKAGE, imports, module_of, room_of

MOST_ROOMS = 16
LAZY = {"peft", "kernels", "transformers", "bitsandbytes", "triton"}
FILES = layers.files()
by_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


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


def test_the_picture_in_the_docs_is_that_of_the_code():
    """`python scripts/layers.py --write` draws it anew."""
    assert layers.BEGIN + layers.picture() + layers.END in layers.DESIGN.read_text()


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


@pytest.mark.parametrize("folder", ("benchmarks", "scripts"))
def test_tools_stay_short(folder):
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / folder).glob("*.py")}
    assert len(lengths) > 10
    assert not {name: length for name, length in lengths.items() if length > 400}


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


def test_no_test_module_imports_another():
    """What several need is in tests/helpers."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert len(files) > 80
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("test_")], f"{path.name} imports {names}"
