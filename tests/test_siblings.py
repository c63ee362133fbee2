"""Groups of siblings: what joins them, what must not, and that none of it changes a result."""

import contextlib
import copy
import threading

import pytest
import torch
from cases import DEVICE, DrawnDropout, peft_llama, randomise_adapters
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("on_device")
NAMES = ("q", "k", "v")


class Heads(nn.Module):
    """Three projections of one input, as an attention has them."""

    def __init__(self, sizes=(16, 8, 12), bias=(True, False, True)):
        super().__init__()
        for name, size, has_bias in zip(NAMES, sizes, bias):
            self.add_module(name, nn.Linear(32, size, bias=has_bias))

    def forward(self, x, between=lambda *_: None, names=NAMES):
        results = []
        for name in names:
            results.append(getattr(self, name)(x))
            between(self, name, x)
        return torch.cat(results, -1)


def heads(dtype=torch.float64, second=None, **config):
    options = dict(r=4, lora_alpha=6, target_modules=list(NAMES), rank_pattern={"k": 7}, alpha_pattern={"v": 3})
    model = get_peft_model(Heads().to(dtype), LoraConfig(**{**options, **config}), autocast_adapter_dtype=False)
    if second:
        model.add_adapter("second", LoraConfig(**second))
        model.base_model.set_adapter(["default", "second"])
    randomise_adapters(model, dtype)
    return model.train()


def kernelized(lora_fused, model):
    lora_fused.register_peft_layers()
    return kernelize(copy.deepcopy(model), mode=Mode.TRAINING, device=DEVICE)


def inner(model):
    return model.base_model.model


def functions(result):
    """Nodes of the fused Function behind a result."""
    seen, queue = set(), [result.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue.extend(parent for parent, _ in node.next_functions)
    return sum("LoraLinearFunction" in node.name() or "NativeGroupFunction" in node.name() for node in seen)


def step(model, x, **call):
    """(result, gradients) of one pass; a fresh leaf each time, as activations are."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = inner(model)(x, **call)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return y, {"x": x.grad, **grads}


def assert_same(ours, theirs):
    (y, grads), (y_peft, grads_peft) = ours, theirs
    torch.testing.assert_close(y, y_peft, rtol=1e-12, atol=1e-12)
    assert grads.keys() == grads_peft.keys()
    for name, grad in grads.items():
        if grads_peft[name] is None:
            assert grad is None, name
        else:
            torch.testing.assert_close(grad, grads_peft[name], rtol=1e-11, atol=1e-11, msg=name)


def learned(lora_fused, model, x):
    """A kernelized copy that has seen one pass."""
    ours = kernelized(lora_fused, model)
    step(ours, x)
    return ours


@pytest.mark.parametrize(
    "config",
    ({}, dict(use_dora=True), dict(lora_bias=True), dict(bias="all"), dict(use_dora=True, bias="lora_only")),
    ids=str,
)
def test_members_that_differ_run_as_one(lora_fused, config):
    model, x = heads(**config), torch.randn(2, 5, 32, dtype=torch.float64)
    ours = kernelized(lora_fused, model)
    expected = step(model, x)
    counts = []
    for _ in range(3):
        result = step(ours, x)
        assert_same(result, expected)
        counts.append(functions(result[0]))
    assert counts == [3, 1, 1]
    assert {row.group for row in lora_fused.explain(ours)} == {"q+k+v"}


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU multiplies by all A's at once")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_group_changes_no_bit_of_an_output(lora_fused, dtype):
    """The first pass, each alone, and the later ones, as a group: PEFT's own tests compare two passes."""
    model = heads(dtype, rank_pattern={}, alpha_pattern={})
    ours, x = kernelized(lora_fused, model), torch.randn(6, 32, dtype=dtype)
    first, *later = (step(ours, x)[0] for _ in range(3))
    assert functions(later[-1]) == 1
    assert all(torch.equal(first, other) for other in later)


def test_members_of_several_kinds(lora_fused):
    """DoRA beside LoRA, dropout beside none, different adapters active."""
    model = heads(torch.float64, target_modules=["q", "v"])
    model.add_adapter("default_k", LoraConfig(r=3, use_dora=True, lora_dropout=0.4, target_modules=["k"]))
    model.base_model.set_adapter(["default", "default_k"])
    randomise_adapters(model, torch.float64)
    inner(model).v.lora_dropout["default"] = nn.Dropout(0.2)
    x = torch.randn(3, 32, dtype=torch.float64)
    ours = kernelized(lora_fused, model)
    step(ours, x)
    torch.manual_seed(5)
    for i, name in enumerate(NAMES):
        layer = getattr(inner(model), name)
        for adapter, drop in layer.lora_dropout.items():
            if isinstance(drop, nn.Dropout):
                layer.lora_dropout[adapter] = DrawnDropout(lora_fused, drop.p, x.shape, DEVICE, i, 3)
    torch.manual_seed(5)
    y, grads = step(ours, x)
    assert functions(y) == 1
    y_peft, grads_peft = step(model, x)
    torch.testing.assert_close(y, y_peft)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_peft[name], msg=name)


