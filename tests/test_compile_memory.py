"""What compiled layers keep for their backward: what frozen ones keep, and little more. Graphs are those of Inductor's
joint passes and of its partitioner, and run without what it makes of them."""

import functools
import importlib
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers.cases import randomise_adapters, tiny_llama
from helpers.compiling import fresh_compiler
from helpers.kernelizing import kernelize_in_place
from helpers.siblings import K, Siblings, assert_same
from peft import LoraConfig, get_peft_model
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import partition_fn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import remove_noop_ops
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import checkpoint as checkpoints

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _fresh():
    with fresh_compiler():
        yield


class Partitioned:
    """A backend that runs the graphs that Inductor would compile, and keeps them: forwards, backwards, and of each the
    nodes that are saved."""

    def __init__(self):
        self.forwards, self.backwards, self.saved = [], [], []

    def __call__(self, module, inputs, **options):
        return aot_autograd(
            fw_compiler=self._run, bw_compiler=self._run, partition_fn=self._split,
            decompositions=select_decomp_table(),
        )(module, inputs)  # fmt: skip

    def _split(self, module, inputs, num_fwd_outputs, **options):
        fake = next(v for v in (node.meta.get("val") for node in module.graph.nodes) if isinstance(v, FakeTensor))
        with V.set_fake_mode(fake.fake_mode):
            forward, backward = partition_fn(module, inputs, num_fwd_outputs=num_fwd_outputs, **options)
        (output,) = forward.graph.find_nodes(op="output")
        self.forwards.append(forward)
        self.backwards.append(backward)
        self.saved.append(output.args[0][num_fwd_outputs:])
        return forward, backward

    def _run(self, module, inputs):
        return make_boxed_func(module.forward)


# ---- a Llama's layer ----

BATCH, TOKENS, H, KV, I, HEADS, R = 2, 13, 64, 16, 128, 4, 3
M = BATCH * TOKENS
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def kept(*sizes, dtype=torch.bfloat16):
    """[M, size] of each."""
    return Counter((M * size, dtype) for size in sizes)


def vectors(*sizes, dtype=torch.float32):
    return Counter((size, dtype) for size in sizes)


# Layer's input, residual stream, q, k, v, attention's result, gate and up; variances; attention's logsumexp.
FROZEN = kept(H, H, H, KV, KV, H, I, I) + kept(1, 1, HEADS, dtype=torch.float32)
LORA = kept(3 * R, R, 2 * R, R)
SEEDS = vectors(3, 1, 3, dtype=torch.int64)
DORA = kept(H, KV, KV, H, H) + vectors(H, KV, KV, H, I, I, H) + vectors(H, KV, KV, H, I, I, H)
# By name: PEFT's configuration, and what the layer keeps besides what the frozen one does. DoRA has gate and up before
# their scale, and with dropout one of them as it is, too.
VARIANTS = {
    "LoRA": ({}, LORA),
    "LoRA, dropout": (dict(lora_dropout=0.1), LORA + SEEDS),
    "LoRA, gated MLP": (dict(target_modules=["gate_proj", "up_proj", "down_proj"]), kept(2 * R, R)),
    "DoRA": (dict(use_dora=True), LORA + DORA),
    "DoRA, dropout": (dict(use_dora=True, lora_dropout=0.1), LORA + SEEDS + DORA + kept(I)),
    "NF4": ({}, LORA),
}  # fmt: skip


def llama(variant=None, layers=1):
    shape = dict(hidden_size=H, intermediate_size=I, num_attention_heads=HEADS, num_key_value_heads=1)
    base = tiny_llama(torch.bfloat16, **shape, num_hidden_layers=layers, use_cache=False)
    if variant == "NF4":
        from helpers.quantized import four_bit, replace

        replace(base, lambda linear: four_bit(linear, torch.bfloat16, "cpu"), LINEARS)
    if variant is None:
        return base.requires_grad_(False).train()
    config = {**dict(r=R, lora_alpha=6, target_modules=LINEARS), **VARIANTS[variant][0]}
    model = get_peft_model(base, LoraConfig(**config))
    randomise_adapters(model, torch.float32)
    return model.train()


