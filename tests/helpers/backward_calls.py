"""Backward calls of their own through three projections of one input, each a function of the model."""

import copy
import functools
import threading

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.cases import DEVICE, DrawnDropout
from helpers.heads import NAMES, heads, inner
from helpers.kernelizing import kernelized

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


def pair(lora_fused, function, config):
    """Of a configuration: (PEFT's model, ours, whose three linears run as one `function`) with the same masks after
    `torch.manual_seed(5)`."""
    model = copy.deepcopy(model_of(config))
    ours = kernelized(lora_fused, model)
    for _ in range(2):
        ys = outputs(ours, features())
        torch.autograd.backward([y.sum() for y in ys])
    ours.zero_grad()
    assert function in ys[0].grad_fn.name()
    assert len({id(y.grad_fn) for y in ys}) == 1
    torch.manual_seed(5)
    for i, name in enumerate(NAMES if "lora_dropout" in CONFIGS[config] else ()):
        drop = DrawnDropout(lora_fused, 0.4, X.shape, DEVICE, i, 3)
        getattr(inner(model), name).lora_dropout["default"] = Flat(drop)
    return model, ours
