"""Siblings differentiated by backward calls of their own: PEFT has a graph each, a group has one node. Whatever PEFT does,
the group does: the same gradients, or the same kind of error."""

import copy
import functools
import threading
import weakref

import pytest
import torch
from helpers import quantized
from helpers.cases import DEVICE, DrawnDropout, peft_llama
from helpers.heads import NAMES, heads, inner, kernelized
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("on_device")

CONFIGS = {
    "lora": dict(bias="all"),
    "dora": dict(use_dora=True, bias="lora_only"),
    "dropout": dict(lora_dropout=0.4),
    "dora, dropout": dict(use_dora=True, lora_dropout=0.4),
}
X = torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2), device="cpu")


def features():
    return X.to(DEVICE, copy=True)


def leaf():
    return features().requires_grad_()


class Norm(nn.Module):
    """Saves its result as well as its input."""

    def forward(self, x):
        return torch.tanh(nn.functional.layer_norm(x, x.shape[-1:]))


def outputs(model, x, names=NAMES):
    return [getattr(inner(model), name)(x) for name in names]


def backward(y, **options):
    y.square().sum().backward(**options)


def of(model, name):
    return [p for path, p in model.named_parameters() if p.requires_grad and f".{name}." in path]


def each_alone(prepare, between=None, **first):
    """One backward call an output, `between` after the first; gives the gradient of the leaf."""

    def case(model):
        z = leaf()
        x = prepare(z)
        q, k, v = outputs(model, x)
        backward(q, **first)
        if between is not None:
            between(model, x)
        backward(k, **first)
        backward(v)
        return [z.grad]

    return case


def step_of(model, *names):
    torch.optim.AdamW([p for name in names for p in of(model, name)], lr=0.1).step()
    model.zero_grad()


def change(parameter):
    with torch.no_grad():
        parameter.mul_(2.0)


def lora_a(model, name):
    return getattr(inner(model), name).lora_A["default"].weight


def lora_b(model, name):
    return getattr(inner(model), name).lora_B["default"].weight


def one_twice(model):
    q, k, v = outputs(model, features())
    loss = q.square().sum()
    loss.backward()
    backward(k)
    loss.backward()


def kept_once_then_twice(model):
    q, k, v = outputs(model, features())
    loss = q.sum()  # saves nothing
    loss.backward(retain_graph=True)
    loss.backward()
    backward(k)
    loss.backward()


def last_one_twice(model):
    q, k, v = outputs(model, features())
    for y in (v, k, q):
        y.sum().backward()
    q.sum().backward()


def kept_first(model):
    q, k, v = outputs(model, features())
    loss = q.square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    backward(v)
    backward(k)


def kept_in_between(model):
    q, k, v = outputs(model, features())
    backward(q)
    loss = k.sum()
    for _ in range(3):
        loss.backward(retain_graph=True)
    loss.backward()
    backward(v)


def two_and_one(model):
    z = leaf()
    q, k, v = outputs(model, z + 1)
    (q.square().sum() + v.square().sum()).backward()
    backward(k)
    return [z.grad]


def gradients_of_each(model):
    x = Norm()(leaf())
    grads = [torch.autograd.grad(y.square().sum(), of(model, name)) for name, y in zip(NAMES, outputs(model, x))]
    return [grad for each in grads for grad in each]


def gradients_with_unused(model):
    q, k, v = outputs(model, features())
    first = torch.autograd.grad(q.square().sum(), [*of(model, "q"), *of(model, "k")], allow_unused=True)
    second = torch.autograd.grad(k.square().sum(), [*of(model, "v"), *of(model, "k")], allow_unused=True)
    return [*first, *second]


def gradients_of_others(model):
    """q's graph is not run, and is left."""
    q, k, v = outputs(model, features())
    none = torch.autograd.grad(q.sum(), of(model, "k"), allow_unused=True)
    q.sum().backward(inputs=of(model, "v"))
    backward(k)
    q.square().sum().backward()
    return none