def test_masks_are_independent_across_members(lora_fused):
    model = heads(torch.float32, lora_dropout=0.5, r=32, lora_alpha=32, rank_pattern={}, alpha_pattern={})
    for name in NAMES:  # y = dropout(x), cut to the projection's width
        layer = getattr(inner(model), name)
        layer.base_layer.weight.data.zero_()
        layer.lora_A["default"].weight.data = torch.eye(32)
        layer.lora_B["default"].weight.data = torch.eye(32)[: layer.out_features]
        if layer.base_layer.bias is not None:
            layer.base_layer.bias.data.zero_()
    ours = learned(lora_fused, model, torch.randn(4, 32))
    x = torch.ones(4096, 32)
    kept = [part[:, :8] != 0 for part in inner(ours)(x).split((16, 8, 12), -1)]
    for one in range(3):
        assert abs(kept[one].float().mean() - 0.5) < 0.02
        for other in range(one):
            assert abs((kept[one] == kept[other]).float().mean() - 0.5) < 0.02


def test_shared_mask_is_an_option(lora_fused):
    eye = torch.eye(16)
    operands = lora_fused.Operands(torch.zeros(16, 16), None, eye, eye)
    one = lora_fused.Projection(operands, 1.0, lora_fused.ProjectionSpec(0.5))
    x = torch.ones(64, 16)
    first, second = lora_fused.lora_linear_group(x, (one, one))
    assert not torch.equal(first, second)
    first, second = lora_fused.lora_linear_group(x, (one, one), share_mask=True)
    assert torch.equal(first, second) and set(first.unique().tolist()) == {0.0, 2.0}


