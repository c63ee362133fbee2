"""docs/api.md, from the docstrings of what `__all__` promises. Reads the sources: nothing has to be built."""

from __future__ import annotations

import ast
import inspect
import pathlib
import re
import textwrap

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "torch-ext" / "lora_fused"
GROUPS = (
    (
        "A model",
        (
            "apply",
            "restore",
            "LoraFusedCallback",
            "register_peft_layers",
            "unregister_peft_layers",
            "use_peft_layers",
            "compile_options",
        ),
    ),
    ("What runs", ("explain", "Explanation", "Row", "record", "Calls")),
    ("Layers for `kernelize`", ("layers",)),
    (
        "Functions on tensors",
        (
            "lora_linear",
            "lora_linear_group",
            "lora_embedding",
            "lora_experts",
            "row_norm",
            "ExpertWeights",
            "Gate",
            "Projection",
            "Operands",
            "ProjectionSpec",
        ),
    ),
)
Definition = ast.FunctionDef | ast.ClassDef


def public_names() -> list[str]:
    """`__all__` of the package."""
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError("no __all__")


def _module_path(folder: pathlib.Path, node: ast.ImportFrom) -> pathlib.Path:
    for _ in range(node.level - 1):
        folder = folder.parent
    path = folder.joinpath(*(node.module or "").split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def definition(name: str, path: pathlib.Path = PACKAGE / "__init__.py") -> Definition:
    """Where a name that a file imports or defines is defined."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, Definition) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.level and any((a.asname or a.name) == name for a in node.names):
            return definition(name, _module_path(path.parent, node))
    raise ValueError(f"{name} is not defined in {path}")


def _signature(name: str, node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        made = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if made is None or ast.get_docstring(node) is None or _is_record(node):
            return f"class {name}"
        return f"class {name}({_arguments(made)})"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{name}({_arguments(node)}){returns}"


def _arguments(node: ast.FunctionDef) -> str:
    return ast.unparse(node.args).removeprefix("self, ").removeprefix("self")


def _is_record(node: Definition) -> bool:
    if not isinstance(node, ast.ClassDef):
        return False
    return any("dataclass" in ast.unparse(each) for each in node.decorator_list) or "NamedTuple" in map(
        ast.unparse, node.bases
    )


def _as_markdown(docstring: str, fields: set[str] = frozenset()) -> str:
    """Sections such as Args, and descriptions of fields, become lists."""
    lines, section = [], False
    for line in inspect.cleandoc(docstring).splitlines():
        entry = re.fullmatch(r" {4}(\S[^:]*): (.*)", line) if section else None
        if re.fullmatch(r"(Args|Returns|Raises):", line):
            section, line = True, f"**{line.removesuffix(':')}**\n"
        elif entry:
            line = f"- `{entry[1]}`: {entry[2]}"
        elif line.partition(": ")[0] in fields:
            section, line = True, f"- `{line.partition(': ')[0]}`: {line.partition(': ')[2]}"
        elif line and not line.startswith(" "):
            section = False
        elif section and line:
            line = f"  {line.strip()}"
        lines.append(line)
    return "\n".join(lines)


def _described(name: str, node: Definition, level: int) -> list[str]:
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)] if _is_record(node) else []
    text = _as_markdown(ast.get_docstring(node) or "", {field.target.id for field in fields})
    shown = textwrap.wrap(_signature(name, node), 120, subsequent_indent="    ", break_on_hyphens=False)
    lines = [f"{'#' * level} `{name}`", "", "```python", *shown, "```", "", text, ""]
    if isinstance(node, ast.ClassDef):
        if fields:
            shown = "Fields: " + ", ".join(f"`{ast.unparse(field)}`" for field in fields) + "."
            lines += [*textwrap.wrap(shown, 120, break_long_words=False, break_on_hyphens=False), ""]
        for method in node.body:
            if (
                isinstance(method, ast.FunctionDef)
                and not method.name.startswith(("_", "on_"))
                and ast.get_docstring(method)
            ):
                is_property = any(ast.unparse(each) == "property" for each in method.decorator_list)
                shown = method.name if is_property else _signature(method.name, method)
                lines += _item(shown, ast.get_docstring(method))
        lines += [""] if lines[-1] else []
    return lines


def _item(name: str, docstring: str) -> list[str]:
    text = f"- `{name}`: {' '.join(docstring.split())}"
    return textwrap.wrap(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _layers() -> list[str]:
    tree = ast.parse((PACKAGE / "layers.py").read_text())
    lines = ["### `layers`", "", inspect.cleandoc(ast.get_docstring(tree)), ""]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Lora"):
            lines += _item(f"layers.{node.name}", ast.get_docstring(node))
    return [*lines, ""]


def page() -> str:
    """The page below its title."""
    lines = []
    for title, names in GROUPS:
        lines += [f"## {title}", ""]
        for name in names:
            if name == "layers":
                lines += _layers()
            else:
                path = PACKAGE / "explanation" / "recorder.py" if name == "Calls" else PACKAGE / "__init__.py"
                lines += _described(name, definition(name, path), 3)
    return "\n".join(lines).strip()
