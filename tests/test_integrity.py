"""Files that are not as built: an error or a warning that names them, before the native library is opened.

What is loaded is loaded in a process of its own, which a library that was cut short would end with SIGBUS.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import warnings
from typing import NamedTuple

import pytest
from helpers.hub_server import HubServer
from helpers.published import BUILD, FROM_HUB, REPO_ID, VERSION

# Loads by the expression `loader`, and prints what was raised and warned.
LOAD = """
import json, pathlib, sys, warnings
{imports}
found = dict(error=None, path=None, row_norm=False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        package = {loader}
        found["row_norm"] = package._ops.ops.row_norm is not None
    except Exception as error:
        found.update(error=f"{{type(error).__name__}}: {{error}}", path=getattr(error, "path", None))
opened = [line for line in open("/proc/self/maps") if "lora_fused" in line] if sys.platform == "linux" else []
messages = [str(each.message) for each in caught if "lora_fused" in str(each.message)]
print(json.dumps(dict(found, warnings=messages, opened=bool(opened))))
"""


class Copy(NamedTuple):
    """A copy of the built kernel."""

    repository: pathlib.Path
    variant: pathlib.Path

    @property
    def library(self):
        (library,) = self.variant.glob("*.so")
        return library

    @property
    def metadata(self):
        return self.variant / "metadata.json"

    def edit(self, change):
        """Applies `change` to the decoded metadata."""
        metadata = json.loads(self.metadata.read_text())
        change(metadata)
        self.metadata.write_text(json.dumps(metadata))


@pytest.fixture
def copied(tmp_path, lora_fused):
    name = pathlib.Path(lora_fused.__file__).parent.name
    shutil.copytree(BUILD / name, tmp_path / "build" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return Copy(tmp_path / "build", tmp_path / "build" / name)


def get_local(copied):
    return f"get_local_kernel(pathlib.Path({str(copied.repository)!r}))", {}


def local_kernels(copied):
    return f"get_kernel({REPO_ID!r}, version={VERSION})", {"LOCAL_KERNELS": f"{REPO_ID}={copied.repository}"}


def bare_import(copied):
    package = copied.repository / "imported" / "lora_fused"
    package.parent.mkdir()
    package.symlink_to(copied.variant)
    return "__import__('lora_fused')", {"PYTHONPATH": str(package.parent)}


WAYS = (get_local, local_kernels, bare_import)
by_every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


def load(loader, env):
    imports = "from kernels import get_kernel, get_local_kernel" if "kernel(" in loader else ""
    code = LOAD.format(loader=loader, imports=imports)
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def check(lora_fused, copied):
    """Checks the copy in this process, as `load` does, and loads nothing."""

    def checked():
        found = dict(error=None, path=None, row_norm=True, opened=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                lora_fused.environment.integrity.check(copied.variant)
            except ImportError as error:
                found.update(error=f"{type(error).__name__}: {error}", path=error.path)
        return found | {"warnings": [str(each.message) for each in caught]}

    return checked


def assert_refused(found, path, *words):
    assert found["error"].startswith("ImportError: lora_fused: "), found
    assert [word for word in (str(path), *words) if word not in found["error"]] == [], found
    assert pathlib.Path(found["path"]) == path and not found["opened"]


def assert_loaded(found, *warned):
    assert found["error"] is None and found["row_norm"], found
    assert len(found["warnings"]) == (1 if warned else 0), found
    assert [word for word in warned if word not in found["warnings"][0]] == [], found


@by_every_way
def test_whole(way, copied):
    found = load(*way(copied))
    assert_loaded(found)
    assert found["opened"] or sys.platform != "linux"


def empty(path):
    path.write_bytes(b"")


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_a_byte(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path):
    path.unlink()


def become_a_folder(path):
    path.unlink()
    path.mkdir()


def point_nowhere(path):
    path.unlink()
    path.symlink_to("nowhere")


DAMAGE = {
    empty: "is empty",
    halve: "has other contents",
    cut_a_byte: "has other contents",
    flip_a_bit: "has other contents",
    remove: "is missing",
    point_nowhere: "is missing",
    become_a_folder: "cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_library(damage, copied, check):
    library = copied.library
    damage(library)
    assert_refused(check(), library, DAMAGE[damage], "build the kernel again")


@by_every_way
def test_library_cut_short_is_not_opened(way, copied):
    halve(copied.library)
    loader = way(copied)
    package = copied.repository / "imported" / "lora_fused" if way is bare_import else copied.variant
    assert_refused(load(*loader), package / copied.library.name, "has other contents")


@pytest.mark.parametrize("damage", (empty, flip_a_bit), ids=lambda damage: damage.__name__)
def test_damaged_library_is_not_opened(damage, copied):
    damage(copied.library)
    assert_refused(load(*get_local(copied)), copied.library, DAMAGE[damage])


def append(path):
    path.write_bytes(path.read_bytes() + b"\n")


def exchange(copied):
    def change(metadata):
        files = metadata["digest"]["files"]
        files["__init__.py"] = files["mapping.py"]

    copied.edit(change)


OTHER_FILES = {
    "layers.py has other contents": lambda copied: append(copied.variant / "layers.py"),
    "autograd/group_eager.py has other contents": lambda copied: append(copied.variant / "autograd" / "group_eager.py"),
    "autograd/__init__.py is empty": lambda copied: empty(copied.variant / "autograd" / "__init__.py"),
    "specs.py is missing": lambda copied: remove(copied.variant / "specs.py"),
    "autograd/mine.py is new": lambda copied: empty(copied.variant / "autograd" / "mine.py"),
    "backends/configs/nvidia-h200.json is empty": lambda copied: empty(
        copied.variant / "backends" / "configs" / "nvidia-h200.json"
    ),
    "__init__.py has other contents": exchange,
}


@pytest.mark.parametrize("words", OTHER_FILES)
def test_other_files_are_warned_of(words, copied, check):
    OTHER_FILES[words](copied)
    assert_loaded(check(), words)


def test_edited_package_loads_with_one_warning(copied):
    for name in ("layers.py", "shared_input.py"):
        append(copied.variant / name)
    empty(copied.variant / "mine.py")
    assert_loaded(load(*get_local(copied)), "layers.py has", "shared_input.py has", "mine.py is new")


def test_what_python_and_others_leave_is_no_damage(copied, check):
    (copied.variant / "__pycache__").mkdir()
    for name in ("__pycache__/layers.cpython-311.pyc", ".DS_Store", "metadata.json.sigstore"):
        empty(copied.variant / name)
    assert_loaded(check())


@pytest.mark.parametrize("digest", ({}, {"digest": None}), ids=("none", "null"))
def test_no_digest_no_check(digest, copied, check):
    copied.edit(lambda metadata: metadata.pop("digest") and metadata.update(digest))
    empty(copied.variant / "mine.py")
    empty(copied.library)
    assert_loaded(check())


def test_without_a_digest_it_loads(copied):
    copied.edit(lambda metadata: metadata.pop("digest"))
    assert_loaded(load(*get_local(copied)))


def test_no_metadata_no_check(copied):
    remove(copied.metadata)
    empty(copied.variant / "mine.py")
    assert_loaded(load(*bare_import(copied)))


def written(text):
    return lambda path: path.write_bytes(text)


@pytest.mark.parametrize(
    "damage, words",
    [
        (empty, "is malformed"),
        (halve, "is malformed"),
        (written(b"\xff\xfe{}"), "is malformed"),
        (written(b"[]"), "is malformed"),
        (written(b'{"digest": {}}'), "is malformed"),
        (written(b'{"digest": {"algorithm": "sha256", "files": ["_ops.py"]}}'), "is malformed"),
        (written(b'{"digest": {"algorithm": "sha256", "files": {"_ops.py": "-"}}}'), "is malformed"),
        (written(b'{"digest": {"algorithm": "sha256", "files": {"_ops.py": null}}}'), "is malformed"),
        (become_a_folder, "cannot be read"),
        (point_nowhere, "cannot be read"),
    ],
    ids=(
        "empty",
        "half",
        "no text",
        "list",
        "nothing in it",
        "files a list",
        "no base64",
        "no hash",
        "folder",
        "dangling",
    ),
)
def test_damaged_metadata(damage, words, copied, check):
    damage(copied.metadata)
    assert_refused(check(), copied.metadata, words)


def test_damaged_metadata_is_seen_by_a_bare_import(copied):
    """`kernels` reads it before the package does and has an error of its own."""
    halve(copied.metadata)
    assert_refused(
        load(*bare_import(copied)), copied.repository / "imported" / "lora_fused" / "metadata.json", "malformed"
    )


def test_digest_of_an_unknown_kind(copied, check):
    copied.edit(lambda metadata: metadata["digest"].update(algorithm="sha1024"))
    empty(copied.variant / "mine.py")
    assert_loaded(check(), "not checked", "'sha1024'")


def test_the_message_mends_a_damaged_cache(tmp_path):
    """A snapshot links to blobs: deleting the snapshot alone would bring the damaged one back."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "LOCAL_KERNELS"))}
    with HubServer(REPO_ID, BUILD) as hub:
        env = keep | dict(
            HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path), HF_HUB_DISABLE_PROGRESS_BARS="1", NO_PROXY="127.0.0.1"
        )
        env |= {"HF_HUB_OFFLINE": "0"}
        assert_loaded(load(FROM_HUB, env))
        (library,) = tmp_path.rglob("snapshots/**/*.so")
        halve(library)
        found = load(FROM_HUB, env)
        assert_refused(found, library, "has other contents", "downloads it anew")
        folder = pathlib.Path(found["error"].partition("delete ")[2].partition(" and load")[0])
        assert folder in library.parents and folder.parent == tmp_path / "hub"
        shutil.rmtree(folder)
        assert_loaded(load(FROM_HUB, env))
