"""What a group's graph keeps between backward calls of its outputs, and until when."""

import copy
import functools
import weakref

import pytest
import torch
from helpers.backward_calls import backward, features, outputs, pair
from helpers.cases import DEVICE, peft_llama
from helpers.heads import NAMES
from helpers.kernelizing import kernelized
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.fixture
def pair_of(lora_fused, group_function):
    return functools.partial(pair, lora_fused, group_function)


def unpacked_by(refs):
    """Hooks that give back copies, which `refs` refers to."""

    def unpack(tensor):
        tensor = tensor.clone()
        refs.append(weakref.ref(tensor))
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack)


def trained_by(y):
    """How many parameters the node behind y has a gradient for."""
    return sum(node is not None and "AccumulateGrad" in node.name() for node, _ in y.grad_fn.next_functions)


def alive(refs):
    assert refs
    return sum(ref() is not None for ref in refs)


def test_what_is_left_goes_with_the_graph(pair_of):
    """Whether it was used or not."""
    _, ours = pair_of("dora")
    for used in (("q",), ("q", "k"), ("q", "v", "k")):
        refs = []
        with unpacked_by(refs):
            ys = dict(zip(NAMES, outputs(ours, features())))
        for name in used:
            backward(ys[name])
        assert (alive(refs) > 0) == (len(used) < 3)
        del ys
        assert alive(refs) == 0


def test_steps_whose_other_backward_calls_never_come(pair_of):
    """Each keeps what it saved until the next step's outputs take the place of its own."""
    _, ours = pair_of("dora")
    counts, refs = [], []
    for _ in range(5):
        with unpacked_by(refs):
            ys = outputs(ours, features())
        backward(ys[0])
        copy.deepcopy(ours)
        counts.append(alive(refs))
    assert counts[0] > 0 and counts == counts[:1] * 5


@pytest.mark.parametrize("names", (["q"], ["q", "k"]), ids="+".join)
def test_nothing_is_left_for_results_that_nobody_was_given(pair_of, names):
    """Siblings that are not called: their results are computed ahead, and the graph is held by what is there."""
    _, ours = pair_of("lora")
    refs = []
    with unpacked_by(refs):
        ys = outputs(ours, x := features(), names)
    sum(y.sum() for y in ys).backward()
    assert alive(refs) == 0
    (v,) = outputs(ours, x, ["v"])
    assert v.grad_fn is not ys[0].grad_fn


def test_nothing_is_left_where_all_outputs_are_used(pair_of):
    _, ours = pair_of("lora")
    refs = []
    with unpacked_by(refs):
        ys = outputs(ours, features())
    torch.autograd.backward([y.sum() for y in ys])
    assert alive(refs) == 0


def test_a_functional_group(lora_fused, group_function):
    """All its outputs are given to the caller."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    operands = [(draw(n, 32), draw(3, 32).requires_grad_(), draw(n, 3).requires_grad_()) for n in (5, 7)]
    x = draw(4, 32).requires_grad_()
    projections = [lora_fused.Projection(lora_fused.Operands(w, None, a, b), 0.5) for w, a, b in operands]
    ys = lora_fused.lora_linear_group(x, projections)
    for y in ys:
        y.square().sum().backward()
    leaves = [x, *(tensor for _, a, b in operands for tensor in (a, b))]
    expected = torch.autograd.grad(sum((x @ (w + 0.5 * b @ a).t()).square().sum() for w, a, b in operands), leaves)
    for tensor, grad in zip(leaves, expected):
        torch.testing.assert_close(tensor.grad, grad)
    with pytest.raises(RuntimeError, match="a second time"):
        ys[0].sum().backward()


def test_a_gated_mlp_has_one_graph(lora_fused):
    """And one output: a second backward call raises, as through any module."""
    model = kernelized(lora_fused, peft_llama(torch.float64))
    mlp = model.base_model.model.model.layers[0].mlp
    y = mlp(torch.randn(3, 64, dtype=torch.float64))
    assert "Gated" in y.grad_fn.name()
    y.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        y.sum().backward()


@pytest.mark.parametrize("reached", (("q",), ("q", "v")), ids="+".join)
def test_a_leader_waits_for_what_a_checkpoint_may_recompute(pair_of, reached):
    """Whatever else runs in between, another group among it: torch refuses a recomputation that saves something
    else."""
    _, ours = pair_of("dropout")
    ys = checkpoint(lambda x: tuple(y.square() for y in outputs(ours, x)), features(), use_reentrant=False)
    ys = dict(zip(NAMES, ys))
    for name in reached:
        ys.pop(name).sum().backward()
        for _ in range(2):
            outputs(ours, features(), ("q", "v"))
    for y in ys.values():
        y.sum().backward()
    for _ in range(3):
        q, v = outputs(ours, features(), ("q", "v"))
    assert q.grad_fn is v.grad_fn and trained_by(q) == 4


@pytest.mark.parametrize("retain_graph", (False, True))
def test_a_leader_does_not_wait_for_other_graphs(pair_of, retain_graph):
    """Which are held here, while v is called no more: it leaves the group."""
    _, ours = pair_of("dropout")
    held = outputs(ours, features())
    backward(held[0], retain_graph=retain_graph)
    for _ in range(3):
        held.append(outputs(ours, features(), ("q", "k")))
        backward(held[-1][0], retain_graph=retain_graph)
    q, k = held[-1]
    assert q.grad_fn is k.grad_fn and trained_by(q) == 4
