"""The same run twice, taken up in its middle, and in four threads at once."""

import concurrent.futures
import sys
import threading

import pytest
import torch
from helpers.cases import DEVICE, OwnForwards
from helpers.kernelizing import kernelized
from helpers.long_runs import (
    ADAPTERS,
    CHECKPOINTS,
    LOSS,
    STATE,
    adapted_llama,
    batch,
    checkpointing,
    interrupted,
    optimizer_of,
    train,
)
from torch import nn

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.fixture
def deterministic():
    """As users ask for it; cuBLAS wants its workspace from the environment, before a process has one."""
    torch.use_deterministic_algorithms(True, warn_only=DEVICE == "cuda")
    yield
    torch.use_deterministic_algorithms(False)


class Run:
    """Training of a fresh model that can be saved and taken up by another one: another adapter every eleven steps,
    another kind of checkpointing every seven, one step in thirteen breaks off."""

    def __init__(self, lora_fused):
        self.model = kernelized(lora_fused, adapted_llama())
        self.optimizer = optimizer_of(self.model)

    def steps(self, first, last):
        losses = []
        for step in range(first, last):
            self.model.set_adapter([*ADAPTERS][step // 11 % len(ADAPTERS)])
            checkpointing(self.model, CHECKPOINTS[step // 7 % 3])
            tokens = batch(step)
            if step % 13 == 5:
                state = torch.get_rng_state()
                interrupted(self.model, step, "between siblings")
                torch.set_rng_state(state)
            logits = self.model(input_ids=tokens).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    def save(self, path):
        rng = torch.get_rng_state(), torch.cuda.get_rng_state_all() if DEVICE == "cuda" else None
        torch.save((self.model.state_dict(), self.optimizer.state_dict(), rng), path)

    def load(self, path):
        model, optimizer, (rng, cuda_rng) = torch.load(path, weights_only=False, map_location="cpu")
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        torch.set_rng_state(rng)
        if cuda_rng is not None:
            torch.cuda.set_rng_state_all(cuda_rng)


def assert_same_bits(one, other):
    assert all(map(torch.equal, one.model.state_dict().values(), other.model.state_dict().values()))


def test_a_rerun_gives_the_same_bits(lora_fused, deterministic):
    runs = [Run(lora_fused) for _ in range(2)]
    losses = []
    for run in runs:
        torch.manual_seed(17)
        losses.append(run.steps(0, 80))
    assert torch.equal(*losses)
    assert_same_bits(*runs)


def test_a_run_taken_up_gives_the_same_bits(lora_fused, deterministic, tmp_path):
    """As PEFT's does: by a fresh model, whose modules have not been seen together."""
    whole, again = Run(lora_fused), Run(lora_fused)
    torch.manual_seed(17)
    whole.steps(0, 40)
    whole.save(tmp_path / "half")
    expected = whole.steps(40, 80)
    again.load(tmp_path / "half")
    assert torch.equal(again.steps(40, 80), expected)
    assert_same_bits(again, whole)


THREADS = 4


def in_threads(work):
    """What `work(0)` to `work(3)` give, each in a thread of its own, all begun at once and switched often. What one of
    them raises is raised here."""
    start, interval = threading.Barrier(THREADS), sys.getswitchinterval()

    def run(index):
        start.wait(timeout=60)
        return work(index)

    sys.setswitchinterval(1e-4)
    try:
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            return [future.result(timeout=300) for future in [pool.submit(run, index) for index in range(THREADS)]]
    finally:
        sys.setswitchinterval(interval)


def gradients(model, step, rows):
    """The loss, and the gradient of every trained parameter, added up nowhere."""
    tokens = batch(step, rows=rows)
    logits = model(input_ids=tokens).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


@pytest.mark.parametrize("adapter", ("plain", "plain dora"))
def test_four_threads_of_one_model(lora_fused, adapter):
    """Each with inputs of its own, some of them under checkpoints; every pass gives what PEFT's gives."""
    theirs = adapted_llama()
    ours = kernelized(lora_fused, theirs)
    for model in (theirs, ours):
        model.set_adapter(adapter)
    expected = [[gradients(theirs, step, rows=1 + index) for step in range(4)] for index in range(THREADS)]
    assert len(expected[0][0]) > 28

    def work(index):
        with OwnForwards() as calls:
            found = [gradients(ours, step % 4, rows=1 + index) for step in range(16)]
        assert not calls
        return found

    for options in CHECKPOINTS[:2]:
        checkpointing(ours, options)
        for index, found in enumerate(in_threads(work)):
            assert len(found) == 16
            for step, values in enumerate(found):
                for value, peft in zip(values, expected[index][step % 4], strict=True):
                    torch.testing.assert_close(value, peft, rtol=STATE, atol=LOSS)


def test_four_threads_train_as_one_does(lora_fused):
    """A model each, switched and interrupted as it goes: to the last bit what it learns alone."""

    def models():
        return [kernelized(lora_fused, adapted_llama()) for _ in range(THREADS)]

    def learn(model, index):
        optimizer, losses = optimizer_of(model), []
        for step in range(24):
            model.set_adapter(("plain", "plain dora")[(step // 5 + index) % 2])
            checkpointing(model, CHECKPOINTS[(step // 4 + index) % 2])
            if step % 6 == index:
                interrupted(model, step, "between siblings")
            losses.append(train(model, optimizer, step + 3 * index))
        return losses, [p.detach().clone() for p in model.parameters()]

    shared = models()
    together = in_threads(lambda index: learn(shared[index], index))
    for index, model in enumerate(models()):
        losses, parameters = learn(model, index)
        assert len(losses) == 24 and losses == together[index][0]
        assert all(map(torch.equal, parameters, together[index][1]))