def run(model):
    x = torch.randn(BATCH, TOKENS, H, dtype=torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(inputs_embeds=x).logits
    y.float().square().mean().backward()


def sizes_of(nodes):
    """Elements and dtype of each."""
    return Counter((node.meta["val"].numel(), node.meta["val"].dtype) for node in nodes)


def made(graphs):
    """What the one graph keeps besides its inputs."""
    (saved,) = graphs.saved
    return [node for node in saved if node.op != "placeholder"]


def layer_sizes(model):
    """What a decoder layer keeps: its input and what it has made."""
    graphs = Partitioned()
    for layer in model.modules():
        if type(layer).__name__ == "LlamaDecoderLayer":
            layer.compile(backend=graphs, fullgraph=True, dynamic=False)
    run(model)
    kept_inputs = [node for node in graphs.saved[0] if node.op == "placeholder"]
    x = [node for node in kept_inputs if tuple(node.meta["val"].shape) == (BATCH, TOKENS, H)]
    assert len(x) == 1
    return sizes_of(x + made(graphs))


def test_a_frozen_layer():
    assert layer_sizes(llama()) == FROZEN


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer(lora_fused, variant):
    """No output of a norm, and no activation."""
    model = kernelize_in_place(lora_fused, llama(variant), "cpu")
    assert layer_sizes(model) == FROZEN + VARIANTS[variant][1]


@pytest.mark.slow
def test_a_whole_model(lora_fused):
    found = []
    for model in (llama(layers=2), kernelize_in_place(lora_fused, llama("LoRA", layers=2), "cpu")):
        graphs = Partitioned()
        model.compile(backend=graphs, fullgraph=True, dynamic=False)
        run(model)
        found.append(sizes_of(made(graphs)))
    assert found[1] == found[0] + LORA + LORA


# ---- whether x is computed again ----

SQUARE = ((K, 8, 0.0, False, False),) * 2


def compiled(lora_fused, body, graphs, dtype=torch.float64):
    """Two linears from K features to K, body(x, call) as a function of tensors, as it is and compiled."""
    importlib.import_module(f"{lora_fused.__name__}.compiled.inductor").register()
    siblings = Siblings(lora_fused, SQUARE, dtype)
    single = torch._dynamo.allow_in_graph(siblings.single())

    def function(x, *flat):
        return body(x, lambda i, h: single(i, h, *flat))

    return siblings, function, torch.compile(function, backend=graphs, fullgraph=True, dynamic=False)


def kept_inputs(lora_fused, graphs):
    """Of each linear's backward whether its x is kept, the last linear first; and no copy is left by Inductor."""
    (forward,), (backward,) = graphs.forwards, graphs.backwards
    for graph in (forward.graph, backward.graph):
        remove_noop_ops(graph)
        assert not graph.find_nodes(op="call_function", target=aten.clone.default)
    calls = backward.graph.find_nodes(op="call_function", target=lora_fused._ops.ops.lora_backward.default)
    return [call.args[1].op == "placeholder" for call in calls]


def squares(*ys):
    return sum(y.square().sum() for y in ys)


def an_activation(x, call):
    return squares(call(1, call(0, x).sin()))


def a_norm(x, call):
    h = call(0, x)
    return squares(call(1, h * (h.square().mean(-1, keepdim=True) + 1.0).rsqrt())) + h.exp().sum()


def a_product(x, call):
    return squares(call(1, call(0, x) @ torch.ones(K, K, dtype=x.dtype)))


def a_dropped_one(x, call):
    return squares(call(1, torch.nn.functional.dropout(call(0, x), 0.5)))


def a_result_of_an_op(x, call):
    return squares(call(1, call(0, x)))


def a_narrower_one(x, call):
    """Of a value that nothing else needs and that has more bytes."""
    return squares(call(1, (call(0, x).double() @ torch.ones(K, K, dtype=torch.float64)).float()))


def every_other_column(x, call):
    return squares(call(1, torch.cat((call(0, x), x), -1)[..., ::2]))


def a_result(x, call):
    h = call(0, x).sin()
    return squares(call(1, h)), h


@pytest.mark.parametrize("body,kept", (
    (an_activation, False), (a_norm, False), (a_product, True), (a_dropped_one, True), (a_result_of_an_op, True),
    (a_narrower_one, True), (every_other_column, True), (a_result, True),
))  # fmt: skip
def test_what_is_kept(lora_fused, body, kept):
    graphs = Partitioned()
    siblings, function, by_graphs = compiled(lora_fused, body, graphs, torch.float32)
    found = siblings.run(by_graphs)
    if body is not a_dropped_one:
        assert_same(found, siblings.run(function), 1e-5)
    assert kept_inputs(lora_fused, graphs) == [kept, True]


def test_an_x_that_nothing_reads(lora_fused):
    """Neither the input nor the product, which has to be kept where an A is trained; the square reads its y."""
    graphs, sizes = Partitioned(), []
    for frozen in (False, True):
        siblings, function, by_graphs = compiled(lora_fused, a_product, graphs)
        if frozen:
            siblings.freeze_a()
        assert_same(siblings.run(by_graphs), siblings.run(function), 1e-13)
        sizes.append([tuple(node.meta["val"].shape) for node in graphs.saved[-1]].count((*siblings.x.shape[:-1], K)))
    assert sizes == [3, 1]


def test_an_input_that_is_written(lora_fused):
    """From which x would be computed again as it is then: half as many bytes as x, and no gradient."""

    def body(x, call):
        y = call(0, x.double().sin())
        x.mul_(2.0)
        return squares(y)

    graphs = Partitioned()
    siblings, *functions = compiled(lora_fused, body, graphs)
    x, found = siblings.x.detach().float(), []
    for function in functions:
        y = function(x.clone(), *siblings.flat)
        found.append([y, *torch.autograd.grad(y, siblings.trained[:2])])
    assert_same(*found, 1e-13)
    assert kept_inputs(lora_fused, graphs) == [True]


@pytest.mark.parametrize("policy", ("MUST_SAVE", "PREFER_RECOMPUTE", None))
def test_checkpoints_decide(lora_fused, policy):
    """By a policy that keeps x, or by one that does not."""
    options = {}
    if policy is not None:
        chosen = getattr(checkpoints.CheckpointPolicy, policy)
        prefer = checkpoints.CheckpointPolicy.PREFER_RECOMPUTE
        context = functools.partial(
            checkpoints.create_selective_checkpoint_contexts,
            lambda context, op, *_, **__: chosen if op is aten.sin.default else prefer,
        )
        options = {"context_fn": context}

    def body(x, call):
        def block(h):
            return call(1, h.sin())

        return squares(checkpoints.checkpoint(block, call(0, x), use_reentrant=False, **options))

    graphs = Partitioned()
    siblings, function, by_graphs = compiled(lora_fused, body, graphs)
    assert_same(siblings.run(by_graphs), siblings.run(function), 1e-13)
    kept = [node.target for node in made(graphs)]
    assert kept.count(aten.sin.default) == (policy == "MUST_SAVE") and aten.clone.default not in kept
