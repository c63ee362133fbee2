"""The merge as a pass of Inductor's. Imported where there is torch.compile alone: it imports torch._inductor."""

from __future__ import annotations

import functools

from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.fx_passes import joint_graph
from torch._inductor.pattern_matcher import CallFunctionVarArgs, Match, register_graph_pattern
from torch.fx import Graph

from .._ops import add_op_namespace_prefix
from . import calls, merge, nodes, seeds


class MergeSiblings(CustomGraphPass):
    """`merge.merge_siblings` on a joint graph, or on that of a forward alone."""

    def __call__(self, graph: Graph) -> None:
        merge.merge_siblings(graph, one_draw=not config.fallback_random)

    def uuid(self) -> bytes:
        files = tuple(module.__file__ for module in (calls, merge, nodes, seeds))
        return get_hash_for_files((__file__, *files), add_op_namespace_prefix(""))


the_pass = MergeSiblings()


@functools.cache
def register() -> None:
    """From now on Inductor merges the calls of every graph, whatever its options."""

    def is_first(match: Match) -> bool:
        """Of a graph's calls: one match is for all."""
        return match.output_node() is min(match.graph.find_nodes(op="call_function", target=calls.FORWARD))

    @register_graph_pattern(CallFunctionVarArgs(calls.FORWARD), is_first, pass_dict=joint_graph.patterns)
    def merge_all(match: Match, *_, **__) -> None:
        the_pass(match.graph)
