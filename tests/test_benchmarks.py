"""README's figures are those of the results file."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))

import tables


def test_readme_agrees_with_the_results():
    readme = tables.README.read_text()
    assert tables.with_table(readme) == readme
    assert "| Llama-8B shape, 32 layers, 1×2048 | LoRA | fp32, autocast |" in readme