def gradients_of_others_not_allowed(model):
    q, k, v = outputs(model, features())
    torch.autograd.grad(q.square().sum(), of(model, "k"))


def inputs_of_each(model):
    ys = outputs(model, features())
    for name, y in zip(NAMES, ys):
        y.square().sum().backward(inputs=of(model, name))


def between_the_calls(model):
    x = features()
    for name in NAMES:
        (y,) = outputs(model, x, [name])
        backward(y)


def between_two_calls(model):
    x = features()
    q, k = outputs(model, x, ["q", "k"])
    backward(k)
    (v,) = outputs(model, x, ["v"])
    backward(v)
    backward(q)


def kept_between_two_calls(model):
    x = features()
    q, k = outputs(model, x, ["q", "k"])
    backward(k, retain_graph=True)
    (v,) = outputs(model, x, ["v"])
    backward(v)
    backward(q)


def step_between(model):
    q, k, v = outputs(model, features())
    backward(q)
    step_of(model, *NAMES)
    backward(v)
    step_of(model, *NAMES)
    backward(k)


def step_of_one_while_kept(model):
    q, k, v = outputs(model, features())
    backward(q, retain_graph=True)
    step_of(model, "q")
    backward(k)
    backward(v)


def step_of_one_then_used(model):
    q, k, v = outputs(model, features())
    backward(q, retain_graph=True)
    step_of(model, "q")
    backward(k)
    q.square().sum().backward()


def changed_before_the_first(model):
    q, k, v = outputs(model, leaf())
    change(lora_a(model, "q"))
    change(lora_b(model, "v"))
    backward(k)


def changed_before_the_first_then_used(model):
    q, k, v = outputs(model, leaf())
    change(lora_b(model, "v"))
    backward(k)
    backward(q)
    backward(v)


def not_differentiated(model):
    q, k, v = outputs(model, features())
    backward(k)
    return [q.detach(), v.detach()]


def in_another_thread(model):
    q, k, v = outputs(model, features())
    failed = []

    def run(y):
        try:
            backward(y)
        except RuntimeError as error:
            failed.append(error)

    for y in (v, q):
        thread = threading.Thread(target=run, args=(y,))
        thread.start()
        thread.join()
    backward(k)
    assert not failed, failed


def under_hooks(hooks):
    def case(model):
        with hooks():
            ys = outputs(model, features())
        for y in ys:
            backward(y)

    return case


def checkpointed(model, **options):
    z = leaf()
    ys = checkpoint(lambda x: tuple(outputs(model, x)), z * 1, use_reentrant=False)
    for y in ys:
        y.sum().backward(**options)
    return [z.grad]


def checkpointed_with_more_inside(model):
    """What saves inside is recomputed in each backward call."""
    ys = checkpoint(lambda x: tuple(y.square() for y in outputs(model, x)), features(), use_reentrant=False)
    for y in ys:
        backward(y)


def reentrant(model):
    z = leaf()
    ys = checkpoint(lambda x: tuple(outputs(model, x)), z * 1, use_reentrant=True)
    for y in ys:
        y.sum().backward(retain_graph=True)
    return [z.grad]


