"""`lora_experts` on tensors: the oracle, every backend, gates, what is read, saved and made, input errors."""

import importlib
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("on_device")

E, T, K, H, I, R1, R2 = 5, 10, 2, 32, 16, 3, 6
GATES = {
    "swiglu": dict(),
    "geglu": dict(activation="gelu_tanh"),
    "reglu": dict(activation="relu"),
    "clamped": dict(limit=0.7),
    "gpt-oss": dict(interleaved=True, limit=0.7, slope=1.702, offset=1.0),
    "none": dict(gated=False, activation="relu2"),
    "none, silu": dict(gated=False),
}


def tanh_gate(z):
    g, u = z.chunk(2, -1)
    return torch.tanh(g) * u


class Case:
    """Operands of one call, drawn anew; leaves are those that get gradients."""

    def __init__(
        self, lora_fused, gate="swiglu", bias=False, transposed=False, ranks=(R1, R2), dtype=torch.float64, experts=E
    ):
        specs = lora_fused.specs
        self.gate = tanh_gate if gate == "unknown" else specs.Gate(**GATES[gate])
        width = I if gate.startswith("none") else 2 * I

        def draw(*sizes):
            return torch.randn(*sizes, dtype=torch.float64).mul_(0.4).to(dtype)

        def product(n, k, rank):
            weight = draw(experts, k, n).transpose(1, 2) if transposed else draw(experts, n, k)
            a = draw(experts, rank, k).requires_grad_() if rank else None
            b = draw(n, rank, experts).permute(2, 0, 1).requires_grad_() if rank else None
            return specs.ExpertWeights(weight, draw(experts, n).requires_grad_() if bias else None, a, b, 0.7)

        self.up, self.down = product(width, H, ranks[0]), product(H, I, ranks[1])
        self.x, self.dy = draw(T, H).requires_grad_(), draw(T, H)
        self.index, self.routing = (
            torch.randint(0, experts, (T, K)),
            torch.rand(T, K, dtype=torch.float64).to(dtype).requires_grad_(),
        )
        given = (self.x, self.routing, *self.up[1:4], *self.down[1:4])
        self.leaves = [tensor for tensor in given if tensor is not None]

    @property
    def operands(self):
        return self.x, self.index, self.routing, self.up, self.down, self.gate

    def run(self, function, **options):
        y = function(*self.operands, **options)
        return y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)


def oracle_of(lora_fused):
    return lora_fused.backends.reference.experts.lora_experts


def assert_close(seen, expected, tolerance):
    assert len(seen) == len(expected) > 3
    for ours, theirs in zip(seen, expected):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and not ours.isnan().any()
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.fixture
def grouped(lora_fused, monkeypatch):
    """torch's grouped product where the library has no native one, too."""
    select = lora_fused.backends.select
    monkeypatch.setattr(select, "choose_experts", lambda up, down: select.GROUPED)


@pytest.fixture
def in_triton(lora_fused, monkeypatch):
    """Triton's kernels, without a GPU under the interpreter."""
    pytest.importorskip("triton")
    select = lora_fused.backends.select
    monkeypatch.setattr(select, "choose_experts", lambda up, down: select.TRITON)


@pytest.mark.parametrize("bias,transposed", itertools.product((False, True), repeat=2))
@pytest.mark.parametrize("gate", (*GATES, "unknown"))
def test_as_the_oracle(lora_fused, gate, bias, transposed):
    for ranks in ((R1, R2), (R1, 0), (0, R2)):
        case = Case(lora_fused, gate, bias, transposed, ranks)
        assert_close(case.run(lora_fused.lora_experts), case.run(oracle_of(lora_fused)), 1e-12)
        with torch.no_grad():
            assert_close(
                [lora_fused.lora_experts(*case.operands)] * 4, [oracle_of(lora_fused)(*case.operands)] * 4, 1e-12
            )


# --- products of a GPU ---


