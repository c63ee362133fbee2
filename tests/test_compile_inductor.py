"""Inductor with the merge of siblings: its options, its draws, its cache, and that nothing imports it early."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from helpers.siblings import GROUPS, assert_same, run_by_hand, run_by_inductor
from torch._inductor.utils import fresh_cache

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_options_name_a_mode(lora_fused):
    modes = torch._inductor.list_mode_options()
    assert set(lora_fused.compile_options()) == {"joint_custom_pre_pass"}
    for mode, options in modes.items():
        found = lora_fused.compile_options(mode)
        assert found.pop("joint_custom_pre_pass") is not None and found == options
    for mode in ("fast", "", 3):
        with pytest.raises(ValueError, match="mode: .*, expected None or one of 'default'"):
            lora_fused.compile_options(mode)


def test_inductor_has_one_mask_and_one_draw(lora_fused):
    """<dA, A> = <dy, y - base>: forward and backward have one mask."""
    with fresh_cache():
        options = {"cpp_cache_precompile_headers": False}
        siblings, counts, results = run_by_inductor(lora_fused, GROUPS["dropout"], options=options)
    assert counts == (1, 1, 1)
    operands = lora_fused.specs.unflatten(siblings.flat)
    grads = {id(tensor): grad for tensor, grad in zip(siblings.trained, results[4:])}
    for y, of in zip(results, operands):
        base = torch.nn.functional.linear(siblings.x, of.weight, of.bias)
        delta = (y - base).sum()
        assert delta.abs() > 1e-3
        torch.testing.assert_close((grads[id(of.lora_a)] * of.lora_a).sum(), delta, rtol=1e-10, atol=0)


def test_inductor_that_draws_as_eager(lora_fused):
    """Each seed is drawn by itself then."""
    with fresh_cache():
        siblings, counts, results = run_by_inductor(lora_fused, GROUPS["dropout"], options={"fallback_random": True})
    assert counts == (1, 1, 0)
    assert_same(results, run_by_hand(siblings), 1e-13)


def test_inductor_with_options(lora_fused):
    """By the pass that the options name alone."""
    options = {**lora_fused.compile_options("default"), "pattern_matcher": False}
    with fresh_cache():
        siblings, counts, results = run_by_inductor(lora_fused, GROUPS["LoRA"], options=options)
    assert counts == (1, 1, 0)
    assert_same(results, run_by_hand(siblings), 1e-13)


PROCESS = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from kernels import get_local_kernel
from helpers.siblings import GROUPS, assert_same, run_by_hand, run_by_inductor
from torch._dynamo.utils import counters

package = get_local_kernel(pathlib.Path({str(ROOT / "build")!r}))
siblings, counts, results = run_by_inductor(package, GROUPS["LoRA"])
assert_same(results, run_by_hand(siblings), 1e-13)
hits = counters["inductor"]["fxgraph_cache_hit"]
print(counts, hits)
"""


def test_a_second_process_has_the_merged_graph_from_the_cache(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for hits in (0, 2):
        result = subprocess.run([sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True)
        assert result.stdout.strip() == f"(1, 1, 0) {hits}", result.stderr


def test_nothing_of_the_compiler_is_imported_before_it_is_used():
    code = f"""
import pathlib, sys
from kernels import get_local_kernel
before = set(sys.modules)
package = get_local_kernel(pathlib.Path({str(ROOT / "build")!r}))
assert package.compile_options
print(sorted(name for name in ("torch._inductor", "torch._dynamo") if name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
