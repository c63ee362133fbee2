"""What is done to graphs, as a pass of Inductor's. Imported where there is torch.compile: it imports Inductor."""

from __future__ import annotations

import functools

from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.fx_passes import joint_graph
from torch._inductor.pattern_matcher import CallFunctionVarArgs, Match, register_graph_pattern
from torch.fx import Graph

from .._ops import add_op_namespace_prefix
from . import calls, merge, nodes, recompute, seeds


class NativeCalls(CustomGraphPass):
    """`merge.merge_siblings` and `recompute.copy_inputs` on a joint graph, or on that of a forward alone."""

    def __call__(self, graph: Graph) -> None:
        merge.merge_siblings(graph, one_draw=not config.fallback_random)
        recompute.copy_inputs(graph)

    def uuid(self) -> bytes:
        files = tuple(module.__file__ for module in (calls, merge, nodes, recompute, seeds))
        return get_hash_for_files((__file__, *files), add_op_namespace_prefix(""))


the_pass = NativeCalls()


@functools.cache
def register() -> None:
    """From now on Inductor runs the pass on every graph, whatever its options."""
    forwards = [calls.FORWARD, calls.GATED_FORWARD]

    def is_first(match: Match) -> bool:
        """Of a graph's calls: one match is for all."""
        return match.output_node() is nodes.in_order(match.graph, forwards)[0]

    @register_graph_pattern(CallFunctionVarArgs(forwards), is_first, pass_dict=joint_graph.patterns)
    def run(match: Match, *_, **__) -> None:
        the_pass(match.graph)
