#!/usr/bin/env python3
"""Print the names of the variants that the flake builds.

    python scripts/variants.py [--write]

With Nix they are what kernel-builder evaluates, for each system, of the repository and of what scripts/noarch.py makes
of it; `--write` keeps them in docs/variants.json. Without Nix the kept ones are printed, which are of the builder that
flake.lock names.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import noarch

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "docs" / "variants.json"


def evaluated() -> dict[str, list[str]] | None:
    """The names by system, as `kernel-builder list-variants` asks Nix for them; None without Nix."""
    if shutil.which("nix") is None:
        return None
    flags = ["--extra-experimental-features", "nix-command flakes", "--json"]
    told: dict[str, list[str]] = {system: [] for system in kept()["variants"]}
    with tempfile.TemporaryDirectory() as source:
        noarch.write_source(Path(source))
        for flake in (str(ROOT), f"path:{source}"):
            for system, names in told.items():
                command = ["nix", "eval", *flags, f"{flake}#packages.{system}.variants"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode != 0:
                    sys.exit(f"variants: {done.stderr}")
                names += json.loads(done.stdout)
    return {system: sorted(names) for system, names in told.items()}


def kept() -> dict:
    return json.loads(KEPT.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep what was evaluated in docs/variants.json")
    args = parser.parse_args()
    names = evaluated()
    builder = json.loads((ROOT / "flake.lock").read_text())["nodes"]["kernel-builder"]["locked"]["rev"]
    if names is None:
        print(f"Nix is not installed: nothing is evaluated, and these were kept of kernel-builder {builder[:7]}")
        if args.write:
            sys.exit("variants: nothing to write")
        names = kept()["variants"]
    elif args.write:
        KEPT.write_text(json.dumps({"kernel-builder": builder, "variants": names}, indent=1) + "\n")
    elif names != kept()["variants"]:
        print("not as kept in docs/variants.json (--write)", file=sys.stderr)
    here = f"{platform.machine()}-{platform.system().lower()}"
    for system, variants in names.items():
        for variant in variants:
            print(variant + " (this system)" * (system == here))


if __name__ == "__main__":
    main()
