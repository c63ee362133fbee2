"""Siblings differentiated by backward calls of their own: PEFT has a graph each, a group has one node. Whatever PEFT
does, the group does: the same gradients, or the same kind of error."""

import copy
import functools

import pytest
import torch
from helpers import quantized
from helpers.backward_calls import CASES, CONFIGS, X, backward, change, leaf, lora_a, outputs, pair
from helpers.cases import DEVICE

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.fixture
def pair_of(lora_fused, group_function):
    return functools.partial(pair, lora_fused, group_function)


# A sibling whose result was given back runs alone, with a mask of another draw.
RUN_ALONE = ("between the calls", "between two calls")
KINDS = ("a second time", "modified by an inplace operation", "not have been used in the graph")


# PEFT saves a dropped copy of x, a group x itself.
OF_X = ("x changed", "frozen x changed")
# Saved tensors that are not read may have changed, where torch unpacks one by one.
OF_OTHERS = (
    "weight changed, frozen x",
    "own A changed, frozen x",
    "step of one while kept",
    "step of one, then used",
    "changed before the first",
    "changed before the first, then used",
)
UNPACKS = hasattr(torch._C._autograd.SavedTensor, "unpack")


def result_of(case, model):
    """Every gradient, or the kind of the error."""
    torch.manual_seed(5)
    try:
        extra = case(model) or []
    except RuntimeError as error:
        kinds = [kind for kind in KINDS if kind in str(error)]
        assert kinds, str(error)
        return kinds[0]
    return [*extra, *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_alike(ours, theirs):
    if isinstance(theirs, str) or isinstance(ours, str):
        assert ours == theirs
        return
    assert len(ours) == len(theirs) and any(grad is not None for grad in theirs)
    for grad, expected in zip(ours, theirs):
        assert (grad is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", CASES)
def test_as_graphs_of_their_own(pair_of, name, config):
    model, ours = pair_of(config)
    dropped = "lora_dropout" in CONFIGS[config]
    if dropped and name in RUN_ALONE:
        pytest.skip("PEFT's mask here is that of a group")
    if name in OF_OTHERS and not UNPACKS:
        pytest.skip("torch unpacks all or nothing")
    expected = "modified by an inplace operation" if dropped and name in OF_X else result_of(CASES[name], model)
    assert_alike(result_of(CASES[name], ours), expected)


@pytest.mark.parametrize("config", ({}, dict(use_dora=True)), ids=str)
def test_four_bits(lora_fused, config):
    """Attention of a quantized Llama, mixed with a plain projection: a backward call for each head of it."""
    model, _ = quantized.llama(DEVICE, names=["q_proj", "v_proj"], **config)
    ours = copy.deepcopy(model)
    quantized.fuse(lora_fused, ours, DEVICE)

    def run(each):
        layer = each.base_model.model.model.layers[0].self_attn
        names = ("q_proj", "k_proj", "v_proj")
        x = X[:, :8].reshape(-1, 16).repeat(1, 4).to(DEVICE, torch.float32).requires_grad_()
        ys = [getattr(layer, name)(x) for name in names]
        for y in ys:
            y.square().sum().backward()
        grads = [p.grad.clone() for name in names for p in getattr(layer, name).parameters() if p.requires_grad]
        each.zero_grad()
        return ys, [x.grad, *grads]

    for _ in range(2):
        ys, grads = run(ours)
    assert len({id(y.grad_fn) for y in ys}) == 1
    _, expected = run(model)
    assert len(grads) == len(expected) > 6
    for grad, peft in zip(grads, expected):
        torch.testing.assert_close(grad, peft, rtol=1e-4, atol=1e-4)


def test_the_error_says_what_has_changed(pair_of):
    _, ours = pair_of("lora")
    q, k, v = outputs(ours, leaf())
    backward(q)
    change(lora_a(ours, "v"))
    with pytest.raises(
        RuntimeError, match=r"modified by an inplace operation: \[torch.*DoubleTensor \[4, 32\]\], lora_a of output 2"
    ):
        backward(v)
    backward(k)
