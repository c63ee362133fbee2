"""What each LoRA module runs at its next call, by its state now, and what it last ran."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import last_call, layers, shared_input
from ..backends import select
from ..call_context import CallContext
from ..functional import dispatch
from ..peft import (
    adapters,
    embedding as peft_embedding,
    experts as peft_experts,
    gated_mlp as peft_gated_mlp,
    linear as peft_linear,
    linear_call,
    replaced,
    scaling as peft_scaling,
    small_batch,
)
from ..specs import Fallback, Projection
from .recorder import Calls
from .table import FUSED, Row

FUSED_DELTA = "fused delta"  # in place of a backend
_ROWS_AN_EXPERT = 128  # for which `explain` says the backend; a call may have others
BETWEEN_CALLS = "between calls; FSDP gathers it for a call, whose own state decides"
UNSEEN = "after the first pass"  # in place of a group
COMPILED = "compiled"  # beside the backend of what a graph of torch.compile holds
EXPERTS_COMPILED = "torch.compile: its graph has PEFT's own forward of experts"
Projections = Sequence[Projection]
_GATED = ({"gate", "down"}, {"w1", "w2", "w3"}, {"wi_0", "wi_1", "wo"})  # how gated MLPs name their projections


class Model:
    """A model as `explain` looks at it: names, who is compiled or sharded, and which projections gated MLPs compute."""

    def __init__(self, model: nn.Module, rows: int):
        self.rows = rows
        self.names = {module: name for name, module in model.named_modules()}
        modules = list(self.names)
        self.compiled = _below(filter(_is_compiled, modules))
        self.fsdp1 = _below(filter(_is_fsdp1, modules))
        self.fsdp2 = _below(filter(_is_fsdp2, modules))
        attentions = [module for module in modules if type(module).forward is nn.MultiheadAttention.forward]
        self.never_called = {module._modules.get("out_proj") for module in attentions}  # attention multiplies itself
        self.parents: dict[nn.Module, nn.Module] = {}  # gated MLPs with a forward of this kernel, by projection
        self.mlps: dict[nn.Module, nn.Module] = {}  # those that are one Function at their next call
        self.mlp_groups: dict[
            nn.Module, tuple[Projections, ...]
        ] = {}  # what that computes, the projection's group first
        self.mlp_reasons: dict[nn.Module, str] = {}  # by projection, of the others
        self.outermost: dict[nn.Module, nn.Module] = {}  # of wrappers inside others, around one experts module
        for module in modules:
            self._look_for_mlp(module)
            if peft_experts.is_param_wrapper(module) and module not in self.outermost:
                self.outermost.update((inner, module) for inner in peft_experts.chain_of(module)[0][1:])

    def row(self, module: nn.Module, name: str, calls: Calls | None = None) -> Row:
        """What is known of one LoRA module."""
        return dataclasses.replace(
            self._now(module, name),
            parameters=adapters.parameters_of(module),
            calls=None if calls is None else self._recorded(module, calls),
        )

    def _recorded(self, module: nn.Module, calls: Calls) -> tuple[tuple[str, int], ...]:
        """A fused call of an MLP is one of each of its projections, and the outermost wrapper's one of all wrappers."""
        counts, parent = calls.of(module), self.parents.get(module) or self.outermost.get(module)
        if parent is not None and (fused := calls.of(parent)[FUSED]):
            counts[FUSED] += fused
        return tuple(counts.most_common())

    def _now(self, module: nn.Module, name: str) -> Row:
        row = self._next_call(module, name)
        if last_call.ends_in_kernel(module):
            row = dataclasses.replace(row, last=self._last(module))
        if row.fused and module not in self.mlps:
            row = dataclasses.replace(row, mlp=self.mlp_reasons.get(module))
        if self._is_in_graph(module):
            return row
        if row.last is None or not (module in self.fsdp1 or module in self.fsdp2):
            return row
        if row.last == FUSED:
            return dataclasses.replace(row, fused=True, reason=row.reason if row.fused else None)
        return _unfused(row, row.last)

    def _is_in_graph(self, module: nn.Module) -> bool:
        """Whether its next call is a graph's, as far as its last one and the model tell."""
        called = self._called(module)
        if last_call.ends_in_kernel(called) and last_call.of(called) is last_call.TRACED:
            return True
        return module in self.compiled and not last_call.ran_since_trace(called)

    def _called(self, module: nn.Module) -> nn.Module:
        """Whose last call computed a module: its own, its gated MLP's or its outermost wrapper's."""
        parent = self.parents.get(module)
        if parent is not None and last_call.of(parent) is None:
            return parent
        return self.outermost.get(module, module)

    def _last(self, module: nn.Module) -> str | None:
        note = last_call.of(self._called(module))
        return FUSED if note is None else None if note is last_call.NEVER else note

    def _next_call(self, module: nn.Module, name: str) -> Row:
        row = Row(name, type(module).__name__, fused=False)
        if module in self.never_called:
            return _unfused(row, "nn.MultiheadAttention reads its weight, never calls it")
        if peft_embedding.is_plain_embedding(module):
            return self._next_embedding_call(module, row)
        if peft_experts.is_param_wrapper(module):
            return self._next_experts_call(self.outermost.get(module, module), row)
        if not peft_linear.is_lora_linear(module):
            return _unfused(row, f"no fused layer for {type(module).__module__}.{type(module).__name__}")
        kind, compiled = peft_linear.linear_kinds()[type(module)], self._is_in_graph(module)
        layer = layers.LoraLinearOfX if kind.only_x else layers.LoraLinear
        reason = _unmapped_reason(module, layer) or replaced.linear_reason()
        state = Fallback(reason) if reason else peft_linear.read_linear(self._at_call(module))
        if isinstance(state, Fallback):
            return _unfused(row, self._when_gathered(module, state.reason))
        example = _example(state)
        call = CallContext.of(example)
        fallback = linear_call.call_fallback(state, example, call)
        reason = fallback.reason if fallback else None
        if reason is None and module not in self.mlps:
            reason = (
                small_batch.few_traced_reason(example, call, (state.projection,), self.rows)
                or peft_scaling.traced_reason(module, state.projection.operands.lora_b)
                if compiled
                else shared_input.small_reason(module, example, call, self.rows)
            )
        if reason:
            return _unfused(row, reason)
        called = linear_call.own_forward_reason(state, example, call, self.rows)
        if called:
            reason = peft_linear.delta_reason(state.projection)
            if reason:
                return _unfused(row, f"{reason} ({called})")
            found = Row(name, layer.__name__, fused=True, backend=FUSED_DELTA, group="single", reason=called)
            return _in_graph(found) if compiled else found
        if module in self.mlps:
            layer, group, groups = layers.LoraGatedMLP, self.names[self.mlps[module]], self.mlp_groups[module]
        else:
            members = () if compiled else self._computed_with(module, state, example, call)
            group = self._group(module, [member for member, _ in members])
            groups = ([known.projection for _, known in members] or [state.projection],)
        chosen = dispatch.describe_backend(example, state.projection, groups, self.rows, compiled)
        found = Row(name, layer.__name__, fused=True, backend=chosen, group=group)
        return _in_graph(found) if compiled else found

    def _next_embedding_call(self, module: nn.Module, row: Row) -> Row:
        layer, compiled = layers.LoraEmbedding, self._is_in_graph(module)
        reason = _unmapped_reason(module, layer) or replaced.embedding_reason()
        state = Fallback(reason) if reason else peft_embedding.read_embedding(self._at_call(module))
        if isinstance(state, Fallback):
            return _unfused(row, state.reason)
        example = torch.empty((0,), dtype=torch.int64, device=state.table.weight.device)
        reason = peft_embedding.embedding_call_reason(state, example, (), {})
        if reason is None and compiled:
            reason = peft_scaling.traced_reason(module, state.table.lora_b)
        if reason:
            return _unfused(row, reason)
        chosen = select.describe_embedding(select.choose_embedding(state.table, self.rows, compiled))
        found = Row(row.module, layer.__name__, fused=True, backend=chosen, group="single")
        return _in_graph(found) if compiled else found

    def _next_experts_call(self, outermost: nn.Module, row: Row) -> Row:
        """What is known of a wrapper of a parameter: the outermost one's forward computes the experts module."""
        layer = layers.LoraExperts
        reason = _unmapped_reason(outermost, layer) or replaced.linear_reason()
        state = Fallback(reason) if reason else peft_experts.read_experts(self._at_call(outermost))
        if isinstance(state, Fallback):
            return _unfused(row, self._when_gathered(outermost, state.reason))
        weight = state.up.weight
        tokens = min(self.rows, 1)
        example, routing = weight.new_empty((tokens, weight.shape[2])), weight.new_empty((tokens, 1))
        index = torch.zeros((tokens, 1), dtype=torch.int64, device=weight.device)
        call = peft_experts.read_call(state, example, (index, routing), {})
        if isinstance(call, Fallback):
            return _unfused(row, call.reason)
        if self._is_in_graph(outermost):
            return _unfused(row, EXPERTS_COMPILED)
        wrappers = reversed(peft_experts.chain_of(outermost)[0])
        group = "+".join(wrapper.parameter_name for wrapper in wrappers)
        backend = select.choose_experts(state.up, state.down, _ROWS_AN_EXPERT * len(weight))
        return Row(row.module, layer.__name__, fused=True, backend=backend, group=group)

    def _computed_with(self, module: nn.Module, state: peft_linear.AdaptedLinear, example: Tensor, call: CallContext):
        """The siblings that one call computes and their states, a module's own among them; none where it is alone."""
        for members in shared_input.groups_of(module):
            first = state if members[0] is module else self._leading(members[0], example, call)
            led = [self._at_call(member) for member in members[1:]]
            states = [] if first is None else [first, *shared_input.states_led(led, example, call, self.rows)]
            together = [(member, known) for member, known in zip(members, states) if known is not None]
            if len(together) > 1 and any(member is module for member, _ in together):
                return together
        return []

    def _leading(self, module: nn.Module, x: Tensor, call: CallContext) -> peft_linear.AdaptedLinear | None:
        """The state in which the first of siblings computes all of them; None where its call is not fused."""
        if not last_call.ends_in_kernel(module) or shared_input.small_reason(module, x, call, self.rows):
            return None
        state = peft_linear.read_linear(self._at_call(module))
        if isinstance(state, Fallback) or linear_call.call_fallback(state, x, call):
            return None
        return None if linear_call.own_forward_reason(state, x, call, self.rows) else state

    def _group(self, module: nn.Module, members: Sequence[nn.Module]) -> str:
        """The last parts of the siblings' names; which modules share an input is seen when the model runs."""
        if not members and last_call.of(module) is last_call.NEVER and not torch.are_deterministic_algorithms_enabled():
            return UNSEEN
        return "+".join(map(self._last_part, members)) or "single"

    def _last_part(self, module: nn.Module) -> str:
        """Of a module's name; with the one before where another tuner of PEFT's is around it."""
        parts = self.names.get(module, "?").split(".")
        return ".".join(parts[-2:] if parts[-1] == "base_layer" else parts[-1:])

    def _at_call(self, module: nn.Module) -> nn.Module:
        """A module as its calls find it."""
        return _gathered(module) if module in self.fsdp2 else module

    def _when_gathered(self, module: nn.Module, reason: str) -> str:
        if module in self.fsdp1:
            return f"{reason} {BETWEEN_CALLS}"
        return reason

    def _look_for_mlp(self, module: nn.Module) -> None:
        """Notes which projections a gated MLP computes, or why it computes none."""
        adapted = [child for child in module.children() if peft_linear.is_lora_linear(child)]
        if not adapted:
            return
        structure = peft_gated_mlp.structure_of(module)
        if isinstance(structure, Fallback):
            if _looks_gated(module):
                reason = _replaced_in(module) or structure.reason
                self.mlp_reasons.update((part, reason) for part in adapted)
            return
        parts = peft_gated_mlp.projections_of(module, structure)
        if last_call.ends_in_kernel(module):
            self.parents.update((part, module) for part in parts)
        found = self._mlp_of(module, structure)
        if isinstance(found, str):
            self.mlp_reasons.update((part, found) for part in adapted)
            return
        groups = found.inputs, (found.output,)
        self.mlps.update((part, module) for part in parts)
        self.mlp_groups.update((part, groups if part is not parts[-1] else groups[::-1]) for part in parts)

    def _mlp_of(self, module: nn.Module, structure: peft_gated_mlp.GatedMLP) -> peft_gated_mlp.AdaptedMLP | str:
        """What a gated MLP computes as one Function, or why it does not."""
        layer = layers.GATED_MLP_BY_INPUT.get(structure.input)
        if layer is None:
            return f"its input is called {structure.input}"
        reason = _unmapped_reason(module, layer)
        if reason:
            return reason
        compiled = self._is_in_graph(module)
        if compiled and (reason := peft_gated_mlp.untraced_reason(module, structure)):
            return f"torch.compile: {reason}"
        whole = self._at_call(module)
        part = next(filter(peft_linear.is_lora_linear, peft_gated_mlp.projections_of(whole, structure)), None)
        if part is None:
            return "no projection is adapted"
        state = peft_linear.read_linear(part)
        if isinstance(state, Fallback):
            return state.reason
        example = _example(state)
        call = CallContext.of(example)
        found = peft_gated_mlp.read_mlp(whole, example, call, check_features=False)
        if isinstance(found, Fallback):
            return found.reason
        if compiled:
            reason = small_batch.few_traced_reason(example, call, (*found.inputs, found.output), self.rows)
            return reason or peft_gated_mlp.scaling_reason(whole, structure, found) or found
        return peft_gated_mlp.small_reason(whole, example, call, self.rows) or found


