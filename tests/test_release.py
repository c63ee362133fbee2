"""What a release promises and how it is made: versions, names, hashes, the public interface."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import flake_lock
import reproduce
import variants
from test_build import CONFIG

LOCKED = json.loads((ROOT / "flake.lock").read_text())["nodes"]


def test_kept_variants_are_of_the_locked_builder(monkeypatch, capsys):
    kept = json.loads(variants.KEPT.read_text())
    assert kept["kernel-builder"] == LOCKED["kernel-builder"]["locked"]["rev"]
    names = [name for of_system in kept["variants"].values() for name in of_system]
    assert len(names) > 3 and len(set(names)) == len(names)
    for system, of_system in kept["variants"].items():
        for name in of_system:
            abi, backend = re.fullmatch(rf"torch-stable-abi(\d+)-(cpu|cu)\d*-{system}", name).groups()
            backend = {"cpu": "cpu", "cu": "cuda"}[backend]
            assert backend in CONFIG["general"]["backends"]
            assert abi == CONFIG["torch"]["stable-abi"][backend].replace(".", "")
    monkeypatch.setattr(sys, "argv", ["variants.py"])
    monkeypatch.setattr(variants.shutil, "which", lambda name: None)
    variants.main()
    told = capsys.readouterr().out
    assert "Nix is not installed" in told and all(name in told for name in names)


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
