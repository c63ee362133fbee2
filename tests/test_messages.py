"""What an error says: the tensor or the module, what was seen and what to do, and nothing of C++."""

import copy
import math
import re
import warnings

import pytest
import torch
from helpers.cases import DEVICE, Case, peft_linear
from helpers.embeddings import Case as EmbeddingCase, peft_embedding
from helpers.heads import inner
from helpers.kernelizing import kernelized
from helpers.mlps import glu
from torch import nn

pytestmark = pytest.mark.usefixtures("on_device")
INTERNAL = re.compile(
    r"aoti_|API call failed|kernel-src|torch_binding|\.cpp\b(?<!alloc_cpu\.cpp)|\.cuh?\b|\.h:\d|_lora_fused_"
)


def assert_plain(error):
    """Of the error and of those that its traceback would show."""
    while error is not None:
        assert not INTERNAL.search(str(error)), str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_the_pattern_finds_what_it_is_for():
    for text in (
        "aoti_torch_cpu_addmm_out(out.get(), alpha) API call failed at kernel-src/group/products.cpp, line 27",
        "check_dropout, kernel-src/cpu/../common/dropout.h:92, dropout: p is 1.5, expected 0 to 1",
        "_lora_fused_cpu_53c736a::row_norm() Expected a value of type 'float'",
    ):
        assert INTERNAL.search(text)
    assert not INTERNAL.search("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


# A PEFT linear of K=32, N=16, R=4 in a bad state, and what is to be seen of the kernelized one.
BAD_LAYERS = {
    "bias": lambda layer: setattr(layer.base_layer, "bias", parameter(5)),
    "bias of one": lambda layer: setattr(layer.base_layer, "bias", parameter(1)),
    "bias as a row": lambda layer: setattr(layer.base_layer, "bias", parameter(1, 16)),
    "weight": lambda layer: setattr(layer.base_layer, "weight", parameter(16, 31)),
    "weight as a vector": lambda layer: setattr(layer.base_layer, "weight", parameter(16)),
    "A": lambda layer: setattr(layer.lora_A["default"], "weight", parameter(4, 31)),
    "A of another rank": lambda layer: setattr(layer.lora_A["default"], "weight", parameter(3, 32)),
    "A as a vector": lambda layer: setattr(layer.lora_A["default"], "weight", parameter(32)),
    "B": lambda layer: setattr(layer.lora_B["default"], "weight", parameter(15, 4)),
    "B in three dimensions": lambda layer: setattr(layer.lora_B["default"], "weight", parameter(16, 4, 1)),
    "b_B": lambda layer: setattr(layer.lora_B["default"], "bias", parameter(3)),
    "b_B of one": lambda layer: setattr(layer.lora_B["default"], "bias", parameter(1)),
    "probability": lambda layer: setattr(layer.lora_dropout["default"], "p", 1.5),
    "negative probability": lambda layer: setattr(layer.lora_dropout["default"], "p", -0.1),
    "probability that is none": lambda layer: setattr(layer.lora_dropout["default"], "p", math.nan),
}
BAD_MAGNITUDES = {
    "magnitude": lambda layer: setattr(layer.lora_magnitude_vector["default"], "weight", parameter(3)),
    "magnitude of one": lambda layer: setattr(layer.lora_magnitude_vector["default"], "weight", parameter(1)),
    "bias under DoRA": BAD_LAYERS["bias of one"],
}


def outcome(call):
    try:
        return call().detach()
    except Exception as error:
        assert_plain(error)
        return type(error), str(error)


def assert_like_peft(ours, theirs, x):
    results = []
    for each in (ours, theirs):
        torch.manual_seed(1)
        results.append(outcome(lambda: each(x)))
    mine, right = results
    if isinstance(right, tuple):
        assert mine == right
    else:
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("case", (*BAD_LAYERS, *BAD_MAGNITUDES))
def test_a_layer_in_a_bad_state(lora_fused, case, training):
    """PEFT's own error, or PEFT's own result where it takes it."""
    dora = case in BAD_MAGNITUDES
    config = dict(use_dora=True) if dora else dict(lora_bias="b_B" in case, lora_dropout=0.2 * ("probability" in case))
    model, layer = peft_linear(Case((5,), 32, 16, 4, bias=True), torch.float32, torch.float32, **config)
    (BAD_MAGNITUDES if dora else BAD_LAYERS)[case](layer)
    model.train(training)
    ours = kernelized(lora_fused, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (row,) = lora_fused.explain(ours)
    assert not row.fused, row.reason
    assert_like_peft(inner(ours), inner(model), torch.randn(5, 32))


@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
def test_a_gated_mlp_in_a_bad_state(lora_fused, dora):
    for part, name, shape in (("w1", "bias", 5), ("w2", "bias", 1), ("w3", "weight", (48, 31))):
        model = glu(torch.float32, use_dora=dora, targets=("w1", "w2"))
        layer = getattr(inner(model).mlp, part)
        setattr(getattr(layer, "base_layer", layer), name, nn.Parameter(torch.randn(shape)))
        ours = kernelized(lora_fused, model)
        assert_like_peft(inner(ours), inner(model), torch.randn(5, 32))


@pytest.mark.parametrize("shape", ((3,), (1,), (1, 24)), ids=str)
def test_an_embedding_in_a_bad_state(lora_fused, shape):
    model = peft_embedding(EmbeddingCase((4,), 33, 24, 5), dora=True, device=DEVICE)
    model.base_model.model.table.lora_magnitude_vector["default"].weight = parameter(*shape)
    ours = kernelized(lora_fused, model)
    assert_like_peft(ours, model, torch.randint(0, 33, (4,)))


def good():
    return dict(
        x=torch.randn(5, 32),
        weight=torch.randn(16, 32),
        lora_a=torch.randn(4, 32),
        lora_b=torch.randn(16, 4),
        scaling=1.0,
    )


# Of `lora_linear`: what is given in place of what, and the name that the error begins with.
BAD_INPUTS = [
    (dict(bias=torch.ones(5)), "bias"),
    (dict(bias=torch.ones(1)), "bias"),
    (dict(lora_bias=torch.ones(3)), "lora_bias"),
    (dict(magnitude=torch.ones(3)), "magnitude"),
    (dict(magnitude=torch.ones(16, 1)), "magnitude"),
    (dict(lora_a=torch.ones(4, 31)), "lora_a"),
    (dict(lora_b=torch.ones(15, 4)), "lora_b"),
    (dict(weight=torch.ones(16, 31)), "lora_a"),
    (dict(weight=torch.ones(15, 32)), "lora_b"),
    (dict(weight=torch.ones(16)), "weight"),
    (dict(x=torch.ones(5, 31)), "x"),
    (dict(dropout=1.5), "dropout"),
    (dict(dropout=-0.5), "dropout"),
    (dict(dropout=math.nan), "dropout"),
    (dict(dropout=None), "dropout"),
    (dict(dropout="0.1"), "dropout"),
    (dict(scaling="2"), "scaling"),
    (dict(scaling=None), "scaling"),
    (dict(backend="cutlass"), "backend"),
]  # fmt: skip


@pytest.mark.parametrize(
    "change,name", BAD_INPUTS, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_bad_input_of_lora_linear(lora_fused, change, name):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: .*(expected|unknown)") as raised:
        lora_fused.lora_linear(**good() | change)
    assert_plain(raised.value)


def test_what_a_misfit_was_held_against(lora_fused):
    for change in (dict(lora_a=torch.ones(4, 31)), dict(lora_b=torch.ones(15, 4)), dict(bias=torch.ones(5))):
        with pytest.raises(ValueError, match=r"for weight of shape \(16, 32\)$"):
            lora_fused.lora_linear(**good() | change)


def test_bad_input_of_the_others(lora_fused):
    given = good()
    x, scaling = given.pop("x"), given.pop("scaling")
    operands = lora_fused.Operands(**given)
    calls = (
        ("projections", lambda: lora_fused.lora_linear_group(x, [operands])),
        ("scaling", lambda: lora_fused.row_norm(*[given[n] for n in ("weight", "lora_a", "lora_b")], "1")),
        ("padding_idx", lambda: lora_fused.lora_embedding(
            torch.tensor([1]), torch.ones(33, 24), torch.ones(5, 33), torch.ones(24, 5), scaling, padding_idx=1.5)),
        ("magnitude", lambda: lora_fused.lora_embedding(
            torch.tensor([1]), torch.ones(33, 24), torch.ones(5, 33), torch.ones(24, 5), scaling,
            magnitude=torch.ones(3))),
    )  # fmt: skip
    for name, call in calls:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: ") as raised:
            call()
        assert_plain(raised.value)


@pytest.mark.parametrize("rows", (-1, 1.5, "8", None, True, float("nan")), ids=str)
def test_rows_of_explain(lora_fused, rows):
    model = kernelized(lora_fused, peft_linear(Case((5,), 32, 16, 4), torch.float32, torch.float32)[0])
    with pytest.raises(ValueError if rows == -1 else TypeError, match="^rows: .*expected"):
        lora_fused.explain(model, rows=rows)
    assert len(lora_fused.explain(model, rows=0)) == 1


CONFIGS = ({}, dict(use_dora=True), dict(lora_dropout=0.3))


@pytest.mark.parametrize("config", CONFIGS, ids=("lora", "dora", "dropout"))
def test_gradients_of_gradients(lora_fused, config):
    """The error comes with the second differentiation, and says whose it is; first gradients are right until then."""
    model, _ = peft_linear(Case((5,), 32, 16, 4), torch.float32, torch.float32, **config)
    gated = glu(torch.float32, **config)
    for each in (model, gated):
        ours, x = kernelized(lora_fused, each), torch.randn(5, 32, requires_grad=True)
        torch.manual_seed(1)
        y = inner(ours)(x)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        torch.manual_seed(1)
        (again,) = torch.autograd.grad(inner(ours)(x).square().sum(), x)
        assert torch.equal(first.detach(), again)
        with pytest.raises(RuntimeError, match="^lora_fused: gradients of gradients .*without kernelize") as raised:
            first.square().sum().backward()
        assert_plain(raised.value)


def test_a_graph_that_nobody_differentiates_again(lora_fused):
    """create_graph=True alone, as some optimizers ask for."""
    given = {name: t for name, t in good().items() if name != "scaling"}
    given["lora_b"].requires_grad_()
    y = lora_fused.lora_linear(**given, scaling=1.0)
    (once,) = torch.autograd.grad(y, given["lora_b"], torch.ones_like(y), retain_graph=True)
    (grad,) = torch.autograd.grad(y, given["lora_b"], torch.ones_like(y), create_graph=True)
    assert torch.equal(grad, once)


def test_a_penalty_on_a_gradient_is_not_lost(lora_fused):
    """The incoming gradient, of a sum, needs none itself, and the loss reaches the parameters another way as well."""
    given = {name: t for name, t in good().items() if name != "scaling"}
    x = given["x"].requires_grad_()
    given["lora_a"].requires_grad_(), given["lora_b"].requires_grad_()
    y = lora_fused.lora_linear(**given, scaling=1.0)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        (y.square().mean() + dx.square().sum()).backward()


@pytest.mark.skipif(DEVICE == "cuda", reason="of the CPU's allocator")
def test_no_memory(lora_fused):
    """In the allocator's own words, by which tools choose smaller batches."""
    x, weight, b = torch.randn(2**21, 1), torch.randn(2**21, 1), torch.randn(2**21, 1)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory") as raised:
        lora_fused.lora_linear(x, weight, torch.randn(1, 1), b, 1.0)
    assert_plain(raised.value)


@pytest.mark.skipif(DEVICE != "cuda", reason="of a GPU's allocator")
def test_no_memory_on_a_gpu(lora_fused):
    x, weight, b = torch.randn(2**21, 8).half(), torch.randn(2**21, 8).half(), torch.randn(2**21, 8).half()
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as raised:
        lora_fused.lora_linear(x, weight, torch.randn(8, 8).half(), b, 1.0)
    assert_plain(raised.value)


FAILURES = {
    "check": ("check_dropout, kernel-src/cpu/../common/dropout.h:92, dropout: p is 1.5, expected 0 to 1",
              "dropout: p is 1.5, expected 0 to 1"),
    "allocation": ("aoti_torch_empty_strided(n, sizes.data(), &handle) API call failed at "
                   "kernel-src/common/tensors.cpp, line 97",
                   "lora_fused: DefaultCPUAllocator: can't allocate memory"),
    "product": ("aoti_torch_cpu_addmm_out(out.get(), alpha) API call failed at kernel-src/group/products.cpp, line 27",
                "lora_fused: operands do not fit"),
    "torch's own": ("mat1 and mat2 shapes cannot be multiplied", "mat1 and mat2 shapes cannot be multiplied"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_where_torch_does_not_tell_the_cause(lora_fused, monkeypatch, case):
    """As before torch 2.13."""
    monkeypatch.setattr(lora_fused.backends.native_errors, "_cause", lambda: "")
    given, said = FAILURES[case]
    error = lora_fused.backends.native_errors.native_error(
        RuntimeError(given), (torch.zeros(1, device="cpu"), None, [3])
    )
    assert str(error).startswith(said)
    assert_plain(error)


def test_a_gpu_s_memory_in_its_own_type(lora_fused, monkeypatch):
    monkeypatch.setattr(
        lora_fused.backends.native_errors, "_cause", lambda: "CUDA out of memory. Tried to allocate 2 GiB"
    )
    error = lora_fused.backends.native_errors.native_error(RuntimeError(FAILURES["allocation"][0]), ())
    assert type(error) is torch.OutOfMemoryError and str(error) == "CUDA out of memory. Tried to allocate 2 GiB"


def test_a_check_of_an_op_reaches_nobody_with_its_path(lora_fused):
    """Every op that Python calls, given what only C++ refuses."""
    mask = lora_fused.specs.Mask(torch.tensor([1]), 1.5)
    ones = torch.ones(4, 4)
    calls = (
        lambda: lora_fused.backends.native.dropout(ones, mask, torch.float32),
        lambda: lora_fused.backends.native.mag_norm_scale(torch.ones(3), torch.ones(4)),
        lambda: lora_fused.backends.native.row_norm(ones, ones[:, :2], ones, 1.0),
        lambda: lora_fused.backends.native.dequantize_4bit(ones, ones, None, None, None, 3, 0, False, 0, ones),
        lambda: lora_fused.backends.native.lora_forward(
            ones, [ones, torch.ones(3), ones, ones, None, None], [1.0], None, None, None, False),
        lambda: lora_fused.backends.native.lora_forward(
            ones, [ones, None, ones, ones, None, None], [1.0], None, None, [9] * 7, False),
        lambda: lora_fused.backends.native.lora_forward(ones, [ones, None], [1.0], None, None, None, False),
        lambda: lora_fused.backends.native.lora_forward(ones, [None] * 6, [1.0], None, None, None, False),
        lambda: lora_fused.backends.native.lora_forward(ones, [ones, *[None] * 5], [1.0], None, [], None, False),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(RuntimeError) as raised:
            call()
        assert_plain(raised.value)


def test_nothing_is_left_behind_by_an_error(lora_fused):
    model, layer = peft_linear(Case((5,), 32, 16, 4, bias=True), torch.float32, torch.float32)
    ours, x = kernelized(lora_fused, copy.deepcopy(model)), torch.randn(5, 32)
    right, own = inner(ours)(x).detach(), inner(ours).proj.base_layer.bias
    inner(ours).proj.base_layer.bias = parameter(5)
    with pytest.raises(RuntimeError):
        inner(ours)(x)
    inner(ours).proj.base_layer.bias = own
    assert torch.equal(inner(ours)(x), right)
