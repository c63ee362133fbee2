"""Packages that are missing or too old: one error before anything is mapped."""

import os
import subprocess
import sys

import kernels
import peft
import pytest
import torch
from helpers.published import BUILD
from kernels.layer.globals import _KERNEL_MAPPING
from peft import PeftModel
from peft.tuners import lora
from transformers.utils.import_utils import is_kernels_available

MARKED = (PeftModel, lora.Linear, lora.Embedding)


def registered(lora_fused):
    lora_fused.register_peft_layers()


def used(lora_fused):
    with lora_fused.use_peft_layers():
        raise AssertionError("entered")


both_ways = pytest.mark.parametrize("way", (registered, used), ids=("register", "use"))


@pytest.fixture
def untouched():
    """What registering would change is as it was, afterwards too."""

    def state():
        return dict(_KERNEL_MAPPING.get()), [
            (vars(cls).get("kernel_layer_name"), vars(cls).get("kernel_condition")) for cls in MARKED
        ]

    token = _KERNEL_MAPPING.set({})  # as in a process that has registered nothing
    before = state()
    yield
    assert state() == before
    _KERNEL_MAPPING.reset(token)


def refused(way, lora_fused):
    with pytest.raises(ImportError) as caught:
        way(lora_fused)
    message = str(caught.value)
    assert message.startswith("lora_fused: ") and "Nothing was mapped" in message
    return message


@both_ways
@pytest.mark.parametrize(
    "package, version, wanted",
    [
        (peft, "0.15.2", "0.18"),
        (peft, "0.17.1", "0.18"),
        (kernels, "0.16.2", "0.17"),
        (kernels, "0.16.2.dev0", "0.17"),
        (torch, "2.10.0+cu128", "2.11"),
        (torch, "1.13.1", "2.11"),
    ],
)
def test_too_old(way, package, version, wanted, lora_fused, untouched, monkeypatch):
    monkeypatch.setattr(package, "__version__", version)
    name = package.__name__
    message = refused(way, lora_fused)
    assert f"{name} >= {wanted} is wanted, {version} is installed" in message
    assert message.endswith(f'Run: pip install --upgrade "{name}>={wanted}"')


@both_ways
def test_missing(way, lora_fused, untouched, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(lora_fused.environment.versions.importlib.metadata, "version", not_installed)
    message = refused(way, lora_fused)
    assert "peft >= 0.18 is wanted, it is not installed" in message and message.endswith('"peft>=0.18"')


def not_installed(name):
    raise __import__("importlib.metadata").metadata.PackageNotFoundError(name)


@both_ways
def test_all_in_one_message(way, lora_fused, untouched, monkeypatch):
    for package, version in ((peft, "0.14.0"), (kernels, "0.12.3"), (torch, "2.9.1")):
        monkeypatch.setattr(package, "__version__", version)
    message = refused(way, lora_fused)
    assert [version for version in ("0.14.0", "0.12.3", "2.9.1") if f"{version} is installed" not in message] == []
    assert message.endswith('Run: pip install --upgrade "kernels>=0.17" "peft>=0.18" "torch>=2.11"')


@pytest.mark.parametrize(
    "package, version",
    [
        (peft, "0.18"),
        (peft, "0.18.0rc1"),
        (peft, "0.22.0.dev0"),
        (peft, "1.0"),
        (kernels, "0.17.0"),
        (kernels, "0.18.0.dev0"),
        (torch, "2.11.0a0+git1234567"),
        (torch, "2.16.0.dev20261101+cpu"),
        (torch, "3.0.0"),
        (peft, "unknown"),
    ],
)
def test_new_enough(package, version, lora_fused, monkeypatch):
    monkeypatch.setattr(package, "__version__", version)
    lora_fused.environment.versions.check()


def test_transformers_accepts_these_kernels():
    """The pinned pair: transformers leaves its layers alone beside kernels that it does not accept."""
    assert is_kernels_available()


IN_A_PROCESS = """
import pathlib, sys
from kernels import get_local_kernel
from kernels.layer.globals import _KERNEL_MAPPING
package = get_local_kernel(pathlib.Path({build!r}))
for way in (package.register_peft_layers, package.use_peft_layers().__enter__):
    try:
        way()
    except ImportError as error:
        print(error)
assert not _KERNEL_MAPPING.get()
"""


@pytest.mark.parametrize(
    "content, words",
    [
        ('__version__ = "0.15.2"', "0.15.2 is installed"),
        ("from transformers import NoSuchCache", "cannot be imported (ImportError: cannot import name 'NoSuchCache'"),
        ("from torch.nothing import it", "cannot be imported (ModuleNotFoundError: No module named 'torch.nothing'"),
    ],
    ids=("old", "does not fit", "not whole"),
)
def test_what_is_imported_counts(content, words, tmp_path):
    """Not what pip has installed: here another peft comes first on the path."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text(content)
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS.format(build=str(BUILD))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(words in line and "peft >= 0.18 is wanted" in line for line in lines), done.stdout
