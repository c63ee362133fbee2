"""The merge of native calls that read one x, in the joint graphs of AOTAutograd: how many calls are left, and that
every result is that of eager and of the graph as it was traced."""

from __future__ import annotations

import functools
import importlib
import pathlib

import pytest
import torch
from helpers.native_ops import flat_on, operands_of, projections_of
from helpers.quantized import random_four_bit
from helpers.siblings import GROUPS, K, Siblings, assert_same
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import checkpoint as checkpoints

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Compiled:
    """A function by AOTAutograd, its joint graph merged where asked for."""

    def __init__(self, lora_fused, function, merges):
        self.ops, self.graphs = lora_fused._ops.ops, []
        self.merge = importlib.import_module(f"{lora_fused.__name__}.compiled.merge") if merges else None
        self.function = aot_function(
            function, fw_compiler=self.keep, bw_compiler=self.keep, partition_fn=self.partition,
            inference_compiler=self.infer,
        )  # fmt: skip

    def apply(self, module):
        if self.merge is not None:
            self.merge.merge_siblings(module.graph)
            assert self.merge.merge_siblings(module.graph) == 0  # there is nothing left
            module.recompile()

    def partition(self, module, inputs, **kwargs):
        self.apply(module)
        return min_cut_rematerialization_partition(module, inputs, **kwargs)

    def infer(self, module, inputs):
        self.apply(module)
        return self.keep(module, inputs)

    def keep(self, module, inputs):
        self.graphs.append(module)
        return torch._functorch.aot_autograd.make_boxed_func(module)

    def counts(self):
        """Calls of lora_forward and lora_backward, and draws of seeds, in all graphs."""
        targets = [node.target for graph in self.graphs for node in graph.graph.nodes]
        return tuple(
            map(
                targets.count,
                (self.ops.lora_forward.default, self.ops.lora_backward.default, torch.ops.aten.randint.low),
            )
        )


def check(siblings, body, counts, tolerance=1e-13):
    """The merged graph has `counts` calls and draws, and gives what eager gives."""
    function = siblings.traced(body)
    merged = Compiled(siblings.lora_fused, function, merges=True)
    assert_same(siblings.run(merged.function), siblings.run(function), tolerance)
    assert merged.counts() == counts
    return merged


def three(x, call):
    h = x.sin()
    return sum(call(i, h).square().sum() for i in range(3)) + h.cos().sum()


@pytest.mark.parametrize("group", GROUPS)
def test_three_siblings(lora_fused, group):
    siblings, draws = Siblings(lora_fused, GROUPS[group]), int("dropout" in group)
    apart = Compiled(lora_fused, siblings.traced(three), merges=False)
    assert_same(siblings.run(apart.function), siblings.run(siblings.traced(three)), 1e-13)
    assert apart.counts() == (3, 3, len([p for _, _, p, _, _ in GROUPS[group] if p > 0]))
    check(siblings, three, (1, 1, draws))


@pytest.mark.parametrize("dora", (False, True))
def test_four_bits(lora_fused, dora):
    """The scales of the third weight come after those of the first, and the second has none."""
    group = [(n, r, 0.0, dora, False) for n, r, *_ in GROUPS["DoRA"]]
    quantized = {
        i: random_four_bit(lora_fused, (group[i][0], K), 64, "nf4", nested, torch.float32, "cpu")[:2]
        for i, nested in ((0, True), (2, False))
    }
    siblings = Siblings(lora_fused, group, torch.float32, quantized)
    check(siblings, three, (1, 1, 0), 1e-5)


def test_norms_that_the_forward_does_not_make(lora_fused, monkeypatch):
    monkeypatch.setattr(lora_fused.backends.select, "norm_is_native", lambda *_: False)
    check(Siblings(lora_fused, GROUPS["DoRA"]), three, (1, 1, 0))


def test_exact_adapters(lora_fused):
    """bf16x3: t holds three columns a rank."""
    siblings = Siblings(lora_fused, GROUPS["LoRA"], torch.bfloat16, bf16x3=True, adapter=torch.float32)
    check(siblings, three, (1, 1, 0), 2**-7)


@pytest.mark.parametrize("trained", ((), (1,)), ids=str)
@pytest.mark.parametrize("group", ("DoRA", "dropout"))
def test_a_without_a_gradient(lora_fused, group, trained):
    """Backwards that read no x are of the group of the others."""
    siblings = Siblings(lora_fused, GROUPS[group])
    siblings.freeze_a(but=trained)
    check(siblings, three, (1, 1, int(group == "dropout")))


def test_without_a_gradient(lora_fused):
    siblings = Siblings(lora_fused, GROUPS["DoRA"])
    with torch.no_grad():
        check(siblings, three, (1, 0, 0))


def test_x_is_written_in_between(lora_fused):
    def body(x, call):
        h = x.sin()
        first = call(0, h).square().sum()
        h.mul_(2.0)
        return first + call(1, h).square().sum() + call(2, h).square().sum()

    with torch.no_grad():
        check(Siblings(lora_fused), body, (2, 0, 0))


