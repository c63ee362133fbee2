"""What the comparisons' command lines have in common, and what their results files say besides figures."""

from __future__ import annotations

import argparse
import json
import pathlib

import peft
import torch
import transformers
import triton

ROOT = pathlib.Path(__file__).resolve().parent.parent


def parser_of(doc: str, out: str) -> argparse.ArgumentParser:
    """A parser whose help is the module's `doc`, with the build to load and the file for the results."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=pathlib.Path, default=ROOT / "build", help="build folder to load")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(out))
    return parser


def parsed_on_a_gpu(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, or the end of the process where there is no GPU."""
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is required")
    return arguments


def environment(device: str = "cuda") -> dict:
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
    }


def written(environment: dict, results: list[dict]) -> str:
    """JSON with a line for each case."""
    rows = ",\n".join(json.dumps(result) for result in results)
    return f'{{"environment": {json.dumps(environment)}, "results": [\n{rows}\n]}}\n'


def first_line(error: Exception) -> str:
    """What a row says of an error."""
    kind = "not installed" if isinstance(error, ModuleNotFoundError) else type(error).__name__
    return f"{kind}: {str(error).strip().partition(chr(10))[0]}"
