"""State that changes after a model was compiled: the next call computes as PEFT's eager one does then, and what was
replaced is called."""

import copy
import functools

import pytest
import torch
from helpers.compiling import FUSED_BLOCK, Graphs, assert_same, block, fresh_compiler, results, x_of
from helpers.kernelizing import kernelized
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F

MLP_APART = dict(traced_linear=7)


@pytest.fixture
def compiled(lora_fused):
    """(PEFT's model, ours with PEFT's state, its graphs), of a block that was compiled and called."""

    def make(**config):
        model = block(**config)
        ours, graphs = kernelized(lora_fused, model, "cpu"), Graphs(lora_fused, "eager")
        ours.compile(backend=graphs, fullgraph=True)
        check(ours, model)
        assert graphs.ops == FUSED_BLOCK
        graphs.traced.clear()
        return model, ours, graphs

    with fresh_compiler():
        yield make


def check(ours, model):
    assert_same(results(ours, x_of()), results(model, x_of()))


def some_slow(values, *fast):
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def changed(change, *models):
    for model in models:
        change(model)


def named(model, name):
    (found,) = [module for path, module in model.named_modules() if path.endswith(name)]
    return found


def layers_of(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def merge(model):
    model.merge_adapter()


def merge_one(model):
    named(model, "k_proj").merge()


def activate_two(model):
    model.base_model.set_adapter(["default", "other"])


def disable(model):
    model.disable_adapter_layers()


# ---- what PEFT's own methods change ----


@pytest.mark.parametrize("change", (merge, disable, activate_two), ids=lambda f: f.__name__)
def test_peft_computes(compiled, change):
    """No op of this package is in the new graph."""
    model, ours, graphs = compiled(others=["other"])
    changed(change, model, ours)
    check(ours, model)
    assert graphs.traced and not graphs.ops


def test_merged_and_not_merged_again(compiled):
    model, ours, graphs = compiled()
    changed(merge, model, ours)
    check(ours, model)
    changed(lambda each: each.unmerge_adapter(), model, ours)
    check(ours, model)
    assert not graphs.ops  # the first graph serves again


@pytest.mark.slow
def test_one_linear_is_merged(compiled):
    model, ours, graphs = compiled()
    changed(merge_one, model, ours)
    check(ours, model)
    assert graphs.ops == dict(FUSED_BLOCK, traced_linear=3)


@pytest.mark.slow
def test_disabled_for_a_block(compiled):
    model, ours, _ = compiled()
    with model.disable_adapter(), ours.disable_adapter():
        theirs, mine = (results(each, x_of()) for each in (model, ours))
    assert_same(mine, theirs)
    check(ours, model)


def test_another_adapter(compiled):
    model, ours, graphs = compiled(others=["other"])
    before = results(ours, x_of())["y"]
    changed(lambda each: each.set_adapter("other"), model, ours)
    check(ours, model)
    assert not torch.equal(results(ours, x_of())["y"], before) and graphs.ops == FUSED_BLOCK


def test_an_adapter_is_added_and_activated(compiled):
    model, ours, graphs = compiled()
    torch.manual_seed(2)
    targets = ["q_proj", "up_proj"]
    for each in (model, ours):
        each.add_adapter("late", LoraConfig(r=2, target_modules=targets), autocast_adapter_dtype=False)
    late = {name: torch.randn_like(p) for name, p in model.named_parameters() if ".late." in name}
    assert len(late) == 4
    for each in (model, ours):
        for name, p in each.named_parameters():
            if name in late:
                p.data = late[name].clone()
        each.set_adapter("late")
    check(ours, model)
    assert graphs.ops == dict(traced_linear=2)  # gate has none, so the MLP is none of ours


@pytest.mark.slow
def test_evaluation(compiled):
    model, ours, _ = compiled()
    changed(lambda each: each.eval(), model, ours)
    check(ours, model)
    with torch.no_grad():
        torch.testing.assert_close(ours(x_of()), model(x_of()), rtol=0, atol=1e-12)


def test_scalings(compiled):
    model, ours, _ = compiled()
    for scaling in (0.25, 3.0):
        for each in (model, ours):
            for layer in layers_of(each):
                layer.set_scale("default", scaling)
        check(ours, model)


def test_parameters_in_place_and_exchanged(compiled):
    """As an optimizer and as `load_state_dict(assign=True)` change them."""
    model, ours, graphs = compiled()
    with torch.no_grad():
        for each in (model, ours):
            for name, p in each.named_parameters():
                if "lora_B" in name:
                    p.mul_(-2.0)
    check(ours, model)
    assert not graphs.traced
    state = {name: 0.5 * value for name, value in model.state_dict().items()}
    for each in (model, ours):
        each.load_state_dict(state, assign=True)
    check(ours, model)


@pytest.mark.slow
def test_a_parameter_that_is_frozen(compiled):
    model, ours, _ = compiled()
    for each in (model, ours):
        named(each, "q_proj.lora_A.default").weight.requires_grad_(False)
    check(ours, model)


@pytest.mark.slow
def test_moved_to_another_dtype(compiled):
    model, ours, graphs = compiled()
    changed(lambda each: each.float(), model, ours)
    assert_same(*(results(each, x_of(dtype=torch.float32)) for each in (ours, model)), 1e-5)
    assert graphs.ops == FUSED_BLOCK


# ---- what other tools replace ----


def test_the_function_of_linears_is_replaced(compiled, monkeypatch):
    model, ours, graphs = compiled()
    own = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: 1.5 * own(x, weight, bias))
    check(ours, model)
    assert not graphs.ops


