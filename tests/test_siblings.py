"""Groups of siblings: what joins them, and that it does not change a result."""

import threading

import pytest
import torch
from helpers.cases import DEVICE, DrawnDropout, peft_llama, randomise_adapters
from helpers.heads import NAMES, assert_same, heads, inner, learned, masked_heads, step
from helpers.kernelizing import fused_functions, kernelized
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("on_device")


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
        counts.append(fused_functions(result[0]))
    assert counts == [3, 1, 1]
    assert {row.group for row in lora_fused.explain(ours)} == {"q+k+v"}


def test_deterministic_algorithms_know_no_groups(lora_fused):
    """What a model has learnt of its siblings would differ between a run and one that takes it up again."""
    model, x = heads(), torch.randn(2, 5, 32, dtype=torch.float64)
    ours, expected = kernelized(lora_fused, model), step(model, x)
    counts = []
    for deterministic in (True, True, True, False, False, True, False):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            result = step(ours, x)
            groups = {row.group for row in lora_fused.explain(ours)}
        finally:
            torch.use_deterministic_algorithms(False)
        assert_same(result, expected)
        counts.append(fused_functions(result[0]))
        assert groups == ({"single"} if deterministic else {"q+k+v"})  # of the next call
    assert counts == [3, 3, 3, 3, 1, 3, 1]


@pytest.mark.parametrize("graph_waits", (False, True))
def test_what_explain_says_after_one_pass_is_what_the_next_one_runs(lora_fused, graph_waits):
    """Also of the last modules of a pass. A graph that may be computed again keeps its group."""
    model, x = heads(), torch.randn(2, 5, 32, dtype=torch.float64)
    ours = kernelized(lora_fused, model)
    kept = ours(x) if graph_waits else step(ours, x)
    groups = {row.group for row in lora_fused.explain(ours)}
    count = fused_functions(step(ours, x)[0])
    assert (groups, count) == (({"single"}, 3) if graph_waits else ({"q+k+v"}, 1))
    del kept


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU multiplies by all A's at once")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_group_changes_no_bit_of_an_output(lora_fused, dtype):
    """The first pass, each alone, and the later ones, as a group: PEFT's own tests compare two passes."""
    model = heads(dtype, rank_pattern={}, alpha_pattern={})
    ours, x = kernelized(lora_fused, model), torch.randn(6, 32, dtype=dtype)
    first, *later = (step(ours, x)[0] for _ in range(3))
    assert fused_functions(later[-1]) == 1
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
    assert fused_functions(y) == 1
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
    assert fused_functions(result[0]) == 1


def test_order_of_calls_may_change(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    for names in (("v", "k", "q"), ("k", "q", "v"), ("q", "q", "k"), ("v", "k", "q")) * 2:
        assert_same(step(ours, x, names=names), step(model, x, names=names))


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
    assert fused_functions(inner(ours)(leaf * 1)) == 1
    model.zero_grad(), ours.zero_grad()
    forward(model).backward(), (first + second).backward()
    for name, p in ours.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, 2 * dict(model.named_parameters())[name].grad)


@pytest.mark.parametrize("masked", (("q", "k", "v"), ("k",)), ids="+".join)
def test_a_group_waits_for_reentrant_checkpoints(lora_fused, monkeypatch, masked):
    """Two forwards before their backwards, each with its own masks: y = J x + b and dx = Jᵀ dy with one mask in J."""
    ours, b = masked_heads(lora_fused, monkeypatch, masked)
    for _ in range(3):
        xs = [torch.randn(5, 32, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        dys = [torch.randn(5, 36, dtype=torch.float64) for _ in range(2)]
        ys = [checkpoint(inner(ours), x * 1, use_reentrant=True) for x in xs]
        torch.autograd.backward(ys, dys)
        for x, y, dy in zip(xs, ys, dys):
            torch.testing.assert_close(((y - b) * dy).sum(), (x * x.grad).sum())
    assert fused_functions(inner(ours)(torch.randn(5, 32, dtype=torch.float64, requires_grad=True))) == 1


def test_a_step_ends_the_wait_for_reentrant_checkpoints(lora_fused):
    """Calls without a gradient in training, which reinforcement learning makes before every step, look like theirs."""
    ours = kernelized(lora_fused, heads(lora_dropout=0.5))
    trained = [p for p in ours.parameters() if p.requires_grad]
    optimizer, x = torch.optim.SGD(trained, lr=0.1), torch.randn(5, 32, dtype=torch.float64, requires_grad=True)

    def forwards():
        with torch.no_grad():
            inner(ours)(x * 1), inner(ours)(x * 1)
        return inner(ours)(x * 1)

    for expected in (3, 1, 1):
        y = forwards()
        assert fused_functions(y) == expected
        y.square().sum().backward()
        del y
        optimizer.step()
        optimizer.zero_grad()


def test_a_recomputation_takes_nothing_from_its_forward(lora_fused):
    """Called first though it does not lead, q is computed a second time with k and v: for nobody."""
    model = heads()
    ours, others = kernelized(lora_fused, model), dict(names=("k", "v", "q"))
    assert_same(step(ours, x := torch.randn(5, 32, dtype=torch.float64), **others), step(model, x, **others))

    def run(each):
        leaf = x.clone().requires_grad_()
        y = checkpoint(inner(each), leaf * 1, use_reentrant=False)
        y.square().sum().backward()
        return y, {"x": leaf.grad}

    for _ in range(2):
        assert_same(run(ours), run(model))


def test_another_pass_over_the_same_input(lora_fused):
    """What the last one left over is of its graph, which is gone."""
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    ours = kernelized(lora_fused, model)
    inner(ours)(x.detach(), names=("k", "v", "q"))
    for _ in range(3):
        inner(ours)(x).sum().backward()


def test_a_graph_that_is_dropped_holds_nothing_up(lora_fused):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = kernelized(lora_fused, model)
    y = inner(ours)(x.clone())
    del y
    assert fused_functions(inner(ours)(x.clone())) == 1


def test_the_same_input_in_every_pass(lora_fused):
    """As a benchmark or a CUDA graph has it: the first sibling's next call begins a new pass."""
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    ours = kernelized(lora_fused, model)
    for _ in range(2):
        inner(ours)(x).sum().backward()
    assert fused_functions(inner(ours)(x)) == 1


def test_threads_do_not_mix(lora_fused):
    """Four at once, each with an input of its own, through one model that runs as a group."""
    model, turns = heads(), 20
    ours = learned(lora_fused, model, torch.randn(5, 32, dtype=torch.float64))
    inner(ours)(torch.randn(5, 32, dtype=torch.float64))
    start, passed, errors = threading.Barrier(4), [], []

    def work(seed):
        try:
            x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), device="cpu").to(
                DEVICE
            )
            expected = inner(model)(x).detach()
            start.wait(60)
            for turn in range(turns):
                with torch.set_grad_enabled(turn % 2 == 0):
                    y = inner(ours)(x * 1)
                torch.testing.assert_close(y.detach(), expected, rtol=1e-12, atol=1e-12)
                assert turn % 2 or fused_functions(y) == 1
                passed.append(seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not errors, errors
    assert all(passed.count(seed) == turns for seed in range(4))


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
    assert fused_functions(step(ours, x)[0]) == 3
