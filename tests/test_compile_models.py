"""Models by torch.compile, whole, by layer and by regions: loss and gradients against PEFT's, and the ops of graphs."""

import copy
import functools
import importlib

import pytest
import torch
from helpers.cases import DEVICE, randomise_adapters, tiny_llama
from helpers.compiling import INDUCTOR, Graphs, fresh_compiler, set_scalings
from helpers.kernelizing import explain, kernelized
from helpers.llamas import passed, tokens
from helpers.quantized import eight_bit, llama as four_bit_llama, replace
from peft import LoraConfig, get_peft_model


@pytest.fixture(autouse=True)
def _fresh():
    with fresh_compiler():
        yield


def adapted(base, **config):
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **config}))
    randomise_adapters(model, next(base.parameters()).dtype)
    return model.train()


def whole(model, graphs, fullgraph=True):
    model.compile(backend=graphs, fullgraph=fullgraph)


def by_layer(model, graphs, fullgraph=True):
    for layer in model.base_model.model.model.layers:
        layer.compile(backend=graphs, fullgraph=fullgraph)


def by_regions(model, graphs, fullgraph=True):
    """As accelerate's `use_regional_compilation`; the model is another one."""
    from accelerate.utils import compile_regions

    return compile_regions(model, backend=graphs, fullgraph=fullgraph)


def differences(found, expected):
    """Of each tensor, the largest one over 1 and the tensor's own size."""
    pairs = zip(found, expected, strict=True)
    return [((mine - theirs).abs().max() / (1.0 + theirs.abs().max())).item() for mine, theirs in pairs]


def rounding(model, compiled, ids, tolerance=1e-9):
    """How far results may be from eager's. Inductor rounds transformers' norms and loss, which are in float32, in
    another order: PEFT's model that is compiled says how much that is."""
    if not INDUCTOR:
        return tolerance
    plain = copy.deepcopy(model)
    plain = compiled(plain, "inductor", fullgraph=False) or plain
    return tolerance + 4 * max(differences(passed(plain, ids), passed(model, ids)))


def hold_results(ours, model, tolerance, ids):
    """Loss and all gradients are those of PEFT's model."""
    found = differences(passed(ours, ids), passed(model, ids))
    assert len(found) > 1 and max(found) <= tolerance


def hold_llama(lora_fused, model, compiled, ops, ids=None, tolerance=1e-9):
    """Loss and all gradients of a model that is compiled are PEFT's, and its graphs have `ops`."""
    model, ids = model.to(DEVICE), tokens() if ids is None else ids
    ours, graphs = kernelized(lora_fused, model), Graphs(lora_fused)
    ours = compiled(ours, graphs) or ours
    hold_results(ours, model, rounding(model, compiled, ids, tolerance), ids)
    assert graphs.ops == ops
    return ours


LLAMA = dict(traced_linear=8, traced_gated_mlp=2)
LAYER = dict(traced_linear=4, traced_gated_mlp=1)


def test_a_llama_whole(lora_fused):
    rows = explain(lora_fused, hold_llama(lora_fused, adapted(tiny_llama(torch.float64)), whole, LLAMA))
    assert {row.backend for row in rows} == {"native, compiled"}


@pytest.mark.parametrize("compiled", (by_layer, by_regions), ids=lambda f: f.__name__)
def test_a_llama_by_layer(lora_fused, compiled):
    """One graph for layers whose x has a gradient, and one for the first."""
    model = adapted(tiny_llama(torch.float64, num_hidden_layers=3, use_cache=False))
    hold_llama(lora_fused, model, compiled, dict(traced_linear=8, traced_gated_mlp=2))


def test_an_activation_that_holds_a_function(lora_fused):
    """As Gemma's does: one graph for all layers, another one where the function's keywords are others."""
    model = adapted(tiny_llama(torch.float64, hidden_act="gelu_pytorch_tanh", use_cache=False))
    model.enable_input_require_grads()  # so that every layer's x has a gradient
    ours, graphs = kernelized(lora_fused, model.to(DEVICE)), Graphs(lora_fused)
    by_layer(ours, graphs)
    counts, tolerance = [], rounding(model, by_layer, tokens())
    for approximate in ("tanh", "none", "tanh"):
        for each in (ours, model):
            for layer in each.base_model.model.model.layers:
                layer.mlp.act_fn.act = functools.partial(torch.nn.functional.gelu, approximate=approximate)
        hold_results(ours, model, tolerance, tokens())
        counts.append(len(graphs.traced))
    assert counts == [1, 2, 3] and graphs.traced == [LAYER] * 3


