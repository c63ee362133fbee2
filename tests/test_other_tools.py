"""Beside other tools: kernelizing again, accelerate's hooks, weights on meta, torch.compile."""

import copy
import importlib

import accelerate
import pytest
import torch
from helpers.cases import DEVICE, LINEARS, peft_llama, tiny_llama
from helpers.heads import assert_same, heads, inner, learned, step, take_out
from helpers.kernelizing import explain, fused_functions, kernelize_in_place, ours_in
from helpers.llamas import tokens
from helpers.mlps import assert_same as assert_same_mlp, glu, mlp_of, step as mlp_step
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import prune

pytestmark = pytest.mark.usefixtures("on_device")


def test_kernelizing_again(lora_fused):
    """As transformers does at train() and eval(): the registration is global, so nothing reverts."""
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    for mode in (Mode.INFERENCE, Mode.TRAINING, Mode.INFERENCE):
        kernelize(ours.train(mode == Mode.TRAINING), mode=mode, device=DEVICE)
        assert all(row.fused for row in explain(lora_fused, ours))
        result = step(ours, x)
        assert_same(result, step(model, x))
        assert fused_functions(result[0]) == 1


class Tripled(accelerate.hooks.ModelHook):
    def post_forward(self, module, output):
        return 3 * output


@pytest.mark.parametrize("first", (True, False), ids=("hook first", "kernelized first"))
def test_hooks_of_accelerate(lora_fused, first):
    """They replace a module's forward and keep the one they found."""
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = copy.deepcopy(model)
    if not first:
        ours = learned(lora_fused, ours, x)
    for each in (model, ours):
        accelerate.hooks.add_hook_to_module(inner(each).k, Tripled())
    if first:
        lora_fused.register_peft_layers()
        kernelize(ours, mode=Mode.TRAINING, device=DEVICE)
    for _ in range(3):
        assert_same(step(ours, x), step(model, x))
    with lora_fused.record() as calls:
        step(ours, x)
    rows = {row.module.rpartition(".")[2]: row for row in lora_fused.explain(ours, calls=calls)}
    theirs = "another tool set its forward: accelerate.hooks.add_hook_to_module.<locals>.new_forward"
    assert {name: row.reason for name, row in rows.items()} == dict(q=None, k=theirs if first else None, v=None)
    if first:
        assert rows["k"].calls == ()
    else:  # the hook calls what it found, alone
        assert rows["k"].calls == (("fused", 1),) and rows["k"].group == "single" and rows["k"].last == "fused"
    assert rows["q"].group == rows["v"].group == "q+v"
    for each in (model, ours):
        accelerate.hooks.remove_hook_from_module(inner(each).k)
    assert_same(step(ours, x), step(model, x))


def on_its_device(layer, **options):
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook(DEVICE, **options))


def no_gradient(layer):
    on_its_device(layer)
    layer._hf_hook.no_grad = True


def wrapped_again(layer):
    on_its_device(layer)
    inner_forward = layer.forward
    layer.forward = lambda x: 2 * inner_forward(x)


WITHOUT_EFFECT = {
    "as device_map has it": on_its_device,
    "and back": lambda layer: on_its_device(layer, io_same_device=True),
}
WITH_EFFECT = {
    "offload": lambda layer: on_its_device(layer, offload=True, weights_map=dict(layer.named_parameters())),
    "no gradient": no_gradient,
    "another hook": lambda layer: accelerate.hooks.add_hook_to_module(layer, Tripled()),
    "wrapped again": wrapped_again,
}


@pytest.mark.parametrize("hook", (WITHOUT_EFFECT | WITH_EFFECT).values(), ids=WITHOUT_EFFECT | WITH_EFFECT)
def test_hooks_of_accelerate_on_a_base(lora_fused, hook):
    """`device_map` puts them there before PEFT comes; one that only moves inputs is passed over."""
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    for each in (model, ours := learned(lora_fused, model, x)):
        hook(inner(each).k.base_layer)
    for _ in range(3):
        result = step(ours, x)
        assert_same(result, step(model, x))
    reason = reason_of_k(lora_fused, ours)
    if hook in WITHOUT_EFFECT.values():
        assert fused_functions(result[0]) == 1 and reason is None
    else:
        assert "base_layer has a forward of its own" in reason


def test_a_model_with_a_device_map(lora_fused):
    """As on several GPUs: every module with weights has a hook, and PEFT comes after that."""
    base = tiny_llama()
    accelerate.hooks.attach_execution_device_hook(base.to(DEVICE), DEVICE)
    assert "forward" in vars(base.model.layers[0].mlp.gate_proj)
    targets = [*LINEARS, "embed_tokens"]
    options = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    model, ids = get_peft_model(base, options), tokens()

    def passed():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    theirs = passed()
    lora_fused.register_peft_layers()
    kernelize(model, mode=Mode.TRAINING, device=DEVICE)
    for _ in range(3):
        torch.testing.assert_close(passed(), theirs, rtol=1e-4, atol=1e-6)
    rows = explain(lora_fused, model)
    assert all(row.fused for row in rows)
    assert {row.group for row in rows} == {"single", "q_proj+k_proj+v_proj", "gate_proj+up_proj"}


