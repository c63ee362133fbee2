"""Whole model families, kernelized, against PEFT, and the table of them in docs/support.md."""

import pytest
import torch
import transformers
from helpers.families import FAMILIES
from helpers.family_table import measure, read_table, without_version

VARIANTS = {"lora": {}, "dora": dict(use_dora=True)}


@pytest.fixture(autouse=True)
def _one_thread():
    """The sizes are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_as_peft(lora_fused, name, variant):
    """Losses, all gradients, generation; what is fused is what the table says, in numbers of calls and by `explain`."""
    family = FAMILIES[name]
    if not family.is_here():
        pytest.skip(f"this transformers has no {family.config} or {family.model}")
    if variant == "dora" and not family.dora:
        pytest.skip("PEFT has no DoRA for experts")
    version, rows = read_table()
    row, expected = measure(lora_fused, family, **VARIANTS[variant]), rows[name]
    if transformers.__version__ != version:
        row, expected = without_version(row), without_version(expected)
    assert row == expected


def test_enough_of_them_run():
    assert sum(family.is_here() for family in FAMILIES.values()) >= 40
    _, rows = read_table()
    assert rows.keys() == FAMILIES.keys()
    assert all(0 < row["fused"] <= row["modules"] and row["computed"] > 0 for row in rows.values())
