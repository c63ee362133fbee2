"""Wrong tensors: an error that names the tensor, what was seen and what was expected, before anything
runs; the same for every backend. An empty batch is no error."""

import copy
import math

import pytest
import torch
from helpers.cases import DEVICE, Case, peft_linear
from helpers.heads import assert_same, heads, inner, learned, step
from helpers.kernelizing import fused_functions, kernelize_in_place

pytestmark = pytest.mark.usefixtures("on_device")
SHAPES = dict(x=(5, 32), weight=(16, 32), lora_a=(4, 32), lora_b=(16, 4), bias=(16,), lora_bias=(16,), magnitude=(16,))
REQUIRED = ("x", "weight", "lora_a", "lora_b")
OTHER_DEVICE = "cpu" if DEVICE == "cuda" else "meta"


def tensors(*optional):
    return {name: torch.randn(SHAPES[name]) for name in (*REQUIRED, *optional)}


@pytest.fixture
def nothing_runs(lora_fused, monkeypatch):
    """No product, norm or dropout is asked for."""

    def ran(*args, **kwargs):
        raise AssertionError("a kernel ran")

    for name in ("lora_forward", "dora_scales", "row_norm", "mag_norm_scale", "dropout"):
        monkeypatch.setattr(lora_fused.backends.native, name, ran)
    for name in ("shrink", "linear_expand"):
        monkeypatch.setattr(lora_fused.backends.reference, name, ran)


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_something_runs_for_what_is_right(lora_fused, nothing_runs, backend):
    with pytest.raises(AssertionError, match="a kernel ran"):
        lora_fused.lora_linear(**tensors(), scaling=1.0, backend=backend)


WRONG_SHAPES = (
    ("x", (5, 31), r"last dimension 31 \(shape \(5, 31\)\), expected 32"),
    ("x", (), r"shape \(\), expected at least one dimension"),
    ("weight", (16,), r"shape \(16,\), expected \[N, K\]"),
    ("weight", (2, 16, 32), r"shape \(2, 16, 32\), expected \[N, K\]"),
    ("lora_a", (4, 8), r"shape \(4, 8\), expected \[R, 32\]"),
    ("lora_a", (4,), r"shape \(4,\), expected \[R, 32\]"),
    ("lora_a", (0, 32), r"expected \[16, 0\]|expected a rank of at least 1"),
    ("lora_b", (16, 3), r"shape \(16, 3\), expected \[16, 4\]"),
    ("lora_b", (16,), r"shape \(16,\), expected \[16, 4\]"),
    ("bias", (5,), r"shape \(5,\), expected \[16\]"),
    ("bias", (16, 1), r"shape \(16, 1\), expected \[16\]"),
    ("lora_bias", (1,), r"shape \(1,\), expected \[16\]"),
    ("magnitude", (15,), r"shape \(15,\), expected \[16\]"),
    ("magnitude", (1, 16), r"shape \(1, 16\), expected \[16\]"),
)


@pytest.mark.parametrize("name,shape,message", WRONG_SHAPES, ids=str)
def test_wrong_shapes(lora_fused, nothing_runs, name, shape, message):
    given = tensors(*(() if name in REQUIRED else (name,))) | {name: torch.randn(shape)}
    named = "lora_b" if name == "lora_a" and shape == (0, 32) else name
    with pytest.raises(ValueError, match=f"^{named}: .*({message})"):
        lora_fused.lora_linear(**given, scaling=1.0)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", (torch.int64, torch.bool, torch.complex64), ids=str)
def test_wrong_dtypes(lora_fused, nothing_runs, name, dtype):
    given = tensors(*(() if name in REQUIRED else (name,)))
    with pytest.raises(TypeError, match=f"^{name}: dtype {dtype}, expected one of torch.float32"):
        lora_fused.lora_linear(**given | {name: given[name].to(dtype)}, scaling=1.0)


@pytest.mark.parametrize("name", SHAPES)
def test_not_a_tensor(lora_fused, nothing_runs, name):
    given = tensors(*(() if name in REQUIRED else (name,)))
    with pytest.raises(TypeError, match=f"^{name}: list, expected a torch.Tensor"):
        lora_fused.lora_linear(**given | {name: [1.0]}, scaling=1.0)


@pytest.mark.parametrize("name", SHAPES)
def test_wrong_devices(lora_fused, nothing_runs, name):
    given = tensors(*(() if name in REQUIRED else (name,)))
    moved = given | {name: given[name].to(OTHER_DEVICE)}
    named = "lora_a" if name == "weight" else name
    with pytest.raises(ValueError, match=f"^{named}: on {moved[named].device}, expected {moved['weight'].device}"):
        lora_fused.lora_linear(**moved, scaling=1.0)


def test_x_and_weight_of_two_dtypes(lora_fused, nothing_runs):
    given = tensors()
    with pytest.raises(TypeError, match="^weight: dtype torch.float16, expected torch.float32 as x has"):
        lora_fused.lora_linear(**given | {"weight": given["weight"].half()}, scaling=1.0)
    with torch.autocast(DEVICE, dtype=torch.bfloat16), pytest.raises(TypeError, match="float64"):
        lora_fused.lora_linear(**given | {"x": given["x"].double()}, scaling=1.0)