@pytest.mark.parametrize("config", (dict(bias="all"), dict(use_dora=True)), ids=("bias", "dora"))
def test_variants_of_llamas(lora_fused, config):
    base = tiny_llama(torch.float64, num_hidden_layers=1, attention_bias=True)
    hold_llama(lora_fused, adapted(base, **config), whole, LAYER)


def test_an_embedding(lora_fused):
    model = adapted(
        tiny_llama(torch.float64, num_hidden_layers=1), target_modules=["embed_tokens", "q_proj", "lm_head"],
        use_dora=True,
    )  # fmt: skip
    hold_llama(lora_fused, model, whole, dict(traced_embedding=1, traced_linear=2))


@pytest.mark.parametrize("model", ("gemma3.modeling_gemma3", "bart.modeling_bart"))
def test_a_scaled_embedding(lora_fused, model):
    """By a buffer, and by a number."""
    module = importlib.import_module(f"transformers.models.{model}")
    (scaled,) = [cls for name, cls in vars(module).items() if name.endswith("ScaledWordEmbedding")]
    base = tiny_llama(torch.float64, num_hidden_layers=1)
    base.model.embed_tokens = scaled(*base.model.embed_tokens.weight.shape, 0, embed_scale=3.0).double()
    # Dynamo begins again where a number of a graph comes from a CPU's tensor of no dimensions.
    times = 2 if "gemma" in model and DEVICE == "cpu" else 1
    hold_llama(lora_fused, adapted(base, target_modules=["embed_tokens"]), whole, dict(traced_embedding=times))


def test_scalings_of_an_embedding(lora_fused):
    model = adapted(tiny_llama(torch.float64, num_hidden_layers=1), target_modules=["embed_tokens"])
    ours = hold_llama(lora_fused, model, whole, dict(traced_embedding=1))
    tolerance = rounding(model, whole, tokens())
    torch._dynamo.utils.counters.clear()
    for value in (0.25, 3.0, -1.0):
        set_scalings(value, ours, model)
        hold_results(ours, model, tolerance, tokens())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if DEVICE == "cpu" else 3)


def test_tensors_in_place_of_numbers(lora_fused):
    """And an embedding's."""
    targets = ["embed_tokens", "q_proj", "up_proj"]
    model = adapted(tiny_llama(torch.float64, num_hidden_layers=1), target_modules=targets).to(DEVICE)
    ours, graphs = kernelized(lora_fused, model), Graphs(lora_fused)
    ours.compile(backend=graphs)
    tolerance = rounding(model, whole, tokens())
    for scaling in (2.0, torch.tensor(0.5, device=DEVICE), torch.tensor(-1.5, device=DEVICE)):
        set_scalings(scaling, ours, model)
        hold_results(ours, model, tolerance, tokens())
    ops = dict(traced_linear=1, traced_gated_mlp=1, traced_embedding=1)
    assert graphs.traced and all(traced == ops for traced in graphs.traced)


@pytest.mark.parametrize("dora", (False, True))
def test_four_bits(lora_fused, dora):
    model, ids = four_bit_llama(DEVICE, use_dora=dora)
    hold_llama(lora_fused, model, whole, LLAMA, ids, 1e-4)


@pytest.mark.skipif(DEVICE != "cpu", reason="bitsandbytes' int8 product on a GPU is not traced")
def test_a_base_that_is_called(lora_fused):
    """bitsandbytes' int8 product beside a fused delta."""
    base = replace(tiny_llama(torch.float32, num_hidden_layers=1), eight_bit, ["q_proj", "v_proj"])
    model = adapted(base, target_modules=["q_proj", "v_proj", "o_proj"])
    hold_llama(lora_fused, model, whole, dict(traced_delta=2, traced_linear=1), tolerance=1e-4)


def test_weights_that_are_stored_the_other_way(lora_fused):
    """GPT-2's Conv1D."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0
    )
    base = transformers.GPT2LMHeadModel(config).double()
    model = adapted(base, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)

    def the_layer(model, graphs, fullgraph=True):
        model.base_model.model.transformer.h[0].compile(backend=graphs, fullgraph=fullgraph)

    hold_llama(lora_fused, model, the_layer, dict(traced_linear=4))