@pytest.mark.parametrize(
    "path,gate,transposed",
    (
        ("grouped", "swiglu", False),
        ("grouped", "gpt-oss", True),
        ("grouped", "none", False),
        ("in_triton", "gpt-oss", True),
    ),
)
def test_products_of_a_gpu(lora_fused, request, poisoned, gate, transposed, path):
    """Ranks that are padded; rows outside, whose products are left unwritten; experts without rows."""
    request.getfixturevalue(path)
    for index in (torch.randint(0, E + 2, (T, K)), torch.full((T, K), 2), torch.full((T, K), E)):
        case = Case(lora_fused, gate, True, transposed, dtype=torch.float32)
        case.index = index
        assert_close(case.run(lora_fused.lora_experts), case.run(oracle_of(lora_fused)), 1e-5)


@pytest.mark.parametrize("path", ("grouped", "in_triton"))
def test_products_of_few_rows(lora_fused, request, poisoned, path):
    """Without a gradient and of fewer rows than experts."""
    request.getfixturevalue(path)
    case = Case(lora_fused, "gpt-oss", True, dtype=torch.float32, experts=2 * T * K)
    case.index[3:5] = 2 * T * K
    with torch.no_grad():
        seen, expected = (f(*case.operands) for f in (lora_fused.lora_experts, oracle_of(lora_fused)))
    assert_close([seen] * 4, [expected] * 4, 1e-5)


