"""What a release promises and how it is made: versions, names, hashes, the public interface."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.hub_server import HubServer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import environment
import flake_lock
import noarch
import public_api
import release
import reproduce
import variants
from helpers.published import CONFIG

LOCKED = json.loads((ROOT / "flake.lock").read_text())["nodes"]


def test_kept_variants_are_of_the_locked_builder(monkeypatch, capsys):
    kept = json.loads(variants.KEPT.read_text())
    assert kept["kernel-builder"] == LOCKED["kernel-builder"]["locked"]["rev"]
    names = [name for of_system in kept["variants"].values() for name in of_system]
    assert len(names) > 3 and len(set(names)) == len(names)
    assert {name for name in names if "-abi" not in name} == {f"torch-{backend}" for backend in noarch.BACKENDS}
    for system, of_system in kept["variants"].items():
        for name in [name for name in of_system if "-abi" in name]:
            abi, backend = re.fullmatch(rf"torch-stable-abi(\d+)-(cpu|cu)\d*-{system}", name).groups()
            backend = {"cpu": "cpu", "cu": "cuda"}[backend]
            assert backend in CONFIG["general"]["backends"]
            assert abi == CONFIG["torch"]["stable-abi"][backend].replace(".", "")
    monkeypatch.setattr(sys, "argv", ["variants.py"])
    monkeypatch.setattr(variants.shutil, "which", lambda name: None)
    variants.main()
    told = capsys.readouterr().out
    assert "Nix is not installed" in told and all(name in told for name in names)


def test_variants_are_asked_of_nix_where_it_is(monkeypatch, capsys, tmp_path):
    nix = tmp_path / "nix"
    nix.write_text('#!/bin/sh\ncase "$*" in *path:*#packages.x86_64-linux.variants) echo \'["c"]\';; '
                   '*#packages.x86_64-linux.variants) echo \'["b", "a"]\';; '
                   "eval*#packages.*) echo '[]';; *) exit 3;; esac\n")  # fmt: skip
    nix.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(variants, "KEPT", tmp_path / "kept.json")
    (tmp_path / "kept.json").write_text((ROOT / "docs" / "variants.json").read_text())
    monkeypatch.setattr(sys, "argv", ["variants.py"])
    variants.main()
    told = capsys.readouterr()
    assert [line.split()[0] for line in told.out.splitlines()] == ["a", "b", "c"] and "not as kept" in told.err
    monkeypatch.setattr(sys, "argv", ["variants.py", "--write"])
    variants.main()
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert (
        kept["variants"]["x86_64-linux"] == ["a", "b", "c"]
        and kept["kernel-builder"] == LOCKED["kernel-builder"]["locked"]["rev"]
    )


def test_hash_of_a_tree_is_nixs(tmp_path):
    assert flake_lock.nar_hash(tmp_path) == "sha256-pQpattmS9VmO3ZIQUFn66az8GSmB4IvYhTTCFn6SUmo="  # of any empty folder
    file = tmp_path / "file"
    file.write_text("text")
    seen = {flake_lock.nar_hash(tmp_path)}
    file.chmod(0o755)
    seen.add(flake_lock.nar_hash(tmp_path))
    file.write_text("other")
    seen.add(flake_lock.nar_hash(tmp_path))
    file.rename(tmp_path / "name")
    seen.add(flake_lock.nar_hash(tmp_path))
    (tmp_path / "name").unlink()
    (tmp_path / "name").symlink_to("other")
    seen.add(flake_lock.nar_hash(tmp_path))
    assert len(seen) == 5


@pytest.fixture
def two(tmp_path):
    """Two equal variants."""
    for name in ("one", "other"):
        (tmp_path / name / "sub" / "__pycache__").mkdir(parents=True)
        (tmp_path / name / "sub" / "__pycache__" / "x.pyc").write_text(name)
        (tmp_path / name / "sub" / "x.py").write_text("x")
    assert reproduce.differences(tmp_path / "one", tmp_path / "other") == []
    return tmp_path / "one", tmp_path / "other"


def test_differences_of_two_builds_are_named(two):
    one, other = two
    (other / "sub" / "x.py").chmod(0o600)
    assert reproduce.differences(one, other) == ["sub/x.py has mode 0o644, and 0o600 in the other"]
    assert reproduce.differences(one, other, modes=False) == []
    (other / "sub" / "x.py").write_text("y")
    (other / "new").write_text("")
    told = reproduce.differences(one, other, modes=False)
    assert told == [f"new is only in {other}", "sub/x.py has other contents"]


def test_commit_of_a_variant_that_is_compared_with(tmp_path):
    commit = "0123456789" * 4
    for metadata, expected in (
        ({"provenance": {"kernel-builder": {}, "kernel": {"commit": commit, "dirty": False}}}, commit),
        ({"local-build": {"kernel": {"commit": commit, "dirty": False}}}, commit),
        ({"local-build": {"kernel": {"commit": commit, "dirty": True}}}, "not committed"),
        ({}, "names no commit"),
    ):
        (tmp_path / "metadata.json").write_text(json.dumps(metadata))
        if expected == commit:
            assert reproduce.commit_to_build(tmp_path) == commit
        else:
            with pytest.raises(SystemExit, match=expected):
                reproduce.commit_to_build(tmp_path)


def test_public_interface_is_as_kept(lora_fused):
    """What differs asks for a line in CHANGELOG.md, perhaps for a new version, and for `make public-api WRITE=1`."""
    assert public_api.changes(json.loads(public_api.KEPT.read_text()), public_api.of(lora_fused)) == []


def test_changes_of_the_interface_are_told():
    class Base:
        def method(self, x, y=1): ...

        @property
        def field(self): ...

    kept = {"f": public_api.describe(lambda x, *, p=0.0: x), "C": public_api.describe(Base)}
    Base.method, Base.more = (lambda self, x: x), (lambda self: self)
    del Base.field
    now = {"f": public_api.describe(lambda x, *, p=0.5: x), "C": public_api.describe(Base)}
    assert public_api.changes(kept, now) == [
        "removed C.field attribute",
        "added C.more (self)",
        "changed C.method from (self, x, y=1) to (self, x)",
        "changed f from (x, *, p=0.0) to (x, *, p=0.5)",
    ]


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps_of(path):
    """(name of the job, step) of every step."""
    jobs = yaml.safe_load(path.read_text())["jobs"]
    return [(name, step) for name, job in jobs.items() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_pinned_have_least_rights_and_end(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert all(0 < job["timeout-minutes"] <= 360 and "permissions" not in job for job in workflow["jobs"].values())
    used = [step["uses"] for _, step in steps_of(path) if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", use) for use in used), used
    for _, step in steps_of(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"] == {"persist-credentials": False}
        assert "${{" not in step.get("run", ""), "what others can name does not become a command"


def test_the_token_is_where_a_maintainer_is_asked():
    holders = [
        (path.name, name) for path in WORKFLOWS for name, step in steps_of(path) if "secrets." in json.dumps(step)
    ]
    assert holders == [("release.yml", "upload")]
    upload = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]["upload"]
    assert upload["environment"] == "hub" and upload["needs"] == "build"


def test_workflows_run_what_the_makefile_has():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.M))
    asked = {
        target
        for path in WORKFLOWS
        for _, step in steps_of(path)
        for target in re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))
    }
    assert {"check-build", "build-cuda", "build-noarch", "release-dry-run", "variants"} <= asked <= targets
    assert all(
        (ROOT / name).exists() for name in re.findall(r"requirements-\w+\.txt", str([p.read_text() for p in WORKFLOWS]))
    )


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml")), ids=lambda path: path.name
)
def test_issue_templates_ask_for_explain_and_the_environment(path):
    asked = {item["id"]: item for item in yaml.safe_load(path.read_text())["body"] if "id" in item}
    assert {"program", "explain", "environment", "kernel"} == set(asked)
    assert all(item["validations"]["required"] for item in asked.values())
    assert "lora_fused.explain(model)" in asked["explain"]["attributes"]["description"]
    assert "python -m scripts.environment" in asked["environment"]["attributes"]["description"]


def test_environment_report_names_versions_and_no_paths(monkeypatch):
    monkeypatch.setenv("HF_HOME", "/home/somebody/cache")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "not-a-package"))
    told = environment.report()
    assert "not-a-package not installed" in told and "HF_HUB_OFFLINE=1" in told and "HF_HOME is set" in told
    assert "somebody" not in told and "secret" not in told
    assert f"torch {torch.__version__}, CUDA {torch.version.cuda}" in told


def test_card_is_filled():
    card = release.card(release.config())
    assert "{{" not in card and "{%" not in card
    for words in ("# org/lora-fused", "license: apache-2.0", "- `lora_linear`", "- `LoraLinear`", "## Benchmarks"):
        assert words in card
    assert "`layers`" not in card


def test_what_a_release_must_not_have(tmp_path, monkeypatch):
    general = release.config()
    assert release.problems(general, None) == []
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release, "git_status", lambda: {"dirty": False})
    (tmp_path / "CHANGELOG.md").write_text("## Version 1, not yet released\n")
    assert ["not yet released" in problem for problem in release.problems({"version": 1}, "v1.0")] == [True]
    (tmp_path / "CHANGELOG.md").write_text("## Version 1, spring\n")
    assert release.problems({"version": 1}, "v1.0") == []
    assert ["is no v1.<number>" in problem for problem in release.problems({"version": 1}, "v2.0")] == [True]
    assert ["no heading for version 2" in problem for problem in release.problems({"version": 2}, "v2.0")] == [True]
    monkeypatch.setattr(release, "git_status", lambda: {"dirty": True})
    assert ["not committed" in problem for problem in release.problems({"version": 1}, "v1.0")] == [True]


def test_uploads_are_what_kernel_builder_uploads(tmp_path, monkeypatch):
    """The list of a dry run against the Hub of the rehearsal, which follows kernel-builder's upload."""
    variant = tmp_path / "build" / "torch-stable-abi211-cpu-x86_64-linux"
    for name in ("metadata.json", "sub/x.py", "__pycache__/x.pyc"):
        (variant / name).parent.mkdir(parents=True, exist_ok=True)
        (variant / name).write_text(name)
    (tmp_path / "benchmarks").mkdir()
    for name in ("benchmark.py", "tables.py"):
        (tmp_path / "benchmarks" / name).write_text(name)
    (tmp_path / "build" / "CARD.md").write_text("card")
    monkeypatch.setattr(release, "ROOT", tmp_path)
    with HubServer("org/lora-fused") as hub:
        hub.upload(tmp_path, tmp_path / "build", 3)
    listed = {(branch, path): file.read_bytes() for branch, path, file in release.uploads({"version": 3})}
    assert listed == {(branch, name): data for branch, files in hub.branches.items() for name, data in files.items()}
