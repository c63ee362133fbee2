"""CUDA graphs, Inductor's and a user's: what a replay sees of a change, and its masks. GPU only."""

import pytest
import torch
from helpers.compiling import Block, block, fresh_compiler
from helpers.kernelizing import kernelized
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def x_of():
    generator = torch.Generator("cuda").manual_seed(3)
    return torch.randn(2, 64, Block.width, device="cuda", generator=generator)


def step(model, x):
    """y and the gradients of all that is trained."""
    torch.compiler.cudagraph_mark_step_begin()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach().clone(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys() and len(theirs) == 15
    for name, value in theirs.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5 * value.abs().max().item(), msg=name)


def layers_of(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def scale(model, factor):
    for layer in layers_of(model):
        layer.scaling["default"] = layer.scaling["default"] * factor


CHANGES = {
    "a scaling": lambda model: scale(model, 0.5),
    "another adapter": lambda model: model.set_adapter("other"),
    "evaluation": lambda model: model.eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_reduce_overhead_sees_a_change(lora_fused, change):
    model = block(dtype=torch.float32, others=["other"]).cuda()
    ours = kernelized(lora_fused, model, "cuda")
    x, counters = x_of(), torch._dynamo.utils.counters["inductor"]
    with fresh_compiler():
        counters.clear()
        ours.compile(mode="reduce-overhead", fullgraph=True)
        for moment in ("before", "after"):
            theirs = step(model, x)
            for _ in range(3):  # warmed up, recorded, replayed
                assert_same(step(ours, x), theirs)
            if moment == "before":
                for each in (model, ours):
                    CHANGES[change](each)
        assert counters["cudagraph_skips"] == 0


def test_reduce_overhead_draws_a_new_mask_at_every_replay(lora_fused):
    ours = kernelized(lora_fused, block(dtype=torch.float32, lora_dropout=0.5).cuda(), "cuda")
    x = x_of()
    with fresh_compiler():
        ours.compile(mode="reduce-overhead", fullgraph=True)
        found = [step(ours, x)["y"] for _ in range(5)]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def captured(model, x):
    """The graph of a forward, and its y."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = model(x)
    return graph, y


def replayed(graph, y):
    graph.replay()
    return y.clone()


@pytest.mark.parametrize("as_tensor", (False, True))
def test_a_captured_graph_sees_tensors_alone(lora_fused, as_tensor):
    """As PEFT's: a scaling that is a number is as it was at the capture."""
    model = block(dtype=torch.float32).cuda()
    if as_tensor:
        prepare_model_for_compiled_hotswap(model)
    ours, x = kernelized(lora_fused, model, "cuda"), x_of()
    graphs = [captured(each, x) for each in (model, ours)]
    before = [replayed(*each) for each in graphs]
    for each in (model, ours):
        for layer in layers_of(each):
            if as_tensor:
                layer.scaling["default"].mul_(2)
            else:
                layer.scaling["default"] *= 2
    theirs, mine = (replayed(*each) for each in graphs)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())
    assert torch.equal(mine, before[1]) != as_tensor and torch.equal(theirs, before[0]) != as_tensor