def _replaced_in(module: nn.Module) -> str | None:
    """Who has replaced something that a module with adapted projections runs besides these."""
    parts = [module, *(child for child in module.children() if not peft_linear.is_lora_linear(child))]
    reasons = [replaced.module_reason(type(part)) for part in parts]
    reasons += [replaced.function_reason(nn.functional, name) for name in ("silu", "gelu", "relu")]
    return next(filter(None, reasons), None)


def _below(roots) -> set[nn.Module]:
    return {module for root in roots for module in root.modules()}


def _is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module go through torch.compile."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or dynamo.config.disable:
        return False
    return isinstance(module, dynamo.OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None


def _is_fsdp1(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def _is_fsdp2(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the module itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _gathered(module: nn.Module) -> nn.Module:
    """A shallow copy of a module in which every parameter that `fully_shard` has sharded is whole: a tensor of its
    global shape, most of them without memory."""
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__["_parameters"] = {name: _whole(parameter) for name, parameter in module._parameters.items()}
    copy.__dict__["_modules"] = {
        name: None if part is None else _gathered(part) for name, part in module._modules.items()
    }
    if replaced.is_own(module.__dict__.get("forward"), module):
        del copy.__dict__["forward"]
    return copy


def _whole(parameter: Tensor | None) -> Tensor | None:
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is None or not isinstance(parameter, tensors.DTensor) or parameter.device_mesh.ndim > 1:
        return parameter  # over several dimensions it may be sharded within calls too
    # A packed weight is one column, and has to be contiguous.
    own = parameter.shape if parameter.shape[-1:] == (1,) else ()
    value = torch.empty(own, dtype=parameter.dtype, device=parameter.to_local().device).expand(parameter.shape)
    return value.requires_grad_(parameter.requires_grad)


def _looks_gated(module: nn.Module) -> bool:
    """Whether the projections are called as those of gated MLPs are; what it computes is another question."""
    names = module._modules
    return any(all(any(part in name for name in names) for part in parts) for parts in _GATED)


def _example(state: peft_linear.AdaptedLinear) -> Tensor:
    """An x without rows that fits a projection: in the dtype of its base, the adapter's where that is unknown."""
    operands, base = state.projection.operands, state.base
    known = operands.weight if operands.weight is not None else operands.lora_a
    dtype = known.dtype if base.quantized is None else base.compute or base.quantized.dtype
    features = operands.lora_a.shape[1] if base.shape is None else base.shape[1]
    return torch.empty((0, features), dtype=dtype, device=known.device)


def _unfused(row: Row, reason: str) -> Row:
    return dataclasses.replace(row, fused=False, backend=None, group=None, reason=reason, mlp=None)


def _in_graph(row: Row) -> Row:
    """What a graph of torch.compile has in its place; siblings are merged when it is compiled, after it was traced."""
    group = row.group if row.layer == layers.LoraGatedMLP.__name__ else None
    return dataclasses.replace(row, backend=f"{row.backend}, {COMPILED}", group=group)


def _unmapped_reason(module: nn.Module, layer: type[nn.Module]) -> str | None:
    """Why the layer's forward is not the one that a module runs; None where it is."""
    bound = module.__dict__.get("forward")
    called = last_call.called_forward(module)
    if getattr(called, "__func__", None) is layer.forward:
        if called.__self__ is module:
            return None
        return "its forward is bound to another module, which runs in its place, as copy.copy leaves it"
    if bound is None:
        return "not kernelized: no forward of this kernel is bound"
    if replaced.is_own(bound, module):
        first = next(module.parameters(), None)
        if first is not None and not (first.is_cuda or first.is_cpu or first.is_meta):
            elsewhere = select.device_reason(first.device)
            if elsewhere:
                return f"not kernelized: its tensors are {elsewhere}"
        return "not kernelized: its class's own forward is bound, as pickle and kernelize() without our layers leave it"
    if getattr(getattr(called, "__func__", None), "__qualname__", None) == layer.forward.__qualname__:
        return f"kernelized by another build of this kernel, {called.__module__.rpartition('.')[0]}"
    return f"another tool set its forward: {replaced.name_of(bound)}"
