"""States of 4-bit weights that are damaged, unfinished, elsewhere or bitsandbytes' own."""

import copy

import pytest
import torch
from helpers.cases import QUANTIZED_CASES, Case

bnb = pytest.importorskip("bitsandbytes")
from helpers import quantized

BF16, F32 = torch.bfloat16, torch.float32


def damage(layer, what, device):
    base = layer.base_layer
    state = base.weight.quant_state
    if what == "blocksize":
        state.blocksize = 128
    elif what == "odd blocksize":
        state.blocksize = 48
    elif what == "absmax":
        state.absmax = None
    elif what == "short absmax":
        state.absmax = state.absmax[:-1]
    elif what == "offset":
        state.offset = None
    elif what == "packed":
        base.weight.data = base.weight.data[:-8]
    elif what == "device":
        state.absmax = state.absmax.to("meta" if device == "cpu" else "cpu")
    elif what == "absmax dtype":
        state.absmax = state.absmax.float()
    elif what == "nested":
        state.state2.absmax = state.state2.absmax[:0]


DAMAGES = {
    "blocksize": "absmax has 390 elements, expected 195",
    "odd blocksize": "blocksize 48, expected one of",
    "absmax": "absmax is missing",
    "short absmax": "absmax has 389 elements, expected 390",
    "offset": "offset is missing",
    "packed": "packed weight holds 24944 values, expected 24960",
    "device": "absmax is on",
    "absmax dtype": "absmax has dtype torch.float32, expected torch.uint8",
    "nested": "nested absmax has 0 elements, expected 2",
}


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("rows", (1, 40))
def test_damaged_states_name_the_module(lora_fused, device, what, rows):
    case = QUANTIZED_CASES[5]
    model = quantized.replace(quantized.One(case, F32, device), lambda m: quantized.four_bit(m, F32, device))
    model, layer = quantized.adapted(model, case)
    quantized.fuse(lora_fused, model, device)
    damage(layer, what, device)
    with pytest.raises(ValueError, match=r"^model\.proj: .*" + DAMAGES[what]):
        model(torch.randn(rows, case.k, device=device))
    with pytest.warns(UserWarning, match="none of the 1"):
        assert DAMAGES[what] in lora_fused.explain(model)[0].reason


def test_a_weight_not_quantized_yet(lora_fused):
    """bitsandbytes quantizes when the layer is moved; before that PEFT fails on an assertion."""
    case = Case((7,), 64, 32, 4)
    model = quantized.One(case, F32, "cpu")
    model = quantized.replace(model, lambda m: bnb.nn.Linear4bit(case.k, case.n, bias=False, compute_dtype=F32))
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=4, target_modules=["proj"]))
    with pytest.warns(UserWarning):
        quantized.fuse(lora_fused, model)
    with pytest.raises(ValueError, match=r"model\.proj: .*not quantized yet"):
        model(torch.randn(7, case.k))
    with pytest.warns(UserWarning, match=r"move it to its device; load the weights"):
        (row,) = lora_fused.explain(model)
    assert row.reason == "base weight of torch.float32 is not quantized yet: move it to its device"  # of any shape


def test_x_on_another_device(lora_fused):
    case = QUANTIZED_CASES[5]
    model = quantized.replace(quantized.One(case, F32, "cpu"), lambda m: quantized.four_bit(m, F32))
    model, layer = quantized.adapted(model, case)
    quantized.fuse(lora_fused, model)
    with pytest.raises(ValueError, match=r"model\.proj: x is on meta, the base weight on cpu"):
        model(torch.randn(40, case.k, device="meta"))


def test_states_that_are_bitsandbytes_own(lora_fused):
    """One that its layer alone holds, as under FSDP; where it does not fit, and packed for inference: PEFT's own
    forward."""
    case = QUANTIZED_CASES[5]
    model = quantized.replace(quantized.One(case, F32, "cpu"), lambda m: quantized.four_bit(m, F32))
    model, layer = quantized.adapted(model, case)
    quantized.fuse(lora_fused, model)
    x, base = torch.randn(40, case.k), layer.base_layer
    expected, state = model(x), base.quant_state
    base.weight.quant_state = None
    assert lora_fused.explain(model)[0].fused
    assert torch.equal(model(x), expected) and base.weight.quant_state is None
    base.quant_state = copy.copy(state)
    base.quant_state.blocksize = 100
    with pytest.warns(UserWarning):
        assert "blocksize 100" in lora_fused.explain(model)[0].reason
    base.quant_state = state
    type(layer).forward(layer, x)
    assert base.weight.quant_state is state
    state.packing_format_for_cpu = True
    with pytest.warns(UserWarning):
        assert "packed for inference" in lora_fused.explain(model)[0].reason