@pytest.mark.parametrize("scaling", (math.nan, math.inf, "1", None, torch.tensor(1.0)), ids=str)
def test_wrong_scaling(lora_fused, nothing_runs, scaling):
    with pytest.raises(TypeError, match="^scaling: .*expected a finite number"):
        lora_fused.lora_linear(**tensors(), scaling=scaling)


@pytest.mark.parametrize("dropout", (-0.1, 1.5, math.nan), ids=str)
def test_wrong_dropout(lora_fused, nothing_runs, dropout):
    with pytest.raises(ValueError, match="^dropout: .*expected a probability from 0 to 1"):
        lora_fused.lora_linear(**tensors(), scaling=1.0, dropout=dropout)


def test_what_does_not_go_together(lora_fused, nothing_runs):
    given = tensors("lora_bias", "magnitude")
    with pytest.raises(ValueError, match="^lora_bias: given with a magnitude"):
        lora_fused.lora_linear(**given, scaling=1.0)
    with pytest.raises(ValueError, match="^lora_a and lora_b: one is None"):
        lora_fused.lora_linear(**tensors() | {"lora_a": None}, scaling=1.0)
    alone = lora_fused.Operands(given["weight"], magnitude=given["magnitude"])
    with pytest.raises(ValueError, match="^magnitude: given without lora_a and lora_b"):
        lora_fused.lora_linear_group(given["x"], [lora_fused.Projection(alone)])
    with pytest.raises(ValueError, match="^projections: empty"):
        lora_fused.lora_linear_group(given["x"], [])


def test_every_member_of_a_group_is_checked(lora_fused, nothing_runs):
    given = tensors()
    x, operands = given.pop("x"), lora_fused.Operands(**given)
    wrong = operands._replace(lora_b=torch.randn(16, 3))
    with pytest.raises(ValueError, match="^lora_b: "):
        lora_fused.lora_linear_group(x, [lora_fused.Projection(operands), lora_fused.Projection(wrong)])


def test_row_norm(lora_fused):
    weight, lora_a, lora_b = torch.randn(16, 32), torch.randn(4, 32), torch.randn(16, 4)
    with pytest.raises(ValueError, match="^lora_a: "):
        lora_fused.row_norm(weight, lora_a[:, :8], lora_b, 1.0)
    with pytest.raises(TypeError, match="^weight: dtype torch.int64"):
        lora_fused.row_norm(weight.long(), lora_a, lora_b, 1.0)


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize("config", ((), ("bias",), ("lora_bias",), ("magnitude",)), ids=str)
@pytest.mark.parametrize("lead", ((0,), (0, 3), (3, 0)), ids=str)
def test_an_empty_batch_just_works(lora_fused, backend, config, lead):
    given = {name: t.requires_grad_() for name, t in tensors(*config).items()}
    given["x"] = torch.randn(*lead, 32, requires_grad=True)
    y = lora_fused.lora_linear(**given, scaling=1.0, dropout=0.3, backend=backend)
    assert y.shape == (*lead, 16)
    y.sum().backward()
    assert given["x"].grad.shape == (*lead, 32)
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in given.values())


def test_a_layer_s_bad_input_is_peft_s_error(lora_fused):
    """The same type and text, and nothing about the model or its groups has changed."""
    model, x = heads(torch.float32), torch.randn(5, 32)
    ours = learned(lora_fused, model, x)
    ours.zero_grad()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    for wrong in (torch.randn(5, 31), torch.randint(0, 9, (5, 32)), torch.randn(5, 32).double()):
        with pytest.raises(RuntimeError) as theirs:
            inner(model)(wrong)
        with pytest.raises(RuntimeError) as mine:
            inner(ours)(wrong)
        assert str(mine.value) == str(theirs.value)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    assert all(p.grad is None for p in ours.parameters())
    result = step(ours, x)
    assert fused_functions(result[0]) == 1
    torch.testing.assert_close(result[0], step(model, x)[0])


def test_an_empty_batch_through_a_group(lora_fused):
    model, x = heads(use_dora=True, bias="all"), torch.randn(0, 3, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    result = step(ours, x)
    assert fused_functions(result[0]) == 1
    assert_same(result, step(model, x))


def test_a_bias_of_another_dtype(lora_fused):
    """A half-precision base with a float32 bias: PEFT refuses it, so do we, in its words."""
    model, layer = peft_linear(Case((5,), 32, 16, 4, bias=True), torch.bfloat16, torch.float32)
    layer.base_layer.bias.data = layer.base_layer.bias.data.float()
    ours, x = kernelize_in_place(lora_fused, copy.deepcopy(model)), torch.randn(5, 32).bfloat16()
    with pytest.raises(RuntimeError) as theirs:
        model(x)
    with pytest.raises(RuntimeError) as mine:
        ours(x)
    assert str(mine.value) == str(theirs.value)
