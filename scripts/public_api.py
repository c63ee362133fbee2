#!/usr/bin/env python3
"""The public interface of the built kernel, as docs/api.json keeps it: `__all__`, and every signature behind it.

    python scripts/public_api.py [--write]

<<<<<<< HEAD
Without --write the differences to what is kept are printed, and the exit status is 1 where there are some. CHANGELOG.md
says what they mean for the version.
=======
Without --write the differences to what is kept are printed, with what they mean for the version, and the exit status is
1 where there are some. CHANGELOG.md has the rules.
>>>>>>> main
"""

import argparse
import inspect
import json
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "docs" / "api.json"


def signature(function: object) -> str:
    """Names, kinds and defaults; annotations are written otherwise by other versions of Python."""
    told = inspect.signature(function)
    parameters = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in told.parameters.values()]
    return str(told.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def describe(thing: object) -> object:
    """A function's signature; of a class its own and its public methods', properties and fields; of a module its public
    classes and functions."""
    if isinstance(thing, types.ModuleType):
        own = {
            name: value for name, value in vars(thing).items() if getattr(value, "__module__", None) == thing.__name__
        }
        return {name: describe(value) for name, value in sorted(own.items()) if not name.startswith("_")}
    if not inspect.isclass(thing):
        return signature(thing)
    members = {"__init__": signature(thing)}
    for name, value in sorted(vars(thing).items()):
        value = getattr(value, "__func__", value)  # of a classmethod or staticmethod
        if not name.startswith("_") or name == "__call__":
            members[name] = signature(value) if inspect.isfunction(value) else "attribute"
    return members


def of(kernel: types.ModuleType) -> dict:
    """The interface of a loaded kernel."""
    return {name: describe(getattr(kernel, name)) for name in sorted(kernel.__all__)}


def flat(interface: object, prefix: str = "") -> dict[str, str]:
    """One entry a name: `Projection.__init__` and what it is."""
    if isinstance(interface, str):
        return {prefix: interface}
    entries = {}
    for name, value in interface.items():
        entries |= flat(value, f"{prefix}.{name}".lstrip("."))
    return entries


def changes(kept: dict, now: dict) -> list[str]:
    """What is not as kept, a line each."""
    old, new = flat(kept), flat(now)
    lines = [f"removed {name} {old[name]}" for name in sorted(set(old) - set(new))]
    lines += [f"added {name} {new[name]}" for name in sorted(set(new) - set(old))]
    lines += [f"changed {n} from {old[n]} to {new[n]}" for n in sorted(set(old) & set(new)) if old[n] != new[n]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep what the build in build/ has")
    args = parser.parse_args()
    from kernels import get_local_kernel

    now = of(get_local_kernel(ROOT / "build"))
    if args.write:
        KEPT.write_text(json.dumps(now, indent=1) + "\n")
        return
    lines = changes(json.loads(KEPT.read_text()), now)
    for line in lines:
        print(line)
    if lines:
        print("\nSee CHANGELOG.md for what these mean for the version, then: make public-api WRITE=1")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