@pytest.mark.parametrize("path", ("grouped", "in_triton"))
def test_rows_are_not_looked_at(lora_fused, request, monkeypatch, path):
    """A GPU would be waited for."""
    request.getfixturevalue(path)
    case = Case(lora_fused, dtype=torch.float32)
    for name in ("tolist", "item", "__int__", "__bool__", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the GPU"))
    lora_fused.functional.experts.compute_experts(*case.operands, True).backward(case.dy)


@pytest.mark.parametrize("gate", GATES)
def test_triton_gates(lora_fused, poisoned, gate):
    """Every gate, its columns more than a program takes, beyond its limit on both sides; against autograd in
    float64."""
    pytest.importorskip("triton")
    kernels = importlib.import_module(f"{lora_fused.__name__}.backends.triton.expert_gate")
    gate = lora_fused.specs.Gate(**GATES[gate])
    i, rows = 1030, 3
    z = torch.randn(rows, i * (2 if gate.gated else 1)).half()
    dh, weights = torch.randn(rows, i).half(), torch.rand(rows, 1)
    wide = z.double().requires_grad_()
    expected = lora_fused.backends.reference.experts.gated(wide, gate)
    (dz,) = torch.autograd.grad(expected, wide, dh.double() * weights)
    h, *rest = kernels.expert_gate_backward(z, dh, weights, gate)
    pairs = [(h, expected), (kernels.expert_gate(z, gate), expected), (rest[0], dz), (rest[1], (dh * expected).sum(1))]
    for seen, truth in pairs:
        assert seen.shape == truth.shape
        assert (seen.double() - truth).abs().max() <= 2e-3 * truth.abs().max()


@pytest.mark.parametrize("rows", (1, 300))
@pytest.mark.parametrize("n,k,rank", ((17, 33, 3), (130, 72, 70), (16, 200, 16)))
def test_triton_kernels(lora_fused, poisoned, n, k, rank, rows):
    """Odd sizes, strides and ranks, gathered and not, in half precision: against float64."""
    pytest.importorskip("triton")
    kernels = importlib.import_module(f"{lora_fused.__name__}.backends.triton.grouped_linear")
    outer = importlib.import_module(f"{lora_fused.__name__}.backends.triton.grouped_outer")
    tokens, per_token = -(-rows // 2), 2
    index = torch.randint(0, 4, (tokens, per_token)) % 3 + 1  # the first and the last expert have none
    sorted_rows = lora_fused.backends.reference.grouped.Rows.sort(index, 5, True)
    x, t = torch.randn(tokens, k).half(), torch.randn(tokens * 2, rank).half()
    w = torch.randn(5, k, n).half().transpose(1, 2) / k**0.5
    b, bias = torch.randn(n, rank, 5).permute(2, 0, 1) / rank**0.5, torch.randn(5, n).half()
    y = kernels.grouped_linear(x, sorted_rows.order, sorted_rows.ends, w, (t, b, 0.7), bias, per_token)
    expert, token = sorted_rows.expert(), sorted_rows.token()
    gathered = x.double()[token]
    expected = torch.einsum("sk,snk->sn", gathered, w.double()[expert]) + bias.double()[expert]
    expected += 0.7 * torch.einsum("sr,snr->sn", t.double(), b.double()[expert])
    assert (y.double() - expected).abs().max() <= 4e-3 * expected.abs().max()
    plain = kernels.grouped_linear(x[token], None, sorted_rows.ends, w, scaling=0.5)
    assert (plain.double() - 0.5 * torch.einsum("sk,snk->sn", gathered, w.double()[expert])).abs().max() <= 4e-3
    for left, right, orders in ((x, t, (sorted_rows.order, None)), (t, x, (None, sorted_rows.order))):
        seen = outer.grouped_outer(left, right, sorted_rows.ends, *orders, per_token)
        of_rows = [v.double()[token] if order is not None else v.double() for v, order in zip((left, right), orders)]
        expected = torch.stack([of_rows[0][expert == e].t() @ of_rows[1][expert == e] for e in range(5)])
        assert not seen[0].any() and not seen[4].any()
        assert (seen.double() - expected).abs().max() <= 2e-3 * expected.abs().max()


# --- what is read, saved and made ---


@pytest.mark.parametrize(
    "path,tokens", [*itertools.product(("looped", "grouped"), (1, 3, 64)), ("in_triton", 1), ("in_triton", 5)]
)
def test_only_used_experts_are_read(lora_fused, request, path, tokens):
    """All others hold NaN: weights, biases and adapters."""
    if path != "looped":
        request.getfixturevalue(path)
    dtype = torch.float64 if path == "looped" else torch.float32
    case = Case(lora_fused, "swiglu", True, dtype=dtype, experts=9 if path == "looped" else 200)
    case.index = torch.tensor([[1, 4], [7, 4], [1, 7]])[torch.arange(tokens) % 3]
    case.x, case.routing = torch.randn(tokens, H, dtype=dtype), torch.rand(tokens, K, dtype=dtype)
    with torch.no_grad():
        expected = lora_fused.lora_experts(*case.operands)
        unused = torch.ones(len(case.up.weight), dtype=torch.bool)
        unused[case.index.unique()] = False
        for tensor in (*case.up[:4], *case.down[:4]):
            tensor[unused] = float("nan")
        assert torch.equal(lora_fused.lora_experts(*case.operands), expected)


def test_saved_for_backward(lora_fused):
    """Neither rows of x, h nor y."""
    case, saved = Case(lora_fused, bias=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_fused.lora_experts(*case.operands)
    known = {t.data_ptr() for t in (case.x, case.index, case.routing, *case.up[:4], *case.down[:4])}
    shapes = sorted(tuple(t.shape) for t in saved if t.data_ptr() not in known)
    assert shapes == sorted([(T * K,), (E,), (T * K, 2 * I), (T * K, R1), (T * K, R2)])


@pytest.mark.parametrize("path", ("looped", "grouped"))
def test_no_weight_is_made(lora_fused, request, path):
    """No operation gives a tensor as large as a weight of all experts, in either direction."""
    if path != "looped":
        request.getfixturevalue(path)
    case, largest = Case(lora_fused, dtype=torch.float32, experts=40), []
    known = {t.untyped_storage().data_ptr() for t in (*case.up[:4], *case.down[:4]) if t is not None}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if (
                    isinstance(tensor, torch.Tensor)
                    and tensor.is_floating_point()
                    and tensor.untyped_storage().data_ptr() not in known
                ):
                    largest.append(tensor.numel())
            return result

    with Watch():
        lora_fused.lora_experts(*case.operands).backward(case.dy)
    assert len(largest) > 20 and max(largest) < case.down.weight.numel()


def test_gradients_that_nobody_wants(lora_fused):
    case = Case(lora_fused, "gpt-oss", bias=True)
    every = case.run(lora_fused.lora_experts)
    for wanted in range(len(case.leaves)):
        for number, leaf in enumerate(case.leaves):
            leaf.requires_grad_(number == wanted)
        y = lora_fused.lora_experts(*case.operands)
        (grad,) = torch.autograd.grad(y, case.leaves[wanted], case.dy)
        assert torch.equal(grad, every[1 + wanted])


# --- input errors ---


def bad(lora_fused, **changes):
    with torch.device("cpu"):
        case = Case(lora_fused, bias=True)
    given = dict(x=case.x, index=case.index, routing=case.routing, up=case.up, down=case.down, gate=case.gate)
    for name, value in changes.items():
        place, _, part = name.partition("_")
        given[place] = given[place]._replace(**{part: value}) if part else value
    return lora_fused.lora_experts(**given)


@pytest.mark.parametrize(
    "change,message",
    (
        (dict(x=torch.randn(T, H + 1).double()), r"x: shape \(10, 33\), expected \[T, 32\]"),
        (dict(index=torch.zeros(T, 3).long()), r"routing: shape \(10, 2\)"),
        (dict(index=torch.full((T, K), -1)), "index: -1"),
        (dict(routing=torch.rand(T - 1, K).double()), "routing: shape"),
        (dict(up_weight=torch.randn(E, I, H).double()), "up.bias: shape"),
        (dict(down_weight=torch.randn(E + 1, H, I).double()), "down.weight: shape"),
        (dict(down_bias=torch.randn(E, I).double()), "down.bias: shape"),
        (dict(up_lora_a=torch.randn(E, R1, H + 1).double()), "up.lora_a: shape"),
        (dict(up_lora_a=torch.randn(E, 0, H).double()), "up.lora_a: shape"),
        (dict(down_lora_b=torch.randn(E, H, R1).double()), "down.lora_b: shape"),
        (dict(down_lora_b=None), "down.lora_b: missing"),
        (dict(up_weight=torch.randn(E, 2 * I, H).double().requires_grad_()), "up.weight: requires a gradient"),
        (dict(x=torch.empty(T, H, device="meta", dtype=torch.float64)), "x: on meta"),
    ),
    ids=lambda each: each if isinstance(each, str) else "-".join(each),
)  # fmt: skip
def test_bad_values_name_the_tensor(lora_fused, change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        bad(lora_fused, **change)


@pytest.mark.parametrize(
    "change,message",
    (
        (dict(x=[1.0]), "x: list"),
        (dict(index=torch.rand(T, K)), "index: dtype"),
        (dict(up_scaling=float("nan")), "up.scaling: nan"),
        (dict(down_weight=torch.randn(E, H, I)), "down.weight: dtype torch.float32, expected torch.float64"),
        (dict(up_lora_a=torch.zeros(E, R1, H).int()), "up.lora_a: dtype"),
        (dict(gate="silu"), "gate: str"),
    ),
    ids=lambda each: each if isinstance(each, str) else "-".join(each),
)
def test_bad_types_name_the_tensor(lora_fused, change, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        bad(lora_fused, **change)


def test_bad_gates(lora_fused):
    gate = lora_fused.specs.Gate
    with pytest.raises(ValueError, match="^gate: activation 'swish'"):
        bad(lora_fused, gate=gate("swish"))
    with pytest.raises(ValueError, match=r"^up.weight: shape \(5, 32, 32\), expected \[E, 16, 32\]"):
        bad(lora_fused, gate=gate(gated=False))