PARTS = ("base_layer", "lora_A.default", "lora_B.default")


def reason_of_k(lora_fused, ours):
    return next(row.reason for row in explain(lora_fused, ours) if row.module.endswith(".k"))


def test_weights_that_are_fetched_when_read(lora_fused):
    """As DeepSpeed's ZeRO-3 has them, with hooks on every module: a fused forward looks at none."""
    reads = []

    class Fetching(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours, counts = learned(lora_fused, model, x), []
    for each in (model, ours):
        for part in inner(each).modules():
            part._parameters = Fetching(part._parameters)
            part.register_forward_pre_hook(lambda *_: None)
        reads.clear()
        inner(each)(x)
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0
    assert "hooks" in reason_of_k(lora_fused, ours)


TAKE_OUT = {
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm": lambda layer: torch.nn.utils.weight_norm(layer),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("tool", TAKE_OUT.values(), ids=TAKE_OUT)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_tools_that_take_a_weight_out(lora_fused, part, tool):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    for each in (model, ours):
        tool(inner(each).k.get_submodule(part))
    for _ in range(3):
        assert_same(step(ours, x), step(model, x))
    assert "has hooks" in reason_of_k(lora_fused, ours)


@pytest.mark.parametrize("dora", (False, True), ids=("LoRA", "DoRA"))
def test_tensors_in_place_of_parameters(lora_fused, dora):
    """As FSDP1 puts them, with the graph of the parameters that they are made of."""
    model, x = heads(use_dora=dora), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    puts = []
    for each in (model, ours):
        k = inner(each).k
        puts.append(
            take_out((k.base_layer, k.lora_A["default"], k.lora_B["default"], *k.lora_magnitude_vector.values()))
        )
    for _ in range(3):
        for put in puts:
            put()
        result = step(ours, x)
        assert_same(result, step(model, x))
        assert fused_functions(result[0]) == 1
    assert reason_of_k(lora_fused, ours) is None


@pytest.mark.parametrize("name", ("weight", "bias"))
@pytest.mark.parametrize("part", PARTS)
def test_what_is_no_parameter_is_found_by_peft(lora_fused, part, name):
    model, x = heads(), torch.randn(5, 32, dtype=torch.float64)
    ours = learned(lora_fused, model, x)
    for each in (model, ours):
        layer = inner(each).k.get_submodule(part)
        layer._buffers[name] = layer._parameters.pop(name)
    for _ in range(3):
        assert_same(step(ours, x), step(model, x))
    assert f"'{name}' is not where it belongs" in reason_of_k(lora_fused, ours)


def vectorized(model, x, parameters):
    return torch.func.vmap(model)(x)


def gradients(model, x, parameters):
    def loss(given):
        return torch.func.functional_call(model, given, (x,)).square().sum()

    return list(torch.func.grad(loss)(parameters).values())


def pushed_forward(model, x, parameters):
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))


def dual(model, x, parameters):
    with torch.autograd.forward_ad.dual_level():
        y = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        return torch.autograd.forward_ad.unpack_dual(y)


def traced(model, x, parameters):
    """By torch.jit, and run on more rows than it was traced with."""
    return torch.jit.trace(model, (x[:2],))(x)


def exported(model, x, parameters):
    return torch.export.export(model, (x,)).module()(x)


def node_names(y):
    names, queue = set(), [y.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None:
            names.add(node.name())
            queue.extend(parent for parent, _ in node.next_functions)
    return names


@pytest.mark.parametrize("transformed", (vectorized, gradients, pushed_forward, dual, traced, exported))
@pytest.mark.parametrize("make,node", ((heads, "NativeGroup"), (glu, "NativeGated")), ids=("heads", "gated"))
def test_transforms_of_functions_run_peft_s_forward(lora_fused, make, node, transformed):
    """Whatever ran before, and what runs after is fused again."""
    model = make()
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    ours = copy.deepcopy(model)
    lora_fused.register_peft_layers()
    kernelize(ours, mode=Mode.TRAINING, device=DEVICE)
    for _ in range(3):
        inner(ours)(x)
    before = inner(ours)(x)
    results = [
        transformed(inner(each), x, {name: p.detach() for name, p in inner(each).named_parameters()})
        for each in (ours, model)
    ]
    torch.testing.assert_close(*results)
    after = inner(ours)(x)
    torch.testing.assert_close(after, before)
    assert any(node in name for name in node_names(after))


def test_a_hook_on_a_gated_mlp_stays(lora_fused):
    """Its projections are fused alone, inside the forward that the hook found."""
    model, x = glu(), torch.randn(5, 32, dtype=torch.float64)
    ours = copy.deepcopy(model)
    for each in (model, ours):
        accelerate.hooks.add_hook_to_module(mlp_of(each), Tripled())
    ours = kernelize_in_place(lora_fused, ours)
    for _ in range(2):
        assert_same_mlp(mlp_step(ours, x), mlp_step(model, x))
    rows = explain(lora_fused, ours)
    assert all(row.fused and row.layer == "LoraLinear" for row in rows), str(rows)


def test_a_hook_on_an_embedding_stays(lora_fused):
    base = nn.Sequential()
    base.add_module("table", nn.Embedding(20, 8))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["table"], init_lora_weights=False))
    ours, ids = copy.deepcopy(model), torch.arange(5)
    for each in (model, ours):
        accelerate.hooks.add_hook_to_module(inner(each).table, Tripled())
    ours = kernelize_in_place(lora_fused, ours)
    assert torch.equal(ours(ids), model(ids))
    assert explain(lora_fused, ours)[0].reason.startswith("another tool set its forward: accelerate.hooks.")