def test_a_graph_that_writes(lora_fused):
    """Here x is one node before and after: functional graphs, which compilers have, never come to that."""

    def body(x, call):
        h = x.sin()
        first = call(0, h)
        second = call(1, h)
        h.view(-1).mul_(2.0)
        return first, second, call(2, h)

    siblings = Siblings(lora_fused)
    with torch.no_grad():
        tensors = [each for each in siblings.flat if each is not None]

        def given(x, *tensors):
            rest = iter(tensors)
            return siblings.traced(body)(x, *(None if each is None else next(rest) for each in siblings.flat))

        module = make_fx(given, tracing_mode="fake")(siblings.x, *tensors)
        merge = importlib.import_module(f"{lora_fused.__name__}.compiled.merge")
        assert merge.merge_siblings(module.graph) == 1
        module.recompile()
        assert_same(module(siblings.x, *tensors), siblings.run(siblings.traced(body)), 1e-13)


def squares(*ys):
    return sum(y.square().sum() for y in ys)


def cut_off(x, call):
    h = x.sin()
    return squares(call(0, h), call(2, h)), call(1, h).detach()


def of_no_gradient(x, call):
    h = x.detach().sin()
    return squares(*(call(i, h) for i in range(3))) + x.sum()


def of_a_gradient_in_part(x, call):
    h = x.sin()
    return squares(call(0, h), call(1, h.detach()), call(2, h)) + h.sum()


def of_two_inputs(x, call):
    h, g = x.sin(), x.cos()
    return squares(call(0, h), call(1, g), call(1, h), call(2, g)) + g.exp().sum()


def of_a_result(x, call):
    """The last one could be computed with the first two, if it were not for the one in between."""
    h = x.sin()
    y, z = call(0, h), call(1, h)
    between = call(2, torch.nn.functional.pad(y, (0, K - y.shape[-1])))
    return squares(y, z, between, call(2, h))


def of_a_sum_at_once(x, call):
    """The sum of the later siblings' dx is the dy of one of the earlier ones."""
    h = x.sin()
    y, z = call(3, h), call(1, h)
    return squares(z, call(0, y), call(2, y))


def read_elsewhere(x, call):
    h = x.sin()
    first, y = h.exp(), call(0, h)
    second, z = h.cos() * first, call(1, h)
    return squares(y, z, second, call(2, h) * y.sum()) + h.sum()


@pytest.mark.parametrize("body,forward,backward", (
    (cut_off, 1, 1), (of_no_gradient, 1, 1), (of_a_gradient_in_part, 1, 2), (of_two_inputs, 2, 2), (of_a_result, 3, 3),
    (of_a_sum_at_once, 2, 2), (read_elsewhere, 1, 1),
))  # fmt: skip
@pytest.mark.parametrize("group", ("LoRA", "DoRA"))
def test_uses(lora_fused, body, forward, backward, group):
    square = (K, 8, 0.0, group == "DoRA", False)
    check(Siblings(lora_fused, (*GROUPS[group], square)), body, (forward, backward, 0))


def test_an_x_that_is_cast_for_each(lora_fused):
    def body(x, call):
        return squares(*(call(i, x.to(torch.bfloat16)).float() for i in range(3)))

    siblings = Siblings(lora_fused, dtype=torch.bfloat16)
    siblings.x = siblings.x.detach().float().requires_grad_()
    backward = check(siblings, body, (1, 1, 0), 2**-7).graphs[1]
    (output,) = backward.graph.find_nodes(op="output")
    assert output.args[0][0].meta["val"].dtype == torch.float32  # and no cast of autograd's after the graph


@pytest.mark.parametrize("after", (0, 1))
def test_a_part_of_the_sum_of_dx_is_used_elsewhere(lora_fused, after):
    """As a graph that another pass has changed may have it: the forwards are merged, the backwards stay. `after`: which
    of the two additions."""
    siblings = Siblings(lora_fused)
    backward = lora_fused._ops.ops.lora_backward.default

    class Changed(Compiled):
        def apply(self, module):
            (output,) = module.graph.find_nodes(op="output")
            dxs = [
                item for node in module.graph.find_nodes(op="call_function", target=backward)
                for item in node.users if item.args[1] == 0
            ]  # fmt: skip
            part = dxs[after]
            if after:
                (part,) = part.users
                assert part.target is torch.ops.aten.add.Tensor
            results = list(output.args[0])
            with module.graph.inserting_before(output):
                results[1] = module.graph.call_function(torch.ops.aten.add.Tensor, (results[1], part))
            results[1].meta = dict(part.meta)
            output.args = (tuple(results),)
            super().apply(module)

    function = siblings.traced(three)
    apart, merged = (Changed(lora_fused, function, merges) for merges in (False, True))
    assert_same(siblings.run(merged.function), siblings.run(apart.function), 1e-13)
    assert apart.counts() == (3, 3, 0) and merged.counts() == (1, 3, 0)


