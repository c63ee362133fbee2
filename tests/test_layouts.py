"""Tensors that are not dense: PEFT's own forward in the layers, in every way like PEFT's, and a named error in the
functional API."""

import copy
import warnings

import pytest
import torch
from helpers.cases import Case, peft_linear
from helpers.embeddings import Case as EmbeddingCase, peft_embedding
from helpers.heads import NAMES, heads, inner
from helpers.kernelizing import kernelized
from helpers.mlps import glu
from torch import nn

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    pytest.mark.filterwarnings("ignore:Sparse"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested"),
]

LAYOUTS = {
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
    "bsr": lambda x: x.to_sparse_bsr((1, 2)),
    "bsc": lambda x: x.to_sparse_bsc((1, 2)),
    "nested": lambda x: torch.nested.nested_tensor([x, x[:2]]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
}
if torch.backends.mkldnn.is_available() and not torch.cuda.is_available():
    LAYOUTS["mkldnn"] = lambda x: x.to_mkldnn()
# In which torch's products on a CPU take an input, so that PEFT gives a result.
TAKEN = () if torch.cuda.is_available() else ("coo", "csr", "csc")


def outcome(call):
    """What a call gives, as dense parts, or the type and text of its error."""
    try:
        y = call()
    except Exception as error:
        return type(error), str(error)
    if y.is_nested:
        return [part.detach() for part in y.unbind()]
    return [(y if y.layout is torch.strided else y.to_dense()).detach()]


def assert_like_peft(ours, theirs, what, rtol=0.0):
    mine, right = outcome(ours), outcome(theirs)
    assert type(mine) is type(right), f"{what}: {mine}, PEFT {right}"
    if isinstance(right, tuple):
        assert mine == right, what
        return False
    for part, truth in zip(mine, right, strict=True):
        torch.testing.assert_close(part, truth, rtol=rtol, atol=rtol, msg=what)
    return True


def draw(k, dtype=torch.float32):
    x = torch.randn(4, k).relu()
    return x.to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("config", ({}, dict(use_dora=True), dict(lora_dropout=0.3)), ids=("lora", "dora", "dropout"))
def test_a_linear(lora_fused, layout, training, config):
    model, _ = peft_linear(Case((4,), 32, 16, 4, bias=True), torch.float32, torch.float32, **config)
    model.train(training)
    ours, x = kernelized(lora_fused, model), LAYOUTS[layout](draw(32))

    def of(each):
        def call():
            torch.manual_seed(3)
            with torch.set_grad_enabled(training):
                return inner(each)(x)

        return call

    works = assert_like_peft(of(ours), of(model), layout)
    assert works or layout not in TAKEN or ("lora_dropout" in config and training) or "use_dora" in config
    state = lora_fused.peft.linear.read_linear(inner(ours).proj)
    reason = lora_fused.peft.linear_call.call_fallback(state, x, lora_fused.call_context.CallContext.of(x)).reason
    assert reason in (f"x has the layout {x.layout}", "x is nested", "x is a NestedTensor")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_siblings(lora_fused, layout):
    """Also where a group has been seen, and dense calls are fused again afterwards."""
    model, dense = heads(torch.float32), draw(32)
    ours, x = kernelized(lora_fused, model), LAYOUTS[layout](dense)
    inner(ours)(dense), inner(ours)(dense)
    for name in NAMES:
        assert_like_peft(lambda: getattr(inner(ours), name)(x), lambda: getattr(inner(model), name)(x), name)
    y = inner(ours)(dense)
    assert "NativeGroupFunction" in str(y.grad_fn.next_functions)
    torch.testing.assert_close(y, inner(model)(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gated_mlp(lora_fused, layout):
    model = glu(torch.float32)
    ours, x = kernelized(lora_fused, model), LAYOUTS[layout](draw(32))
    works = assert_like_peft(lambda: inner(ours)(x), lambda: inner(model)(x), layout, 1e-5)  # down's input is dense
    assert works or layout not in TAKEN


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
def test_the_ids_of_an_embedding(lora_fused, layout, dora):
    model = peft_embedding(EmbeddingCase((4, 6), 33, 24, 5), dora=dora, device=torch.get_default_device().type)
    ours = kernelized(lora_fused, model)
    try:
        ids = LAYOUTS[layout](torch.randint(0, 33, (4, 6)))
    except RuntimeError:
        pytest.skip("no integers in this layout")
    assert_like_peft(lambda: ours(ids), lambda: model(ids), layout)


@pytest.mark.parametrize("layout", ("coo", "csr", "csc", "nested"))
@pytest.mark.parametrize("which", ("base_layer", "lora_A", "lora_B"))
@pytest.mark.parametrize("dora", (False, True), ids=("lora", "dora"))
def test_a_parameter(lora_fused, layout, which, dora):
    model, layer = peft_linear(Case((4,), 32, 16, 4), torch.float32, torch.float32, use_dora=dora)
    part = layer.base_layer if which == "base_layer" else getattr(layer, which)["default"]
    part.weight = nn.Parameter(LAYOUTS[layout](part.weight.data), requires_grad=False)
    ours = copy.copy(model)  # a deep copy of a nested parameter is refused
    x = draw(32)
    right = outcome(lambda: inner(model)(x))
    lora_fused.register_peft_layers()
    from kernels import Mode, kernelize

    kernelize(model, mode=Mode.TRAINING, device=x.device.type)
    assert_like_peft(lambda: inner(ours)(x), lambda: _again(right), which)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (row,) = lora_fused.explain(model)
    assert not row.fused and ("layout" in row.reason or "cannot be read" in row.reason), row.reason


def _again(right):
    """What was found before, as a call gives it."""
    if isinstance(right, tuple):
        raise right[0](right[1])
    return right[0]


FUNCTIONAL = dict(
    x=(6, 32), weight=(16, 32), lora_a=(4, 32), lora_b=(16, 4), bias=(16,), lora_bias=(16,), magnitude=(16,)
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_the_functional_api_names_the_tensor(lora_fused, layout, name):
    given = {
        each: torch.randn(shape) for each, shape in FUNCTIONAL.items()
        if each in ("x", "weight", "lora_a", "lora_b", name)
    }  # fmt: skip
    if given[name].dim() == 1 and layout in ("csr", "csc", "bsr", "bsc"):
        pytest.skip("no vectors in this layout")
    given[name] = LAYOUTS[layout](given[name])
    with pytest.raises(TypeError, match=f"^{name}: (nested|layout torch.*), expected a dense tensor"):
        lora_fused.lora_linear(**given, scaling=1.0)
    if name in ("weight", "lora_a", "lora_b"):
        with pytest.raises(TypeError, match=f"^{name}: (nested|layout torch.*), expected a dense tensor"):
            lora_fused.row_norm(given["weight"], given["lora_a"], given["lora_b"], 1.0)


@pytest.mark.parametrize("layout", ("coo", "csr", "nested"))
@pytest.mark.parametrize("name", ("ids", "weight", "lora_a", "lora_b"))
def test_the_functional_embedding_names_the_tensor(lora_fused, layout, name):
    given = dict(
        ids=torch.randint(0, 33, (4, 6)),
        weight=torch.randn(33, 24),
        lora_a=torch.randn(5, 33),
        lora_b=torch.randn(24, 5),
    )
    given[name] = LAYOUTS[layout](given[name])
    with pytest.raises(TypeError, match=f"^{name}: (nested|layout torch.*), expected a dense tensor"):
        lora_fused.lora_embedding(**given, scaling=1.0)
