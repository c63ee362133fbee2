"""The public function of experts; every input error is raised here."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd.direct_apply import apply_of
from ..autograd.experts import LoraExpertsFunction, forward_experts
from ..backends import select
from ..backends.reference.activations import ACTIVATIONS
from ..call_context import new_tuple, without_autocast
from ..specs import AnyGate, ExpertsSpec, ExpertWeights, Gate, StoredFactors, with_factors
from .checks import check_number, check_tensor, shown

SWIGLU = Gate()
INDEX_DTYPES = (torch.int64, torch.int32)
_function_for, _is_grad_enabled = apply_of(LoraExpertsFunction), torch.is_grad_enabled


def lora_experts(
    x: Tensor,
    index: Tensor,
    routing: Tensor,
    up: ExpertWeights,
    down: ExpertWeights,
    gate: AnyGate = SWIGLU,
    *,
    leaves_out: bool = True,
) -> Tensor:
    """LoRA on the experts of a mixture; differentiable once in x, routing, biases and adapters:

        z = x W1ᵀ + s1·(x A1ᵀ) B1ᵀ + b1     h = gate(z)     y = h W2ᵀ + s2·(h A2ᵀ) B2ᵀ + b2
        out[t] = Σ_k routing[t, k] · y[t, index[t, k]]

    x [T, H], index [T, k] int32 or int64, routing [T, k]; `up` with W1 [E, N, H] and `down` with W2 [E, H', I], where
    N is 2·I with a gate of two halves and I without. x, routing, weights and adapters in float32, bfloat16, float16 or
    float64: both weights and the biases in one dtype, in which the products are made; the result is in x's dtype, also
    under autocast, and gradients are in each tensor's own. Base weights get no gradient. No product B·A and no gradient
    of a weight is ever made, and of experts without rows nothing is read.

    gate: a `Gate`, or a function of z without parameters of its own. Indices from E on are left out; on a GPU only with
    `leaves_out` (it costs passes over the rows), as the host does not wait for the GPU to look.

    Deterministic. Saved for backward: x, z [T·k, N], x A1ᵀ and h A2ᵀ [T·k, R], the operands, and in Triton the factors
    as the products read them, [E, R, ·] in the products' dtype.
    Raises ValueError or TypeError naming the tensor, what was seen and what was expected; of negative indices on the
    CPU alone.
    Source: Hu et al. 2021, arXiv:2106.09685, equation 3; Shazeer et al. 2017, arXiv:1701.06538, equation 1.
    """
    for name, weights in (("up", up), ("down", down)):
        if not isinstance(weights, ExpertWeights):
            raise TypeError(f"{name}: {type(weights).__name__}, expected ExpertWeights")
    _check_weights("up", up, up.weight)
    _check_weights("down", down, up.weight)
    for name, tensor in (("x", x), ("routing", routing)):
        check_tensor(name, tensor)
    check_tensor("index", index, INDEX_DTYPES)
    for name, tensor in (("x", x), ("routing", routing), ("index", index)):
        if tensor.device != up.weight.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {up.weight.device} as up.weight is")
    _check_shapes(x, index, routing, up, down, gate)
    if index.is_cpu and index.numel() and int(index.min()) < 0:
        raise ValueError(f"index: {int(index.min())}, expected numbers of experts, from 0 on")
    return compute_experts(x, index, routing, up, down, gate, leaves_out)


def compute_experts(
    x: Tensor,
    index: Tensor,
    routing: Tensor,
    up: ExpertWeights,
    down: ExpertWeights,
    gate: AnyGate,
    leaves_out: bool,
    stored: tuple[StoredFactors | None, StoredFactors | None] = (None, None),
) -> Tensor:
    """`lora_experts` on operands that are known to be right, their factors as they are or as they are `stored`."""
    first, second = stored
    if _is_grad_enabled():
        of_up = up[2:4] if first is None else first[:2]
        of_down = down[2:4] if second is None else second[:2]
        trained = x, routing, up.bias, *of_up, down.bias, *of_down
        if x.requires_grad or any([t is not None and t.requires_grad for t in trained]):
            crossed = first and first.crossed, second and second.crossed
            spec = new_tuple(ExpertsSpec, (gate, leaves_out, crossed))
            return _function_for(x)(spec, up, down, index, *trained)
    spec, up, down = ExpertsSpec(gate, leaves_out), with_factors(up, first), with_factors(down, second)
    with without_autocast(x):
        few_rows = select.few_rows(x, index, up, down, gate)
        if few_rows is not None:
            return few_rows(x.to(up.weight.dtype), index, routing, up, down, gate).to(x.dtype)
        products = select.make_products(select.sort_rows(index, up, down, leaves_out), trains=False)
        return forward_experts(spec, products, x, routing, up, down)[0]


def _check_weights(name: str, weights: ExpertWeights, like: Tensor) -> None:
    check_number(f"{name}.scaling", weights.scaling)
    for part, tensor in zip(ExpertWeights._fields, weights.tensors):
        if tensor is None and part != "weight":
            continue
        check_tensor(f"{name}.{part}", tensor)
        if tensor.device != like.device:
            raise ValueError(f"{name}.{part}: on {tensor.device}, expected {like.device} as up.weight is")
        if part in ("weight", "bias") and tensor.dtype != like.dtype:
            raise TypeError(f"{name}.{part}: dtype {tensor.dtype}, expected {like.dtype} as up.weight has")
    weight, bias, lora_a, lora_b, _ = weights
    if weight.dim() != 3 or weight.shape[0] != like.shape[0]:
        raise ValueError(
            f"{name}.weight: shape {tuple(weight.shape)}, expected [E, N, K], in both weights for as many experts"
        )
    if weight.requires_grad:
        raise ValueError(f"{name}.weight: requires a gradient, which is not computed here: give its detach()")
    experts, n, k = weight.shape
    if bias is not None and bias.shape != (experts, n):
        raise ValueError(f"{name}.bias: shape {tuple(bias.shape)}, expected [{experts}, {n}]")
    if (lora_a is None) != (lora_b is None):
        raise ValueError(f"{name}.lora_{'a' if lora_a is None else 'b'}: missing, expected both factors or none")
    if lora_a is None:
        return
    if lora_a.dim() != 3 or (lora_a.shape[0], lora_a.shape[2]) != (experts, k) or lora_a.shape[1] == 0:
        raise ValueError(
            f"{name}.lora_a: shape {tuple(lora_a.shape)}, expected [{experts}, R, {k}] with a rank of at least 1"
        )
    if lora_b.shape != (experts, n, lora_a.shape[1]):
        raise ValueError(f"{name}.lora_b: shape {tuple(lora_b.shape)}, expected [{experts}, {n}, {lora_a.shape[1]}]")


def _check_shapes(
    x: Tensor, index: Tensor, routing: Tensor, up: ExpertWeights, down: ExpertWeights, gate: AnyGate
) -> None:
    hidden = up.weight.shape[2]
    if x.dim() != 2 or x.shape[1] != hidden:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected [T, {hidden}]")
    for name, tensor in (("index", index), ("routing", routing)):
        if tensor.dim() != 2 or tensor.shape[0] != x.shape[0] or tensor.shape != index.shape:
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)}, expected [{x.shape[0]}, k], the same of index and routing"
            )
    if not isinstance(gate, Gate):
        if not callable(gate) or isinstance(gate, type):
            seen = shown(gate) if isinstance(gate, type) else type(gate).__name__
            raise TypeError(f"gate: {seen}, expected a Gate or a function")
        return
    _check_gate(gate)
    width = down.weight.shape[2] * (2 if gate.gated else 1)
    if up.weight.shape[1] != width:
        raise ValueError(
            f"up.weight: shape {tuple(up.weight.shape)}, expected [E, {width}, {hidden}] for this gate and down"
        )


def _check_gate(gate: Gate) -> None:
    if gate.activation not in ACTIVATIONS:
        raise ValueError(f"gate: activation {shown(gate.activation)}, expected one of {', '.join(ACTIVATIONS)}")
    for name in ("gated", "interleaved"):
        if not isinstance(getattr(gate, name), bool):
            raise TypeError(f"gate: {name} {shown(getattr(gate, name))}, expected True or False")
    for name in ("slope", "offset", *(() if gate.limit is None else ("limit",))):
        check_number(f"gate: {name}", getattr(gate, name))
    if gate.slope == 0:
        raise ValueError("gate: slope 0, expected another number, by which its result is divided")