class ByDynamo(Compiled):
    """Which tags what a checkpoint computes again, and knows sizes that change."""

    def __init__(self, lora_fused, function, merges):
        super().__init__(lora_fused, function, merges)
        backend = aot_autograd(
            fw_compiler=self.keep, bw_compiler=self.keep, partition_fn=self.partition, inference_compiler=self.infer
        )
        torch._dynamo.reset()
        self.function = torch.compile(function, backend=backend, fullgraph=True)


def policies(lora_fused):
    """By name, what a checkpoint keeps of our forwards: nothing, all of them, or all but the second one."""
    forward, must, prefer = (
        lora_fused._ops.ops.lora_forward.default,
        *(getattr(checkpoints.CheckpointPolicy, name) for name in ("MUST_SAVE", "PREFER_RECOMPUTE")),
    )
    seen = []

    def by_turn(context, op, *args, **kwargs):
        if op is not forward:
            return prefer
        seen.append(op)
        return prefer if len(seen) % 3 == 2 else must

    return {"none": None, "kept": lambda context, op, *_, **__: must if op is forward else prefer, "by turn": by_turn}


@pytest.mark.parametrize("group", ("LoRA", "dropout", "DoRA"))
@pytest.mark.parametrize("policy,counts", (("none", (2, 1)), ("kept", (1, 1)), ("by turn", (3, 2))))
def test_checkpoints(lora_fused, policy, counts, group):
    """Two in the graphs where the forward runs again in the backward's, one where it is kept; those that differ in
    their tags are not merged."""
    siblings = Siblings(lora_fused, GROUPS[group])
    single = torch._dynamo.allow_in_graph(siblings.single())
    context = policies(lora_fused)[policy]
    options = {} if context is None else {
        "context_fn": functools.partial(checkpoints.create_selective_checkpoint_contexts, context)
    }  # fmt: skip

    def function(x, *flat):
        def block(x):
            h = x.sin()
            return squares(*(single(i, h, *flat) for i in range(3))) + h.sum()

        return checkpoints.checkpoint(block, x, use_reentrant=False, **options) + x.exp().sum()

    merged = ByDynamo(lora_fused, function, merges=True)
    assert_same(siblings.run(merged.function), siblings.run(function), 1e-13)
    assert merged.counts()[:2] == counts


@pytest.mark.parametrize("group", ("dropout", "DoRA"))
def test_sizes_that_change(lora_fused, group):
    siblings = Siblings(lora_fused, GROUPS[group])
    single = torch._dynamo.allow_in_graph(siblings.single())

    def function(x, *flat):
        h = x.sin()
        return squares(*(single(i, h, *flat) for i in range(3))) + h.sum()

    merged = ByDynamo(lora_fused, function, merges=True)
    for tokens in (5, 3):
        siblings.x = siblings.x.detach()[:, :tokens].clone().requires_grad_()
        torch._dynamo.mark_dynamic(siblings.x, 1)
        assert_same(siblings.run(merged.function), siblings.run(function), 1e-13)
    assert merged.counts()[:2] == (1, 1)


def test_seeds_of_all_masks_are_one_draw(lora_fused):
    siblings = Siblings(lora_fused, GROUPS["dropout"])
    merged = Compiled(lora_fused, siblings.traced(of_two_inputs), merges=True)
    siblings.run(merged.function)
    assert merged.counts() == (2, 2, 1)


def test_a_gated_mlp_draws_with_the_others(lora_fused):
    generator = torch.Generator().manual_seed(2)
    group = ((24, 8, 0.2, False, False), (24, 8, 0.3, False, False))
    siblings = Siblings(lora_fused, group)
    down = flat_on([operands_of(generator, 24, K, 8, False, False)], "cpu", torch.float64, torch.float64)

    def function(x, *flat):
        projections = projections_of(lora_fused, list(flat), (0.5, 0.7, 1.0), [*siblings.specs, siblings.specs[0]])
        seeds = lora_fused.functional.dispatch.draw_seeds(x.device, projections)
        z = lora_fused.autograd.gated_mlp_native.gated_mlp(x.sin(), projections, (0, 0), seeds)
        return squares(*(siblings.single()(i, z, *flat) for i in range(2)))

    siblings.flat += down
    merged = Compiled(lora_fused, function, merges=True)
    results = siblings.run(merged.function)
    assert merged.counts() == (1, 1, 1) and all(each.isfinite().all() for each in results)
    forward = merged.graphs[0].graph
    (draw,) = forward.find_nodes(op="call_function", target=torch.ops.aten.randint.low)
    parts = [set(range(node.args[3], node.args[3] + node.args[1][0])) for node in draw.users if node.op != "output"]
    assert sorted(map(len, parts)) == [2, 3] and not set.intersection(*parts)
    assert set.union(*parts) <= set(range(draw.args[2][0]))


def test_seeds_that_are_given_out_stay(lora_fused):
    def body(x, call):
        seeds = torch.randint(0, 2**63 - 1, (1,))
        return three(x, call), seeds

    check(Siblings(lora_fused, GROUPS["dropout"]), body, (1, 1, 2))