def test_a_sibling_that_is_skipped_leaves_the_group(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    for names in (("q", "v"), ("q", "v"), ("q", "v"), NAMES, NAMES, NAMES):
        result = step(ours, x, names=names)
        assert_same(result, step(model, x, names=names))
    assert functions(result[0]) == 1


def test_order_of_calls_may_change(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    for names in (("v", "k", "q"), ("k", "q", "v"), ("q", "q", "k"), ("v", "k", "q")) * 2:
        assert_same(step(ours, x, names=names), step(model, x, names=names))


def in_place_on_x(module, name, x):
    if name == "q":
        x.data.mul_(1.0)  # .data hides it from the version
        with torch.no_grad():
            x.mul_(2.0)


def in_place_on_a_weight(module, name, x):
    if name == "q":
        with torch.no_grad():
            module.k.lora_A["default"].weight.mul_(2.0)


def replaced_weight(module, name, x):
    if name == "q":
        module.k.base_layer.weight = nn.Parameter(module.k.base_layer.weight.data * 2, requires_grad=False)


def changed_scaling(module, name, x):
    if name == "q":
        module.k.scaling["default"] *= 2


def disabled(module, name, x):
    module.k.enable_adapters(name == "v")


def merged(module, name, x):
    if name == "q":
        module.k.merge()


@pytest.mark.parametrize("between", (in_place_on_a_weight, replaced_weight, changed_scaling, disabled, merged))
def test_changes_between_siblings_are_seen(lora_fused, between):
    """The second sibling's own state at its call decides, not that of when the group was computed."""
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    with torch.no_grad():  # autograd refuses what changed after it was used, for PEFT's forward as well
        torch.testing.assert_close(inner(ours)(x, between=between), inner(model)(x, between=between))
        torch.testing.assert_close(inner(ours)(x), inner(model)(x))


def test_an_input_that_changes_between_siblings(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    with torch.no_grad():
        torch.testing.assert_close(inner(ours)(x.clone(), in_place_on_x), inner(model)(x.clone(), in_place_on_x))
    with torch.inference_mode():  # where tensors keep no version
        torch.testing.assert_close(inner(ours)(x.clone(), in_place_on_x), inner(model)(x.clone(), in_place_on_x))


@pytest.mark.parametrize("scope", (torch.no_grad, torch.enable_grad))
def test_another_grad_mode_for_one_sibling(lora_fused, scope):
    class Mixed(Heads):
        def forward(self, x):
            q = self.q(x)
            with scope():
                k = self.k(x)
            return torch.cat([q, k, self.v(x)], -1)

    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    inner(model).__class__ = Mixed
    ours = kernelized(lora_fused, model)
    for _ in range(3):
        assert_same(step(ours, x), step(model, x))


def test_autocast_for_one_sibling(lora_fused):
    class Mixed(Heads):
        def forward(self, x):
            q = self.q(x)
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                k = self.k(x)
            return torch.cat([q, k.float(), self.v(x)], -1)

    model, x = heads(torch.float32), torch.randn(5, 32)
    inner(model).__class__ = Mixed
    ours = kernelized(lora_fused, model)
    for _ in range(3):
        y, y_peft = inner(ours)(x), inner(model)(x)
        torch.testing.assert_close(y, y_peft, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(y[:, :16], y_peft[:, :16])


def test_an_exception_between_siblings(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)

    def fails(module, name, x):
        if name == "k":
            raise KeyError(name)

    for _ in range(2):
        with pytest.raises(KeyError):
            step(ours, x, between=fails)
    for _ in range(3):
        result = step(ours, x)
        assert_same(result, step(model, x))
    assert functions(result[0]) == 1


def test_a_hook_that_raises_between_siblings(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)

    def fails(module, args, y):
        raise KeyError("k")

    handle = inner(ours).k.register_forward_hook(fails)
    for _ in range(2):
        with pytest.raises(KeyError):
            step(ours, x)
    handle.remove()
    other = torch.randn(5, 32, dtype=torch.float64)
    for each in (x, other, x):
        result = step(ours, each)
        assert_same(result, step(model, each))
    assert functions(result[0]) == 1


def test_a_pre_hook_keeps_a_sibling_out(lora_fused):
    """What it does to the sibling's parameters happens at the sibling's call, not before."""
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)

    def grow(module, args):
        module.lora_A["default"].weight.data.mul_(1.5)

    for each in (model, ours):
        inner(each).k.register_forward_pre_hook(grow)
    for _ in range(3):
        result = step(ours, x)
        assert_same(result, step(model, x))
    assert functions(result[0]) == 2


def test_a_forward_of_another_tool_keeps_a_sibling_out(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    layer = inner(ours).k
    before = layer.forward
    layer.forward = lambda *args, **kwargs: 3 * before(*args, **kwargs)
    inner(model).k.register_forward_hook(lambda module, args, y: 3 * y)
    for _ in range(3):
        assert_same(step(ours, x), step(model, x))


def test_an_output_that_is_not_used(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)

    def first_only(each):
        each.zero_grad()
        inner(each)(x)[:, :16].sum().backward()
        return {name: p.grad for name, p in each.named_parameters()}

    expected = first_only(model)
    for name, grad in first_only(ours).items():
        if expected[name] is None or not expected[name].any():
            assert grad is None or not grad.any()
        else:
            torch.testing.assert_close(grad, expected[name])


def test_cross_attention(lora_fused):
    """The query has an input of its own, keys and values share the other one."""

    class Cross(Heads):
        def forward(self, x):
            return torch.cat([self.q(x.flip(0)), self.k(x), self.v(x)], -1)

    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    inner(model).__class__ = Cross
    ours = kernelized(lora_fused, model)
    for _ in range(3):
        result = step(ours, x)
        assert_same(result, step(model, x))
    assert functions(result[0]) == 2
    assert [row.group for row in lora_fused.explain(ours)] == ["single", "k+v", "k+v"]


@pytest.mark.parametrize("reentrant", (False, True), ids=("", "reentrant"))
@pytest.mark.parametrize("config", ({}, dict(lora_dropout=0.3), dict(use_dora=True, lora_dropout=0.3)), ids=str)
def test_checkpointing_from_the_first_step(lora_fused, reentrant, config):
    """The first forward runs one by one, so must its recomputation, and the mask must be the same."""
    model, x = heads(**config), torch.randn(5, 32, dtype=torch.float64)
    plain, ours = kernelized(lora_fused, model), kernelized(lora_fused, model)

    def run(each, checkpointed):
        torch.manual_seed(3)
        each.zero_grad()
        leaf = x.clone().requires_grad_()
        call = inner(each) if not checkpointed else lambda v: checkpoint(inner(each), v, use_reentrant=reentrant)
        y = call(leaf * 1)
        y.square().sum().backward()
        return y, {"x": leaf.grad, **{name: p.grad for name, p in each.named_parameters() if p.requires_grad}}

    for _ in range(3):
        assert_same(run(ours, True), run(plain, False))


def test_a_group_waits_for_graphs_of_its_past(lora_fused):
    """Micro-batches whose backwards come late, as in a pipeline: each is recomputed as it was run."""
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = kernelized(lora_fused, model)
    leaf = x.clone().requires_grad_()

    def forward(each):
        return checkpoint(inner(each), leaf * 1, use_reentrant=False).square().sum()

    first, second = forward(ours), forward(ours)
    third = None
    for _ in range(2):
        first.backward()
        third = forward(ours)
        second.backward()
        third.backward()
        first, second = forward(ours), forward(ours)
    assert functions(inner(ours)(leaf * 1)) == 1
    model.zero_grad(), ours.zero_grad()
    forward(model).backward(), (first + second).backward()
    for name, p in ours.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, 2 * dict(model.named_parameters())[name].grad)


def test_a_graph_that_is_dropped_holds_nothing_up(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = kernelized(lora_fused, model)
    y = inner(ours)(x.clone())
    del y
    assert functions(inner(ours)(x.clone())) == 1


def test_the_same_input_in_every_pass(lora_fused):
    """As a benchmark or a CUDA graph has it: the first sibling's next call begins a new pass."""
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    ours = kernelized(lora_fused, model)
    for _ in range(2):
        inner(ours)(x).sum().backward()
    assert functions(inner(ours)(x)) == 1


def test_threads_do_not_mix(lora_fused):
    model = heads()
    ours = learned(lora_fused, model, torch.randn(5, 32, dtype=torch.float64))
    failures = []

    def work(seed):
        x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        for _ in range(20):
            with torch.no_grad(), contextlib.suppress(StopIteration):
                if not torch.allclose(inner(ours)(x), inner(model)(x), rtol=1e-12):
                    failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not failures


def test_generation_with_a_cache(lora_fused):
    model = peft_llama().eval()
    ours = kernelized(lora_fused, model)
    tokens = torch.randint(0, 64, (2, 5))
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    for _ in range(2):
        assert torch.equal(ours.generate(input_ids=tokens, **options), model.generate(input_ids=tokens, **options))


def test_a_group_that_never_settles_stays_single(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    for turn in range(30):
        names = NAMES if turn % 2 else ("q", "v")
        assert_same(step(ours, x, names=names), step(model, x, names=names))
    assert functions(step(ours, x)[0]) == 3