def test_the_forward_of_linears_is_replaced(compiled, monkeypatch):
    model, ours, graphs = compiled()
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: own(self, x) + 1.0)
    check(ours, model)
    assert not graphs.ops


def test_peft_s_forward_is_replaced(compiled, monkeypatch):
    from peft.tuners.lora import Linear

    model, ours, graphs = compiled()
    own = Linear.forward

    @functools.wraps(own)
    def forward(self, x, *args, **kwargs):
        return own(self, x, *args, **kwargs) * 2.0

    monkeypatch.setattr(Linear, "forward", forward)
    check(ours, model)
    assert not graphs.ops


def test_the_function_of_an_activation_is_replaced(compiled, monkeypatch):
    """Dynamo itself applies such a replacement twice, so compiled PEFT is what ours is held against."""
    model, ours, graphs = compiled()
    model.compile(backend="eager")
    check(ours, model)
    own = F.silu
    monkeypatch.setattr(F, "silu", lambda x, inplace=False: own(x) + 0.5)
    check(ours, model)
    assert graphs.ops == MLP_APART


HOOKED = {
    "q_proj": FUSED_BLOCK,  # the call runs it, around ours
    "q_proj.lora_A.default": dict(FUSED_BLOCK, traced_linear=3),
    "q_proj.base_layer": dict(FUSED_BLOCK, traced_linear=3),
    "gate_proj": MLP_APART,
    "act_fn": MLP_APART,
}


def guards_hooks():
    """Whether Dynamo guards that a module has no hooks where a forward asks: torch 2.15 does, 2.13 does not."""
    part = nn.Identity()
    compiled = torch.compile(lambda x: x + 1 if part.__dict__["_forward_hooks"] else x + 0, backend="eager")
    compiled(torch.zeros(1))
    part.register_forward_hook(lambda module, args, result: None)
    return compiled(torch.zeros(1)).item() == 1


@pytest.mark.parametrize("place", some_slow(HOOKED, "q_proj.lora_A.default", "act_fn"))
def test_a_hook(compiled, place):
    """A graph has the hooks that were there before; where Dynamo guards what is read of them, it is traced anew."""
    model, ours, graphs = compiled()
    before = results(ours, x_of())
    for each in (model, ours):
        named(each, place).register_forward_hook(lambda module, args, result: result * 1.5)
    assert_same(results(ours, x_of()), results(model, x_of()) if guards_hooks() else before)
    torch.compiler.reset()
    graphs.traced.clear()
    check(ours, model)
    assert graphs.ops == HOOKED[place]


PARTS = "k_proj.lora_B.default", "k_proj.base_layer", "up_proj.lora_A.default", "act_fn"


@pytest.mark.parametrize("place", some_slow(PARTS, "k_proj.lora_B.default", "act_fn"))
def test_a_forward_on_an_instance(compiled, place):
    model, ours, graphs = compiled()
    for each in (model, ours):
        part = named(each, place)
        part.forward = functools.partial(lambda own, x: own(x) * 3.0, part.forward)
    check(ours, model)
    in_mlp = {"up_proj.lora_A.default": dict(traced_linear=6), "act_fn": MLP_APART}
    assert graphs.ops == in_mlp.get(place, dict(FUSED_BLOCK, traced_linear=3))


