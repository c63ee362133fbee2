"""Kernelizing binds forwards on instances: what copying, pickling, unloading and undoing do to them and to values."""

import copy
import pickle

import pytest
import torch
from helpers.cases import DEVICE, LINEARS, peft_llama
from helpers.heads import heads, inner
from helpers.kernelizing import explain, kernelize_in_place
from helpers.llamas import passed, tokens
from helpers.mlps import glu
from kernels import Mode, kernelize, use_kernel_mapping

pytestmark = pytest.mark.usefixtures("on_device")


def assert_same(ours, theirs):
    """Of two passes: results and gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def bound(module):
    return vars(module)["forward"]


def all_fused(lora_fused, model):
    rows = explain(lora_fused, model)
    return len(rows) > 0 and all(row.fused for row in rows)


def sample():
    return torch.randn(40, 32, dtype=torch.float64)


def run(model, x):
    """The result and all gradients of a pass."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


both = pytest.mark.parametrize("make", (heads, glu))


@both
def test_a_deep_copy_is_kernelized_for_itself(lora_fused, make):
    ours, x = kernelize_in_place(lora_fused, make()), sample()
    copied = copy.deepcopy(ours)
    assert all_fused(lora_fused, copied)
    changed = [part for part in copied.modules() if "forward" in vars(part)]
    assert changed and all(bound(part).__self__ is part for part in changed)
    before = run(ours, x)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    assert_same(run(ours, x), before)
    plain = make()
    plain.load_state_dict(copied.state_dict())
    assert_same(run(copied, x), run(plain, x))


def test_a_shallow_copy_of_a_layer_runs_the_original(lora_fused):
    """Until it is kernelized itself. It shares the tensors, so this shows only in what was set on one of the two."""
    model, x = heads(), sample()
    layer = inner(kernelize_in_place(lora_fused, copy.deepcopy(model))).q
    copied, own = copy.copy(layer), copy.copy(inner(model).q)
    assert bound(copied).__self__ is layer
    (row,) = explain(lora_fused, copied)
    assert not row.fused and "bound to another module" in row.reason
    torch.testing.assert_close(copied(x), own(x))
    for each in (copied, own):
        each.scaling = {"default": 0.25}
    assert torch.equal(copied(x), layer(x)) and not torch.allclose(copied(x), own(x))
    kernelize(copied, mode=Mode.TRAINING, device=DEVICE)
    assert bound(copied).__self__ is copied and bound(layer).__self__ is layer
    torch.testing.assert_close(copied(x), own(x))
    torch.testing.assert_close(layer(x), inner(model).q(x))


def test_a_shallow_copy_of_a_model_is_as_the_model(lora_fused):
    """Its layers are the same modules."""
    model, x = heads(), sample()
    copied = copy.copy(kernelize_in_place(lora_fused, copy.deepcopy(model)))
    assert all_fused(lora_fused, copied)
    assert_same(run(copied, x), run(model, x))


def pickled(model, path):
    return pickle.loads(pickle.dumps(model))


def saved(model, path):
    torch.save(model, path / "model.pt")
    return torch.load(path / "model.pt", weights_only=False)


@both
@pytest.mark.parametrize("through", (pickled, saved))
def test_a_pickle_holds_the_model_alone(lora_fused, make, through, tmp_path):
    """What is loaded is PEFT's until it is kernelized, with the same values."""
    model, x = make(), sample()
    loaded = through(kernelize_in_place(lora_fused, copy.deepcopy(model)), tmp_path)
    rows = explain(lora_fused, loaded)
    assert len(rows) == 3 and all(not row.fused and "as pickle and" in row.reason for row in rows), str(rows)
    expected = run(model, x)
    assert all(map(torch.equal, run(loaded, x), expected)) and len(expected) > 7
    assert all_fused(lora_fused, kernelize_in_place(lora_fused, loaded))
    assert_same(run(loaded, x), expected)


def test_the_state_dict_says_nothing_of_it(lora_fused):
    model = heads()
    names = list(model.state_dict())
    assert list(kernelize_in_place(lora_fused, copy.deepcopy(model)).state_dict()) == names


UNLOAD = {
    "unload": lambda model: model.unload(),
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merged before": lambda model: (model.merge_adapter(), model.merge_and_unload())[1],
}
CONFIGS = {
    "all": dict(target_modules=[*LINEARS, "embed_tokens"]),
    "DoRA": dict(use_dora=True),
    "one of the MLP": dict(target_modules=["q_proj", "down_proj"]),
    "dropout": dict(lora_dropout=0.5),
    "saved whole": dict(target_modules=["q_proj", "gate_proj", "up_proj"], modules_to_save=["down_proj", "lm_head"]),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("unload", UNLOAD.values(), ids=UNLOAD)
def test_an_unloaded_model_computes_what_its_modules_would(lora_fused, unload, config):
    """Our forward stays on its MLPs, whose linears are plain ones then: results and gradients, all of it trained."""
    model = peft_llama(torch.float64, **config)
    ours = kernelize_in_place(lora_fused, copy.deepcopy(model))
    passed(ours, tokens())
    ours, plain = unload(ours), unload(model)
    mlps = [part for part in ours.modules() if type(part).__name__ == "LlamaMLP"]
    assert len(mlps) == 2 and not any("lora_" in name for name, _ in ours.named_parameters())
    assert all(bound(part).__func__ is lora_fused.layers.LoraGatedMLP.forward for part in mlps)
    for each in (ours, plain):
        each.requires_grad_(True).train()
    assert list(ours.state_dict()) == list(plain.state_dict())
    for each in (plain.train(), plain.eval()):
        ours.train(each.training)
        assert_same(passed(ours, tokens()), passed(each, tokens()))
    with torch.no_grad():
        assert_same(ours(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)


def test_explain_of_an_unloaded_model(lora_fused):
    ours = kernelize_in_place(lora_fused, peft_llama()).unload()
    with pytest.warns(UserWarning, match="no PEFT LoRA modules"):
        assert len(lora_fused.explain(ours)) == 0


def test_an_unloaded_model_may_be_adapted_again(lora_fused):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=LINEARS, task_type="CAUSAL_LM", init_lora_weights=False)
    ours, plain = kernelize_in_place(lora_fused, peft_llama(torch.float64)).unload(), peft_llama(torch.float64).unload()
    torch.manual_seed(0)
    plain = get_peft_model(plain, config)
    torch.manual_seed(0)
    ours = get_peft_model(ours, config)
    assert_same(passed(ours, tokens()), passed(plain, tokens()))  # before it is kernelized
    kernelize_in_place(lora_fused, ours)
    assert all_fused(lora_fused, ours)
    for _ in range(2):
        assert_same(passed(ours, tokens()), passed(plain, tokens()))


@both
def test_undone(lora_fused, make):
    """By kernelizing with no mapping, before the adapters are unloaded."""
    model, x = make(), sample()
    ours = kernelize_in_place(lora_fused, copy.deepcopy(model))
    assert all_fused(lora_fused, ours)
    with use_kernel_mapping({}, inherit_mapping=False):
        kernelize(ours, mode=Mode.TRAINING, device=DEVICE)
    assert all(bound(part).__func__ is type(part).forward for part in ours.modules() if "forward" in vars(part))
    assert all(map(torch.equal, run(ours, x), run(model, x)))
