"""A deleted model is gone, whatever happened in its forward: results that were computed ahead of calls which never came
hold neither its parameters nor its graphs."""

import gc
import threading
import weakref

import pytest
import torch
from helpers.cases import peft_llama
from helpers.heads import heads, inner, learned
from helpers.kernelizing import fused_functions, kernelized
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("on_device")


def x_of(model):
    return torch.randn(5, 32, dtype=torch.float64)


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    """Of what these tests make."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def failing_at(name, error):
    def between(module, called, x):
        if called == name:
            raise error

    return between


class Left(Exception):
    pass


class OutOfMemory(torch.OutOfMemoryError):
    def __init__(self):
        super().__init__("CUDA out of memory.")


def raises(error, at):
    def run(model, call):
        x = x_of(model)
        try:
            call(model, x, failing_at(at, error))
        except (error, RuntimeError):  # in a checkpoint's generator an iteration cannot be stopped
            pass
        return x

    return run


def before(model, call):
    """In the forward, before the first of them, after a pass that skipped one."""
    x = skips(model, call)

    def fail(module, args):
        raise Left

    hook = inner(model).register_forward_pre_hook(fail)
    with pytest.raises(Left):
        call(model, x)
    hook.remove()
    return x


def skips(model, call):
    x = x_of(model)
    call(model, x, names=("q",))
    return x


def skips_for_ever(model, call):
    for _ in range(4):
        x = skips(model, call)
    return x


def ends_a_generator(model, call):
    """Suspended between two siblings and left there."""
    x = x_of(model)

    def generate():
        for name in ("q", "k", "v"):
            yield call(model, x, names=(name,))

    next(generate())
    return x


def deletes_in_the_middle(model, call):
    """A module of the group goes while the others are called."""
    x = x_of(model)

    def between(module, called, x):
        if called == "q":
            del module.k

    try:
        call(model, x, between)
    except AttributeError:
        pass
    return x


EVENTS = {
    "before": before,
    "between": raises(Left, "q"),
    "between the last two": raises(Left, "k"),
    "after": raises(Left, "v"),
    "out of memory": raises(OutOfMemory, "q"),
    "interrupted": raises(KeyboardInterrupt, "q"),
    "iteration stopped": raises(StopIteration, "k"),
    "skipped": skips,
    "skipped for ever": skips_for_ever,
    "generator": ends_a_generator,
    "deleted in the middle": deletes_in_the_middle,
}


def plain(model, x, *args, **kwargs):
    return inner(model)(x, *args, **kwargs)


def differentiable(model, x, *args, **kwargs):
    return inner(model)(x.requires_grad_(), *args, **kwargs)


def of_an_intermediate(model, x, *args, **kwargs):
    return inner(model)(torch.tanh(x.requires_grad_()), *args, **kwargs)


def without_gradient(model, x, *args, **kwargs):
    with torch.no_grad():
        return inner(model)(x, *args, **kwargs)


def in_inference_mode(model, x, *args, **kwargs):
    with torch.inference_mode():
        return inner(model)(x * 1, *args, **kwargs)


def checkpointed(model, x, *args, **kwargs):
    """x itself is saved by the checkpoint."""
    return checkpoint(lambda x: inner(model)(x, *args, **kwargs), x.requires_grad_(), use_reentrant=False)


def checkpointed_inside(model, x, *args, **kwargs):
    return checkpoint(lambda x: inner(model)(torch.tanh(x), *args, **kwargs), x.requires_grad_(), use_reentrant=False)


def reentrant(model, x, *args, **kwargs):
    return checkpoint(lambda x: inner(model)(torch.tanh(x), *args, **kwargs), x.requires_grad_(), use_reentrant=True)


def recomputed(model, x, between=lambda *_: None, **kwargs):
    """What happens in the forward of a backward pass."""
    ran = []

    def run(x):
        later = between if ran else lambda *_: None
        ran.append(True)
        return inner(model)(torch.tanh(x), later, **kwargs).square()

    checkpoint(run, x.requires_grad_(), use_reentrant=False).sum().backward()


def hooked(model, x, *args, **kwargs):
    """A graph that holds the module, as those of FSDP and of modules with backward hooks do."""
    x = torch.tanh(x.requires_grad_())
    x.grad_fn.register_hook(lambda *_: model)
    return inner(model)(x * 1, *args, **kwargs)


SCOPES = (
    plain,
    differentiable,
    of_an_intermediate,
    without_gradient,
    in_inference_mode,
    checkpointed,
    checkpointed_inside,
    reentrant,
    recomputed,
    hooked,
)


def parameters_of(model):
    refs = [weakref.ref(p) for p in model.parameters()]
    assert len(refs) > 8
    return refs


def alive(refs):
    gc.collect()
    return sum(ref() is not None for ref in refs)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("scope", SCOPES, ids=lambda scope: scope.__name__)
def test_a_model_that_was_left(lora_fused, scope, event):
    """Its input is still there."""
    model = learned(lora_fused, heads(), torch.randn(5, 32, dtype=torch.float64))
    refs = parameters_of(model)
    x = EVENTS[event](model, scope)
    del model
    assert alive(refs) == 0
    assert x.shape == (5, 32)


def test_what_was_left_is_really_there(lora_fused):
    """Of the tests above: an exception leaves results that hold the model."""
    model = learned(lora_fused, heads(), torch.randn(5, 32, dtype=torch.float64))
    x = EVENTS["between"](model, plain)
    assert x is not None and len(lora_fused.shared_input._threads.calls.precomputed.results) == 2


@pytest.mark.parametrize("ends", (True, False), ids=("ends", "idles"))
@pytest.mark.parametrize(
    "scope", (plain, of_an_intermediate, checkpointed_inside, without_gradient), ids=lambda s: s.__name__
)
def test_a_thread_that(lora_fused, scope, ends):
    model = learned(lora_fused, heads(), torch.randn(5, 32, dtype=torch.float64))
    plain(model, x_of(model))  # now they are known to be siblings
    refs, models, left, end = parameters_of(model), [model], threading.Event(), threading.Event()
    inputs = []

    def work():
        inputs.append(EVENTS["between"](models[0], scope))
        left.set()
        ends or end.wait(30)

    thread = threading.Thread(target=work)
    thread.start()
    assert left.wait(30)
    if ends:
        thread.join()
    models.clear()
    del model
    try:
        assert alive(refs) == 0 and len(inputs) == 1
    finally:
        end.set()
        thread.join()


class Nested(nn.Module):
    """A model inside another's forward, which fails there."""

    def __init__(self, outer, other):
        super().__init__()
        self.outer, self.other = outer, other

    def forward(self, x, fails):
        def between(module, name, x):
            if name == "q":
                inner(self.other)(torch.tanh(x), failing_at("q", Left) if fails else lambda *_: None)

        return inner(self.outer)(torch.tanh(x), between)


