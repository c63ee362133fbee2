"""Writes the table of model families in docs/support.md from tests/helpers/families.json; with --measure that file
first, from the models themselves, each held against PEFT."""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from helpers import family_table
from helpers.families import FAMILIES


def measured() -> dict:
    from kernels import get_local_kernel

    lora_fused, (_, before), table = get_local_kernel(ROOT / "build"), family_table.read_table(), {}
    for name, family in FAMILIES.items():
        if family.is_here():
            table[name] = family_table.measure(lora_fused, family)
            print(f"{name}: {table[name]}", flush=True)
        else:
            table[name] = before[name]
            print(f"{name}: not in this transformers, its row stays")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="run every family and write tests/helpers/families.json")
    if parser.parse_args().measure:
        family_table.write_table(measured())
    subprocess.run([sys.executable, ROOT / "scripts" / "pages.py"], check=True)


if __name__ == "__main__":
    main()
