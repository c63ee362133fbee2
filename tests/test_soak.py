"""Long runs: a kernelized model in lockstep with PEFT's own, whatever comes between its steps; the same run twice, taken up
in its middle, and in four threads at once."""

import concurrent.futures
import copy
import itertools
import random
import statistics
import sys
import threading
from collections import Counter

import psutil
import pytest
import torch
from helpers.cases import DEVICE, LINEARS, OwnForwards, SeededDropout, randomise_adapters, tiny_llama
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

pytestmark = pytest.mark.usefixtures("on_device")
SHAPE = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
)
ADAPTERS = {
    "default": dict(r=4, lora_alpha=8, lora_dropout=0.1),
    "dora": dict(r=3, lora_alpha=6, use_dora=True, lora_dropout=0.2),
    "plain": dict(r=5, use_rslora=True, rank_pattern={"k_proj": 2}, alpha_pattern={"down_proj": 3}),
    "plain dora": dict(r=2, lora_alpha=4, use_dora=True),
}
BOTH = ["plain", "plain dora"]  # at once, which PEFT computes
CHECKPOINTS = (None, dict(use_reentrant=False), dict(use_reentrant=True))
STEPS = 1000
# Of a loss, and of what grows with the steps: PEFT's own runs part as fast, from one rounding on.
LOSS, STATE = 1e-9, 1e-6


def adapted_llama():
    """A Llama of two layers, all of it in float64, with four adapters on every linear."""
    torch.manual_seed(0)
    base = tiny_llama(torch.float64, **SHAPE)
    for name, norm in [*base.named_modules()]:
        if isinstance(norm, LlamaRMSNorm):  # it rounds to float32, which hides a difference until it is a large one
            base.set_submodule(name, nn.RMSNorm(SHAPE["hidden_size"], norm.variance_epsilon, dtype=torch.float64))
    configs = {
        name: LoraConfig(target_modules=LINEARS, task_type="CAUSAL_LM", **each) for name, each in ADAPTERS.items()
    }
    model = get_peft_model(base, configs.pop("default"), autocast_adapter_dtype=False)
    for name, config in configs.items():
        model.add_adapter(name, config)
    model = model.double()
    randomise_adapters(model, torch.float64)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.1)  # a large B makes training chaotic: 1e-15 becomes 1 within fifty steps
    model.enable_input_require_grads()
    return model.train()


def kernelized(lora_fused, model):
    lora_fused.register_peft_layers()
    return kernelize(copy.deepcopy(model), mode=Mode.TRAINING, device=DEVICE)


@pytest.fixture
def pair(lora_fused, monkeypatch):
    """(PEFT's model, whose dropout draws our masks, the kernelized one)."""
    if DEVICE == "cuda":  # a draw of three seeds is not three draws of one there, as PEFT's model makes them
        own = lora_fused.functional.dispatch.draw_seeds

        def draw_seeds(device, projections, share_mask=False):
            seeds = [own(device, (projection,), share_mask) for projection in projections]
            return None if None in seeds else torch.cat(seeds)

        monkeypatch.setattr(lora_fused.functional.dispatch, "draw_seeds", draw_seeds)
    model = adapted_llama()
    ours = kernelized(lora_fused, model)
    assert SeededDropout.replace_all(lora_fused, model) == 2 * 14
    return model, ours


def batch(step, rows=4, length=12):
    """One of sixteen."""
    generator = torch.Generator().manual_seed(step % 16)
    return torch.randint(1, SHAPE["vocab_size"], (rows, length), generator=generator, device="cpu").to(DEVICE)


def loss_of(model, step, **shape):
    """In float64, which transformers' own is not."""
    torch.manual_seed(step)  # of the masks
    tokens = batch(step, **shape)
    logits = model(input_ids=tokens).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(model, optimizer, step, **shape):
    loss = loss_of(model, step, **shape)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def optimizer_of(model):
    return torch.optim.AdamW([p for name, p in model.named_parameters() if "lora_" in name], lr=1e-3)


def checkpointing(model, options):
    if options is None:
        model.base_model.model.gradient_checkpointing_disable()
    else:
        model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


class Interrupted(Exception):
    """What goes wrong in a step."""


def interrupt(*_):
    raise Interrupted


def interrupt_backward(module, args, y):
    if y.requires_grad:  # not in a reentrant checkpoint's forward, but where that is computed again
        y.register_hook(interrupt)


def interrupt_recomputation(*_):
    if torch._C._current_graph_task_id() != -1:
        raise Interrupted


# A module, and the hook that is called after its forward.
INTERRUPTIONS = {
    "between siblings": ("model.layers.1.self_attn.k_proj", interrupt),
    "between gate and up": ("model.layers.0.mlp.gate_proj", interrupt),
    "after a layer": ("model.layers.0", interrupt),
    "in backward": ("model.layers.1.input_layernorm", interrupt_backward),
    "in a recomputation": ("model.layers.1.self_attn.v_proj", interrupt_recomputation),
}


def interrupted(model, step, where, **shape):
    """A step that does not come to its end."""
    name, hook = INTERRUPTIONS[where]
    handle = model.base_model.model.get_submodule(name).register_forward_hook(hook)
    with pytest.raises(Interrupted):
        loss_of(model, step, **shape).backward()
    handle.remove()
    model.zero_grad()