IDENTITY = (lambda t: t, lambda t: t)
CASES = {
    "frozen x": each_alone(lambda z: z.detach()),
    "leaf": each_alone(lambda z: z),
    "view": each_alone(lambda z: z.view(3, 2, 32)),
    "leaf + 1": each_alone(lambda z: z + 1),
    "cast": each_alone(lambda z: z.float().double()),
    "norm": each_alone(Norm()),
    "norm, retained": each_alone(Norm(), retain_graph=True),
    "leaf, retained": each_alone(lambda z: z, retain_graph=True),
    "own B changed": each_alone(lambda z: z.detach(), lambda model, x: change(lora_b(model, "v"))),
    "own A changed": each_alone(lambda z: z, lambda model, x: change(lora_a(model, "v"))),
    "own A changed, frozen x": each_alone(lambda z: z.detach(), lambda model, x: change(lora_a(model, "v"))),
    "weight changed": each_alone(lambda z: z, lambda model, x: change(inner(model).k.base_layer.weight)),
    "weight changed, frozen x": each_alone(
        lambda z: z.detach(), lambda model, x: change(inner(model).k.base_layer.weight)
    ),
    "used one's B changed": each_alone(lambda z: z, lambda model, x: change(lora_b(model, "q"))),
    "x changed": each_alone(lambda z: z + 0, lambda model, x: change(x)),
    "frozen x changed": each_alone(lambda z: z.detach(), lambda model, x: change(x)),
    "one twice": one_twice,
    "kept once then twice": kept_once_then_twice,
    "last one twice": last_one_twice,
    "kept first": kept_first,
    "kept in between": kept_in_between,
    "two and one": two_and_one,
    "gradients of each": gradients_of_each,
    "gradients with unused": gradients_with_unused,
    "gradients of others": gradients_of_others,
    "gradients of others, not allowed": gradients_of_others_not_allowed,
    "inputs of each": inputs_of_each,
    "between the calls": between_the_calls,
    "between two calls": between_two_calls,
    "kept between two calls": kept_between_two_calls,
    "steps between": step_between,
    "step of one while kept": step_of_one_while_kept,
    "step of one, then used": step_of_one_then_used,
    "changed before the first": changed_before_the_first,
    "changed before the first, then used": changed_before_the_first_then_used,
    "not differentiated": not_differentiated,
    "another thread": in_another_thread,
    "save_on_cpu": under_hooks(torch.autograd.graph.save_on_cpu),
    "hooks": under_hooks(lambda: torch.autograd.graph.saved_tensors_hooks(*IDENTITY)),
    "checkpoint": checkpointed,
    "checkpoint, retained": lambda model: checkpointed(model, retain_graph=True),
    "checkpoint with more inside": checkpointed_with_more_inside,
    "reentrant checkpoint": reentrant,
}
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
IMPLEMENTATIONS = {"native": "NativeGroupFunction", "eager": "LoraLinearFunction"}


class Flat(nn.Module):
    """A mask drawn for rows, for an x of any shape."""

    def __init__(self, drop):
        super().__init__()
        self.drop = drop

    def forward(self, x):
        return self.drop(x.reshape(X.shape)).view(x.shape)


@functools.cache
def model_of(config):
    """PEFT's model."""
    return heads(**CONFIGS[config])


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(lora_fused, request, monkeypatch):
    if request.param == "eager":
        monkeypatch.setattr(
            lora_fused.functional.dispatch, "native_path", lambda *_: lora_fused.specs.NativePath(False)
        )
    return IMPLEMENTATIONS[request.param]


@pytest.fixture
def pair_of(lora_fused, implementation):
    """Of a configuration: (PEFT's model, ours, whose three linears run as a group) with the same masks after
    `torch.manual_seed(5)`."""

    def get(config):
        model = copy.deepcopy(model_of(config))
        ours = kernelized(lora_fused, model)
        for _ in range(2):
            ys = outputs(ours, features())
            torch.autograd.backward([y.sum() for y in ys])
        ours.zero_grad()
        assert implementation in ys[0].grad_fn.name()
        assert len({id(y.grad_fn) for y in ys}) == 1
        torch.manual_seed(5)
        for i, name in enumerate(NAMES if "lora_dropout" in CONFIGS[config] else ()):
            drop = DrawnDropout(lora_fused, 0.4, X.shape, DEVICE, i, 3)
            getattr(inner(model), name).lora_dropout["default"] = Flat(drop)
        return model, ours

    return get


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


def test_a_functional_group(lora_fused, implementation):
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
    """Whatever else runs in between, another group among it: torch refuses a recomputation that saves something else."""
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
