"""Lets the partitioner of a torch.fx graph decide whether the x of a native backward is kept or computed again.

dA needs x, so the backward of a layer with adapters reads what that of a frozen one does not: the output of a norm or
of an activation. It can be computed again from what is kept anyway, the residual stream or the activation's own input,
by one more pass over memory. But the partitioner keeps all that an op reads which Inductor does not fuse.

Behind a copy x is a value like any other: the partitioner computes it again where what it has to keep for that are
fewer bytes, and by operations alone that Inductor fuses: no product, no attention, no random number, no op of ours.
Inductor removes the copy.
"""

from __future__ import annotations

import torch
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput
from torch._ops import OpOverload
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.fx import Graph, Node

from .calls import X_OF
from .nodes import add_call, args_of, in_order, storage_of

aten = torch.ops.aten


def copy_inputs(graph: Graph) -> int:
    """Lets native backwards read a copy of their x, one of each; how many copies were made. None
    - of a graph that writes to its inputs, from which x would be computed again as they are then;
    - of an x about which a checkpoint has decided, by a policy or none;
    - where Inductor would not remove it: x is a view of an input or a result of the graph, or has gaps."""
    (output,) = graph.find_nodes(op="output")
    if _writes_to_inputs(graph, output):
        return 0
    given = [*graph.find_nodes(op="placeholder"), *output.all_input_nodes]
    outside = {storage_of(node) for node in given} | {None}
    copies: dict[Node, Node] = {}
    for call in in_order(graph, X_OF):
        place = X_OF[call.target]
        x = args_of(call)[place]
        if x not in copies:
            is_decided = "recompute" in x.meta or x.target is aten.clone.default
            if is_decided or storage_of(x) in outside or not is_non_overlapping_and_dense_or_false(x.meta["val"]):
                continue
            with graph.inserting_before(call):
                copies[x] = add_call(graph, x, aten.clone.default, (x,))
        call.update_arg(place, copies[x])
    return len(copies)


def _writes_to_inputs(graph: Graph, output: Node) -> bool:
    """Whether a graph does, or AOTAutograd after it; True where nobody has said what the results are."""
    results = output.meta.get("desc")
    if results is None or any(isinstance(each, InputMutationAOTOutput) for each in results):
        return True
    return any(isinstance(node.target, OpOverload) and node.target._schema.is_mutable for node in graph.nodes)
