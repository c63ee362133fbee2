"""What `explain` says of modules that are computed together: a group and a gated MLP have one backend each, and a graph
has what a trace reads."""

import accelerate
import pytest
import torch
from helpers.cases import LINEARS, peft_llama
from helpers.compiling import Graphs, fresh_compiler
from helpers.heads import NAMES, heads, inner
from helpers.kernelizing import explain, fused_functions, kernelize_in_place
from helpers.llamas import passed, tokens

pytestmark = pytest.mark.usefixtures("on_device")
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")


def half_precision(lora_fused, dtype, wide=(), **config):
    """Adapters in the model's dtype but for some in float32, which the native op does not take beside it on a CPU."""
    model = peft_llama(dtype, shape=dict(num_hidden_layers=1), **config).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name and any(part in name for part in wide):
            parameter.data = parameter.data.float()
    return kernelize_in_place(lora_fused, model, "cpu").cpu()


def said(lora_fused, model, count=8192):
    rows = explain(lora_fused, model, count)
    return {row.module.rpartition(".")[2]: row for row in rows}


def projection(model, name):
    layer = model.base_model.model.model.layers[0]
    return getattr(layer.self_attn if name in ATTENTION else layer.mlp, name)


def test_a_group_has_one_backend(lora_fused):
    """One member that the native op does not take, and none of them goes to it; before there is a group, each alone."""
    model = half_precision(lora_fused, torch.bfloat16, wide=("k_proj",))
    before = said(lora_fused, model)
    assert [before[name].backend for name in ATTENTION] == ["native", "torch", "native"]
    for _ in range(2):
        passed(model, tokens().cpu())
    rows = said(lora_fused, model)
    assert {(rows[name].backend, rows[name].group) for name in ATTENTION} == {("torch", "q_proj+k_proj+v_proj")}
    seen = []
    hook = projection(model, "q_proj").register_forward_hook(lambda *call: seen.append(call[2]))
    model(input_ids=tokens().cpu())
    hook.remove()
    assert seen[0].grad_fn.name().startswith("LoraLinearFunction") and fused_functions(seen[0]) == 1
    assert rows["o_proj"].backend == "native"


@pytest.mark.parametrize("wide", MLP)
def test_a_gated_mlp_has_one_backend(lora_fused, wide):
    rows = said(lora_fused, half_precision(lora_fused, torch.bfloat16, wide=(wide,)))
    assert {(rows[name].layer, rows[name].backend) for name in MLP} == {("LoraGatedMLP", "torch")}


def test_members_that_are_left_out(lora_fused):
    """A member that is PEFT's is in no group, and the rest is known by what is left: at once where the first one still
    computes it, from the next pass on where that is gone."""
    model = half_precision(lora_fused, torch.bfloat16, wide=("k_proj",))
    for _ in range(2):
        passed(model, tokens().cpu())
    k = projection(model, "k_proj")
    k.merge()
    rows = said(lora_fused, model)
    assert not rows["k_proj"].fused
    assert {(rows[name].backend, rows[name].group) for name in ("q_proj", "v_proj")} == {("native", "q_proj+v_proj")}
    k.unmerge()
    projection(model, "q_proj").merge()
    rows = said(lora_fused, model)
    assert [(rows[name].backend, rows[name].group) for name in ATTENTION[1:]] == [
        ("torch", "single"),
        ("native", "single"),
    ]
    for _ in range(2):
        passed(model, tokens().cpu())
    rows = said(lora_fused, model)
    assert {(rows[name].backend, rows[name].group) for name in ATTENTION[1:]} == {("torch", "k_proj+v_proj")}


def test_a_small_gated_mlp_is_one_answer(lora_fused, monkeypatch):
    """Its first adapted projection decides for all: with DoRA there, none is PEFT's, however few rows."""
    for name, value in (("_SMALL_ANYWHERE", True), ("SMALL_ROWS", 512)):
        monkeypatch.setattr(lora_fused.peft.small_batch, name, value)
    model = (
        kernelize_in_place(lora_fused, peft_llama(use_dora=True, shape=dict(num_hidden_layers=1)), "cpu").cpu().eval()
    )
    for name in MLP[1:]:  # plain LoRA, of which PEFT asks little
        part = projection(model, name)
        part.lora_variant.clear()
        part.lora_magnitude_vector.clear()
    with torch.no_grad(), lora_fused.record() as calls:
        rows = said(lora_fused, model, tokens().numel())
        model(input_ids=tokens().cpu())
    assert calls.of(model.base_model.model.model.layers[0].mlp)["fused"] == 1
    assert {(rows[name].layer, rows[name].fused) for name in MLP} == {("LoraGatedMLP", True)}


SCALED = {"q_proj": dict(traced_linear=3, traced_gated_mlp=1), "up_proj": dict(traced_linear=6)}


@pytest.mark.parametrize("name", ("q_proj", "up_proj", "embed_tokens"))
def test_a_scaling_that_a_graph_does_not_read(lora_fused, name):
    """Of an adapter in float16: an eager call reads the tensor's value, a trace leaves the module to PEFT."""
    with fresh_compiler():
        model = half_precision(lora_fused, torch.float16, target_modules=[*LINEARS, "embed_tokens"])
        inner = model.base_model.model.model
        part = inner.embed_tokens if name == "embed_tokens" else projection(model, name)
        part.scaling["default"] = torch.tensor(part.scaling["default"], device="cpu")
        assert all(row.fused for row in explain(lora_fused, model))
        graphs = Graphs(lora_fused)
        model.compile(backend=graphs)
        before = said(lora_fused, model)
        passed(model, tokens().cpu())
        ops = dict(traced_embedding=1, **SCALED[name]) if name in SCALED else dict(traced_linear=4, traced_gated_mlp=1)
        assert graphs.ops == ops
        for rows in (before, said(lora_fused, model)):
            assert [key for key, row in rows.items() if not row.fused] == [name]
            assert "float16" in rows[name].reason
            others = {rows[each].mlp for each in MLP if each != name}
            assert others == ({f"up_proj: {rows[name].reason}"} if name == "up_proj" else {None})


OBSERVED = {
    "none": lambda layer: None,
    "a hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "a hook before it": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "accelerate's": lambda layer: accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook()),
}


@pytest.mark.parametrize("watch", OBSERVED.values(), ids=OBSERVED)
@pytest.mark.parametrize("name", NAMES)
def test_a_member_that_somebody_watches(lora_fused, monkeypatch, name, watch):
    """What sees its input before our forward does is called with it; the first one leads all the same."""
    ours, x = lora_fused.apply(heads()), torch.randn(5, 32, dtype=torch.float64)
    watch(getattr(inner(ours), name))
    inner(ours)(x)
    groups = {name: row.group for name, row in said(lora_fused, ours).items()}
    sizes, own = [], lora_fused.functional.dispatch.compute_group

    def counted(x, projections, *args, **kwargs):
        sizes.append(len(projections))
        return own(x, projections, *args, **kwargs)

    monkeypatch.setattr(lora_fused.functional.dispatch, "compute_group", counted)
    inner(ours)(x)
    leaves_out = name != "q" and watch not in (OBSERVED["none"], OBSERVED["a hook"])
    together = [each for each in NAMES if not (leaves_out and each == name)]
    assert groups == {each: "+".join(together) if each in together else "single" for each in NAMES}
    assert sorted(sizes) == ([1, 2] if leaves_out else [3])