def test_nested_models(lora_fused):
    models = [learned(lora_fused, heads(), torch.randn(5, 32, dtype=torch.float64)) for _ in range(2)]
    nested, x = Nested(*models), torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(nested(x, False), inner(models[0])(torch.tanh(x)))
    refs = parameters_of(nested)
    with pytest.raises(Left):
        nested(x, True)
    other = weakref.ref(models[1])
    del nested, models
    assert alive(refs) == 0 and other() is None


def llama_without_memory(lora_fused, checkpointing):
    """Its second layer fails between two siblings."""
    model = kernelized(lora_fused, peft_llama())
    if checkpointing is not None:
        model.gradient_checkpointing_enable(dict(use_reentrant=checkpointing))
        model.enable_input_require_grads()
    tokens = torch.randint(0, 64, (2, 5))
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert any("+" in row.group for row in lora_fused.explain(model))
    layer = model.base_model.model.model.layers[1].self_attn.q_proj

    def fail(*_):
        raise OutOfMemory

    layer.register_forward_hook(fail)
    return model, tokens


@pytest.mark.parametrize("checkpointing", (None, False, True), ids=("plain", "checkpoint", "reentrant"))
def test_a_language_model(lora_fused, checkpointing):
    model, tokens = llama_without_memory(lora_fused, checkpointing)
    refs = parameters_of(model)
    with pytest.raises(torch.OutOfMemoryError):
        model(input_ids=tokens, labels=tokens)
    del model
    assert alive(refs) == 0


def test_the_next_attempt_of_a_batch_size_finder(lora_fused):
    from accelerate.utils import find_executable_batch_size

    alive_at, refs = [], []

    @find_executable_batch_size(starting_batch_size=3)
    def train(batch_size):
        alive_at.append(alive(refs))
        model, tokens = llama_without_memory(lora_fused, False)
        refs[:] = parameters_of(model)
        if batch_size > 1:
            model(input_ids=tokens, labels=tokens)
        return batch_size

    assert train() == 1
    assert alive_at == [0, 0, 0]


@pytest.mark.parametrize("native", (True, False), ids=("native", "eager"))
@pytest.mark.parametrize("shape", ((5, 32), (1, 5, 32)), ids=str)
def test_results_go_with_their_input(lora_fused, monkeypatch, native, shape):
    """What a skipped sibling would have been given, and the graph behind it, before the next forward."""
    if not native:
        monkeypatch.setattr(
            lora_fused.functional.dispatch, "native_path", lambda *_: lora_fused.specs.NativePath(False)
        )
    model = learned(lora_fused, heads(), torch.randn(5, 32, dtype=torch.float64))
    x = torch.tanh(torch.randn(shape, dtype=torch.float64, requires_grad=True))
    y = inner(model)(x, names=("q", "k"))
    results = lora_fused.shared_input._threads.calls.precomputed.results
    assert len(results) == 1
    del x
    assert len(results) == 0 and y.requires_grad


def test_garbage_collection_between_siblings_takes_nothing(lora_fused):
    """Of a checkpoint neither: all siblings get what the first has computed."""

    def collect(module, name, x):
        gc.collect()

    model = heads()
    ours = learned(lora_fused, model, torch.randn(5, 32, dtype=torch.float64))
    inner(ours)(torch.randn(5, 32, dtype=torch.float64))
    for scope in (plain, checkpointed, checkpointed_inside):
        x = torch.randn(5, 32, dtype=torch.float64)
        y = scope(ours, x, collect)
        torch.testing.assert_close(y, scope(model, x.detach().clone(), collect))
        assert fused_functions(y) == 1
        y.sum().backward()