def assert_same_state(ours, theirs):
    """Names and values of all that a model holds."""
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    mine, peft = ours.state_dict(), theirs.state_dict()
    assert [*mine] == [*peft]
    for name, value in mine.items():
        torch.testing.assert_close(value, peft[name], rtol=STATE, atol=STATE, msg=lambda m: f"{name}: {m}")


def assert_same_logits(ours, theirs, tokens):
    with torch.no_grad():
        pairs = [model(input_ids=tokens).logits for model in (ours, theirs)]
    torch.testing.assert_close(*pairs, rtol=STATE, atol=STATE)


def merge_and_unmerge(theirs, ours, safe):
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    for model in (theirs, ours):
        model.eval()
        model.merge_adapter(safe_merge=safe)
    assert_same_state(ours, theirs)
    moved = [name for name, value in ours.state_dict().items() if not torch.allclose(value, before[name])]
    assert len(moved) == 14 and all(name.endswith("base_layer.weight") for name in moved)
    assert_same_logits(ours, theirs, batch(0))
    for model in (theirs, ours):
        model.unmerge_adapter()
        model.train()
    assert_same_state(ours, theirs)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, before[name], msg=name)


def evaluate(theirs, ours, step):
    """On other numbers of tokens, and at times some are generated."""
    for model in (theirs, ours):
        model.eval()
    with torch.inference_mode(step % 2 == 0):
        assert_same_logits(ours, theirs, batch(step, rows=1 + step % 3, length=1 + step % 7))
    if step % 4 == 0:
        options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(
            *(model.generate(input_ids=batch(step, rows=2, length=5), **options) for model in (theirs, ours))
        )
    for model in (theirs, ours):
        model.train()


def test_a_thousand_steps_with_all_that_comes_between(pair):
    theirs, ours = pair
    optimizers, drawn, done = [optimizer_of(model) for model in pair], random.Random(0), Counter()
    start = {name: p.detach().clone() for name, p in theirs.named_parameters() if "lora_" in name}
    for step in range(STEPS):
        if step % 5 == 0:
            active, options = drawn.choice([*ADAPTERS, BOTH]), drawn.choice(CHECKPOINTS)
            for model in pair:
                model.base_model.set_adapter(active)
                checkpointing(model, options)
            done[str(active), str(options)] += 1
        if step % 10 == 3:
            merge_and_unmerge(theirs, ours, safe=step % 20 == 3)
            done["merges"] += 1
        if step % 15 == 4:
            where = drawn.choice([*INTERRUPTIONS])
            if options is not None or where != "in a recomputation":
                for model in pair:
                    interrupted(model, step, where)
                done[where] += 1
        if step % 19 == 6:
            evaluate(theirs, ours, step)
            done["evaluations"] += 1
        expected = train(theirs, optimizers[0], step)
        if step % 14 == 9:
            with OwnForwards() as calls:
                loss = train(ours, optimizers[1], step)
            assert bool(calls) == (active == BOTH), f"step {step}: {active}, {calls}"
        else:
            loss = train(ours, optimizers[1], step)
        assert abs(loss - expected) <= LOSS * expected, f"step {step}: {loss}, PEFT {expected}"
    assert_same_state(ours, theirs)
    assert not any(torch.allclose(start[name], p) for name, p in ours.named_parameters() if name in start)
    states = {(str(active), str(options)) for active, options in itertools.product([*ADAPTERS, BOTH], CHECKPOINTS)}
    assert done["merges"] == 100 and done["evaluations"] == 53
    assert all(done[each] >= 4 for each in states) and all(done[where] >= 5 for where in INTERRUPTIONS), done


def resident():
    """Bytes of this process, and on a GPU of its tensors there."""
    return psutil.Process().memory_info().rss + (torch.cuda.memory_allocated() if DEVICE == "cuda" else 0)


def test_memory_stays_flat(lora_fused):
    """From step 100 on; a tensor [rows, hidden] left behind at every second step would show."""
    model, large = kernelized(lora_fused, adapted_llama()), dict(rows=8, length=32)
    one_activation = 8 * large["rows"] * large["length"] * SHAPE["hidden_size"]
    optimizer, found = optimizer_of(model), []
    for step in range(300):
        model.set_adapter([*ADAPTERS][step // 3 % len(ADAPTERS)])
        checkpointing(model, CHECKPOINTS[step // 2 % 3])
        if step % 4 == 1:
            options, where = CHECKPOINTS[step // 2 % 3], [*INTERRUPTIONS][step // 4 % len(INTERRUPTIONS)]
            if options is not None or where != "in a recomputation":
                interrupted(model, step, where, **large)
        if step % 10 == 3:
            model.merge_adapter()
            with torch.no_grad():
                model(input_ids=batch(step, **large))
            model.unmerge_adapter()
        train(model, optimizer, step, **large)
        found.append(resident())
    growth = statistics.median(found[-50:]) - statistics.median(found[100:150])
    assert growth <= 150 * one_activation / 2, f"{growth / 2**20:.1f} MB"


@pytest.fixture
def deterministic():
    """As users ask for it; cuBLAS wants its workspace from the environment, before a process has one."""
    torch.use_deterministic_algorithms(True, warn_only=DEVICE == "cuda")
    yield
    torch.use_deterministic_algorithms(False)


class Run:
    """Training of a fresh model that can be saved and taken up by another one: another adapter every eleven steps, another
    kind of checkpointing every seven, one step in thirteen breaks off."""

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