def test_a_forward_on_a_projection_of_the_mlp(compiled):
    model, ours, graphs = compiled()
    for each in (model, ours):
        part = named(each, "up_proj")
        part.forward = functools.partial(lambda own, x: own(x) * 3.0, part.forward)
    check(ours, model)
    assert graphs.ops == MLP_APART


# ---- modules that are exchanged ----


@pytest.mark.slow
def test_another_activation(compiled):
    model, ours, graphs = compiled()
    for each in (model, ours):
        named(each, "mlp").act_fn = nn.GELU()
    check(ours, model)
    assert graphs.ops == FUSED_BLOCK


def test_an_activation_with_another_attribute(compiled):
    model, ours, graphs = compiled()
    for each in (model, ours):
        named(each, "mlp").act_fn = nn.GELU()
    check(ours, model)
    for each in (model, ours):
        named(each, "mlp").act_fn.approximate = "tanh"
    check(ours, model)
    assert named(ours, "mlp").act_fn.approximate == "tanh"


def test_an_activation_that_is_no_gate(compiled):
    """Of a class that nobody knows, with a parameter."""
    model, ours, graphs = compiled()
    for each in (model, ours):
        named(each, "mlp").act_fn = nn.PReLU(init=0.3, dtype=torch.float64)
    check(ours, model)
    assert graphs.ops == MLP_APART


@pytest.mark.slow
def test_the_probability_of_a_dropout(compiled):
    """From none to one that is drawn: PEFT's mask is torch's, ours is not, so p = 1 tells."""
    model, ours, graphs = compiled(lora_dropout=1e-9)
    for each in (model, ours):
        named(each, "q_proj").lora_dropout["default"].p = 1.0
    check(ours, model)
    assert graphs.ops == FUSED_BLOCK


@pytest.mark.slow
def test_a_dropout_of_another_kind(compiled):
    model, ours, graphs = compiled(lora_dropout=1e-9)
    for each in (model, ours):
        named(each, "q_proj").lora_dropout["default"] = nn.Tanh()
    check(ours, model)
    assert graphs.ops == dict(FUSED_BLOCK, traced_linear=3)


def test_a_variant_that_is_not_known(compiled):
    """A subclass of DoRA's, put where PEFT keeps an adapter's variant."""
    from peft.tuners.lora.variants import DoraLinearVariant

    class Other(DoraLinearVariant):
        @staticmethod
        def forward(module, active_adapter, x, result, **kwargs):
            return result * 2.0

    model, ours, graphs = compiled(use_dora=True)
    for each in (model, ours):
        named(each, "q_proj").lora_variant["default"] = Other()
    check(ours, model)
    assert graphs.ops == dict(FUSED_BLOCK, traced_linear=3)


# ---- copies ----


def test_copied_and_pickled(lora_fused, compiled, tmp_path):
    """What a trace leaves on a module goes with none of them, and `restore` takes it away."""
    model, ours, _ = compiled()
    attribute = lora_fused.peft.gated_mlp.TRACED
    mlp = named(ours, "mlp")
    assert attribute in vars(mlp)
    assert ours.state_dict().keys() == model.state_dict().keys()
    twin = copy.deepcopy(ours)
    check(twin, model)
    torch.save(ours, tmp_path / "model.pt")
    assert lora_fused.__name__.encode() not in (tmp_path / "model.pt").read_bytes()
    check(torch.load(tmp_path / "model.pt", weights_only=False), model)
    lora_fused.restore(ours)
    assert attribute not in vars(mlp)
    check(ours, model)


def test_restored_and_applied_again(lora_fused, compiled):
    model, ours, graphs = compiled()
    lora_fused.restore(ours)
    check(ours, model)
    assert graphs.traced and not graphs.ops
    graphs.traced.clear()
    lora_fused.apply(ours)
    check(ours, model)
    assert graphs.ops in (FUSED_BLOCK, {})  # the first graph may serve again


@pytest.mark.slow
def test_what_is_changed_by_a_class_of_the_base(compiled):
    """The base of a linear becomes one of a class that nobody knows."""

    class Twice(nn.Linear):
        def forward(self, x):
            return 2.0 * super().forward(x)

    model, ours, graphs = compiled()
    for each in (model, ours):
        named(each, "v_proj.base_layer").__class__ = Twice
    check(ours, model)
    assert graphs.ops == dict(FUSED_BLOCK, traced_linear=3)