@pytest.mark.parametrize("dora", (False, True))
def test_gradients_of_a_function_of_an_embedding(lora_fused, dora):
    base = nn.Sequential()
    base.add_module("table", nn.Embedding(20, 8))
    config = LoraConfig(r=2, target_modules=["table"], init_lora_weights=False, use_dora=dora)
    model = get_peft_model(base, config)
    ours, ids = kernelize_in_place(lora_fused, copy.deepcopy(model)), torch.arange(5)
    assert explain(lora_fused, ours)[0].fused
    parameters = {name: p.detach() for name, p in inner(model).named_parameters()}
    torch.testing.assert_close(gradients(inner(ours), ids, parameters), gradients(inner(model), ids, parameters))


@pytest.mark.parametrize("first", (True, False), ids=("offloaded first", "kernelized first"))
def test_weights_on_meta_until_a_hook_fires(lora_fused, first):
    model = peft_llama().eval()
    ours = copy.deepcopy(model) if first else kernelize_in_place(lora_fused, copy.deepcopy(model))
    accelerate.cpu_offload(ours, execution_device=torch.device(DEVICE))
    if first:  # `kernelize(ours)` would take the hooks off the norms
        kernelize_adapted = importlib.import_module(f"{lora_fused.__name__}.binding").kernelize_adapted
        kernelize_adapted(ours, mode=Mode.INFERENCE)
    assert any(p.is_meta for p in ours.parameters())
    assert not any(row.fused for row in explain(lora_fused, ours))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(ours(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


@pytest.mark.parametrize("first", (True, False), ids=("offloaded first", "kernelized first"))
def test_layers_of_which_some_are_on_disk(lora_fused, tmp_path, first):
    """What is said is what runs: accelerate's hook on a module that stays where it is calls the forward that it
    found."""
    model = peft_llama().eval()
    names, layer = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "base_model.model.model.layers"
    places = {f"base_model.model.{name}": DEVICE for name in names} | {f"{layer}.0": DEVICE, f"{layer}.1": "disk"}
    ours = copy.deepcopy(model) if first else lora_fused.apply(copy.deepcopy(model))
    accelerate.dispatch_model(ours, places, main_device=DEVICE, offload_dir=tmp_path, force_hooks=True)
    if first:
        lora_fused.apply(ours)
    with lora_fused.record() as calls, torch.no_grad():
        for _ in range(2):
            result, expected = ours(input_ids=tokens()).logits, model(input_ids=tokens()).logits
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)
    rows = lora_fused.explain(ours, calls=calls)
    assert [row.fused for row in rows] == ([False] * 14 if first else [True] * 7 + [False] * 7)
    for row in rows:
        assert row.calls == (() if first else ((row.reason or "fused", 2),)), row
        assert row.fused or ("set" in row.reason and "tool" in row.suggestion)
    mlps = [] if first else ["gate_proj: another tool set its forward"] * 3
    assert [row.mlp for row in rows if row.mlp] == mlps
    lora_fused.restore(ours)
    assert ours_in(lora_fused, ours) == []
    with lora_fused.record() as calls, torch.no_grad():
        torch.testing.assert_close(ours(input_ids=tokens()).logits, model(input_ids=tokens()).logits)
    assert calls.total == {}


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_a_compiled_model(lora_fused, backend):
    """Compiled in one graph, and trained; fused there, and outside of the compiler."""
    model = peft_llama()
    ours = kernelize_in_place(lora_fused, copy.deepcopy(model))
    torch.compiler.reset()
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    grads = []
    for each in (model, compiled):
        loss = each(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        grads.append([p.grad for p in each.parameters() if p.requires_grad])
    torch.testing.assert_close(grads[1], grads[0])
    rows = explain(lora_fused, ours)
    assert {(row.fused, row.backend, row.last) for row in rows} == {
        (True, "native, compiled", lora_fused.last_call.TRACED)
    }
    ours(input_ids=tokens(), labels=tokens())
    assert all(row.fused and row.last == "fused" for row in explain(lora_fused, ours))
