#!/usr/bin/env python3
"""Say what a release of build/ would put where, and hold it against what was promised.

    python scripts/release.py [--tag v1.0]

build/CARD.md is filled as kernel-builder fills it. Each file is listed with the branch and the path that
kernel-builder's upload gives it. Nothing is uploaded.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

import jinja2

from build import ROOT, git_status, tomllib


def config() -> dict:
    return tomllib.loads((ROOT / "build.toml").read_text())["general"]


def card(general: dict) -> str:
    """CARD.md with what build.toml and the public interface say."""
    interface = json.loads((ROOT / "docs" / "api.json").read_text())
    template = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
    return template.from_string((ROOT / "CARD.md").read_text()).render(
        repo_id=general["hub"]["repo-id"],
        version=general["version"],
        functions=[name for name in interface if name != "layers"],
        layers=list(interface["layers"]),
        has_benchmark=(ROOT / "benchmarks" / "benchmark.py").exists(),
        upstream=general.get("upstream"),
        source=general.get("source"),
        license=general["license"].lower(),
    )


def problems(general: dict, tag: str | None) -> list[str]:
    """What a release must not have."""
    found, version = [], general["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    heading = re.search(rf"^## Version {version}\b.*$", changelog, re.M)
    if heading is None:
        found.append(f"CHANGELOG.md has no heading for version {version}, which build.toml names")
    elif tag and "not yet released" in heading[0]:
        found.append(f"CHANGELOG.md says that version {version} is not yet released: say when it is")
    if tag and not re.fullmatch(rf"v{version}\.\d+", tag):
        found.append(f"the tag {tag} is no v{version}.<number>, and build.toml names version {version}")
    if tag and (git_status() or {"dirty": True})["dirty"]:
        found.append("there are changes that are not committed")
    return found


def uploads(general: dict) -> list[tuple[str, str, Path]]:
    """(branch, path on the Hub, file) of everything."""
    build, branch = ROOT / "build", f"v{general['version']}"
    found = [("main", "README.md", build / "CARD.md")]
    found += [(branch, f"benchmarks/{p.name}", p) for p in sorted((ROOT / "benchmarks").glob("benchmark*.py"))]
    variants = [path for path in sorted(build.iterdir()) if (path / "metadata.json").is_file()]
    for variant in variants:
        files = [path for path in sorted(variant.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
        found += [(branch, f"build/{path.relative_to(build).as_posix()}", path) for path in files]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tag", help="the git tag of the release")
    args = parser.parse_args()
    general = config()
    (ROOT / "build" / "CARD.md").write_text(card(general))
    for branch, path, file in uploads(general):
        data = file.read_bytes()
        print(f"{branch:5} {hashlib.sha256(data).hexdigest()[:16]} {len(data):>10} {path}")
    found = problems(general, args.tag)
    for problem in found:
        print(f"release: {problem}", file=sys.stderr)
    print(f"release: {general['hub']['repo-id']}, nothing was uploaded")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
