"""torch.compile on a GPU, with Inductor: the first call of all, and scalings that change. GPU only."""

import pytest
import torch
from helpers.compiling import Block, assert_same, block, fresh_compiler, results
from helpers.kernelizing import kernelized

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def x_of(rows=64):
    generator = torch.Generator("cuda").manual_seed(3)
    return torch.randn(2, rows, Block.width, device="cuda", generator=generator)


@pytest.fixture
def pair(lora_fused):
    """PEFT's own model, and ours compiled whole."""
    model = block(dtype=torch.float32).cuda()
    ours = kernelized(lora_fused, model, "cuda")
    with fresh_compiler():
        ours.compile(fullgraph=True)
        yield model, ours


def test_the_first_call_of_a_process(lora_fused, pair, monkeypatch):
    """Nothing has asked for the GPU's architecture yet."""
    native = lora_fused.backends.native
    monkeypatch.setattr(native, "may_be_old", True)
    native.architecture.cache_clear()
    model, ours = pair
    assert_same(results(ours, x_of()), results(model, x_of()), tolerance=1e-4)
    assert native.architecture(torch.device("cuda", 0)) != "sm75" and native.may_be_old is False


def test_scalings(pair):
    for scaling in (0.5, 0.7, 3.0):
        for each in pair:
            for layer in each.modules():
                if hasattr(layer, "lora_A"):
                    layer.set_scale("default", scaling)
        model, ours = pair
        assert_same(results(ours, x_of()), results(model, x_of()), tolerance=1e-4)
