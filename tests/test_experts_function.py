"""`lora_experts` on tensors: the oracle, every backend, gates, what is read, saved and made."""

import importlib.util
import itertools

import pytest
import torch
from helpers.expert_operands import GATES, R1, R2, Case, E, H, I, K, T, tanh_gate
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.fixture(autouse=True)
def masks_are_booleans(monkeypatch):
    """As Triton's interpreter asks from 3.9 on; earlier ones take integers."""
    if importlib.util.find_spec("triton") is None:
        return
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder

    def check(name, place):
        own = getattr(builder, name)

        def checked(self, *operands, **options):
            assert operands[place].data.dtype == bool
            return own(self, *operands, **options)

        monkeypatch.setattr(builder, name, checked)

    check("create_masked_load", 1)
    check("create_masked_store", 2)


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
    monkeypatch.setattr(select, "choose_experts", lambda *_: select.GROUPED)
    monkeypatch.setattr(select, "few_rows", lambda *_: None)


@pytest.fixture
def in_triton(lora_fused, monkeypatch):
    """Triton's kernels, without a GPU under the interpreter."""
    pytest.importorskip("triton")
    select = lora_fused.backends.select
    monkeypatch.setattr(select, "choose_experts", lambda *_: select.TRITON)


@pytest.fixture
def grouped_with_passes(lora_fused, grouped, monkeypatch):
    """The same with all else in Triton."""
    monkeypatch.setattr(lora_fused.backends.select, "_experts_kernels", lambda *_: kernels_of(lora_fused, "experts"))


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
        ("grouped_with_passes", "gpt-oss", True),
        ("grouped_with_passes", "unknown", False),
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


@pytest.mark.parametrize("crossed", (False, True))
@pytest.mark.parametrize("path", ("looped", "grouped", "grouped_with_passes", "in_triton"))
def test_factors_as_they_are_stored(lora_fused, request, poisoned, path, crossed):
    """Parameters as PEFT stores them, and of one product not contiguous, against views that autograd sees; one of both
    without a gradient, too."""
    if path != "looped":
        request.getfixturevalue(path)
    case, specs = Case(lora_fused, dtype=torch.float32), lora_fused.specs
    case.index[0, 0] = E
    stored, bare = [], []
    for weights, step in ((case.up, 1), (case.down, 2)):
        (_, n, k), rank = weights.weight.shape, weights.lora_a.shape[1]
        p, q = (n, k) if crossed else (k, n)
        drawn = (torch.rand(rows * step, columns)[::step] for rows, columns in ((E * rank, p), (q, rank * E)))
        stored.append(specs.StoredFactors(*drawn, crossed))
        bare.append(weights._replace(lora_a=None, lora_b=None))
        assert all(tensor.is_contiguous() == (step == 1) for tensor in stored[-1][:2])

    def viewed(weights, a, b):
        a, b = a.unflatten(0, (E, -1)), b.unflatten(1, (-1, E)).permute(2, 0, 1)
        return weights._replace(lora_a=b.mT if crossed else a, lora_b=a.mT if crossed else b)

    def gradients(y, leaves):
        return y.detach(), *torch.autograd.grad(y, leaves, case.dy)

    given = case.x, case.index, case.routing
    for frozen in (None, 0, 1):
        for factors in stored:
            for number in (0, 1):
                factors[number].requires_grad_(number != frozen)
        leaves = [case.x, case.routing, *(each for factors in stored for each in factors[:2] if each.requires_grad)]
        up, down = (viewed(weights, *factors[:2]) for weights, factors in zip(bare, stored))
        expected = oracle_of(lora_fused)(*given, up, down, case.gate)
        seen = lora_fused.functional.experts.compute_experts(*given, *bare, case.gate, True, tuple(stored))
        assert_close(gradients(seen, leaves), gradients(expected, leaves), 1e-5)
    with torch.no_grad():
        seen = lora_fused.functional.experts.compute_experts(*given, *bare, case.gate, True, tuple(stored))
    assert_close([seen] * 4, [expected.detach()] * 4, 1e-5)


@pytest.mark.parametrize("path", ("grouped", "grouped_with_passes", "in_triton"))
def test_products_of_few_rows(lora_fused, request, poisoned, path):
    """Without a gradient and of fewer rows than experts."""
    request.getfixturevalue(path)
    case = Case(lora_fused, "gpt-oss", True, dtype=torch.float32, experts=2 * T * K)
    case.index[3:5] = 2 * T * K
    case.index[5:] = 1  # of all others, and more rows than a tile has
    with torch.no_grad():
        seen, expected = (f(*case.operands) for f in (lora_fused.lora_experts, oracle_of(lora_fused)))
    assert_close([seen] * 4, [expected] * 4, 1e-5)


@pytest.mark.parametrize("path", ("grouped", "grouped_with_passes", "in_triton"))
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
    order, ends = torch.tensor([2, 0, 1]), torch.tensor([1, 2], dtype=torch.int32)  # the third row is of no expert
    by_choice = torch.empty(1, rows)
    by_choice[0, order] = weights[:, 0]
    h, *rest = kernels.expert_gate_backward(z, dh, by_choice, order, ends, gate)
    assert rest[1].shape == (1, rows) and rest[1][0, 1] == 0.0
    rest[1], dots = rest[1][0, order[:2]], (dh * expected).sum(1)[:2]
    pairs = [(h, expected), (kernels.expert_gate(z, gate), expected), (rest[0], dz), (rest[1], dots)]
    for seen, truth in pairs:
        assert seen.shape == truth.shape
        assert (seen.double() - truth).abs().max() <= 2e-3 * truth.abs().max()


def kernels_of(lora_fused, name):
    pytest.importorskip("triton")
    return importlib.import_module(f"{lora_fused.__name__}.backends.triton.{name}")


@pytest.mark.parametrize("tokens,per_token,experts", ((1, 1, 1), (5, 3, 4), (100, 6, 5), (700, 2, 3), (400, 4, 300)))
@pytest.mark.parametrize("dtype", (torch.int64, torch.int32))
def test_rows_as_those_of_a_sort(lora_fused, tokens, per_token, experts, dtype):
    """One block of choices and several; an expert without rows, choices of none; every tile once."""
    index = torch.randint(0, experts + 2, (tokens, per_token), dtype=dtype)
    index[index == experts // 2] = 0
    seen = kernels_of(lora_fused, "route").sort_rows(index, experts, 16, True)
    expected = lora_fused.backends.reference.grouped.Rows.sort(index.clamp(max=experts), experts, True)
    assert torch.equal(seen.order, expected.order) and torch.equal(seen.ends, expected.ends)
    assert torch.equal(seen.place.long()[seen.order], torch.arange(index.numel()))
    starts = [0, *expected.ends.tolist()]
    tiles = [(e, row, end) for e, end in enumerate(starts[1:]) for row in range(starts[e], end, 16)]
    assert seen.tiles.t().tolist()[: len(tiles)] == [list(tile) for tile in tiles]
    assert (seen.tiles[0, len(tiles) :] == -1).all() and seen.tiles.shape[1] >= len(tiles)


@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("rows", (2, 120))
@pytest.mark.parametrize("n,k,rank", ((17, 33, 3), (130, 72, 70), (16, 160, 16)))
def test_triton_kernels(lora_fused, poisoned, monkeypatch, n, k, rank, rows, fused):
    """Odd sizes, strides and ranks, gathered and not, in half precision: against float64."""
    kernels, outer, layout = (
        kernels_of(lora_fused, name) for name in ("grouped_linear", "grouped_outer", "factor_layout")
    )
    monkeypatch.setattr(kernels, "FUSED_RANK_UP_TO", 2**36 if fused else 0)
    tokens, per_token, tile = rows // 2, 2, kernels.Tile(32, 64, 32, 4, 2)
    index = torch.randint(0, 4, (tokens, per_token)) % 3 + 1  # the first and the last expert have none
    found = kernels_of(lora_fused, "route").sort_rows(index, 5, tile.m, True)
    x, routing = torch.randn(tokens, k).half(), torch.rand(tokens, per_token)
    w = torch.randn(5, k, n).half().transpose(1, 2) / k**0.5
    a, b = torch.randn(5, rank, k).half() / k**0.5, torch.randn(n, rank, 5).permute(2, 0, 1) / rank**0.5
    bias = torch.randn(5, n).half()
    weights = lora_fused.specs.ExpertWeights(w, bias, a, b, 0.7)
    wide = weights._replace(lora_a=a.float(), scaling=-0.3)
    strided = weights._replace(lora_a=a.permute(2, 1, 0).contiguous().permute(2, 1, 0))
    small = weights._replace(lora_a=torch.randn(5, 2, 9), lora_b=torch.randn(5, 70, 2), scaling=1.0)
    plain = weights._replace(lora_a=None, lora_b=None)
    for pair in ((weights, strided), (weights, small), (small, weights), (plain, wide), (weights, plain), (wide, wide)):
        for given, (laid_a, laid_b) in zip(pair, layout.lay_out(*pair), strict=True):
            if given is plain:
                assert laid_a is laid_b is None
                continue
            assert (laid_a is a) == (given is weights) and laid_a.is_contiguous() and laid_b.is_contiguous()
            assert torch.equal(laid_a, given.lora_a.half())
            assert torch.equal(laid_b, (given.lora_b.transpose(1, 2) * given.scaling).half())
    assert layout.lay_out(plain, plain) == ((None, None), (None, None))
    laid = layout.lay_out(weights, plain)[0].b
    y, t = kernels.grouped_linear(x, found.order, found.tiles, tile, w, (a, laid), bias, per_token)
    expert, token = found.expert(), found.token()
    gathered = x.double()[token]
    shrunk = torch.einsum("sk,srk->sr", gathered, a.double()[expert])
    assert (t.double() - shrunk).abs().max() <= 2e-3 * shrunk.abs().max()
    expected = torch.einsum("sk,snk->sn", gathered, w.double()[expert]) + bias.double()[expert]
    expected += 0.7 * torch.einsum("sr,snr->sn", t.double(), b.double()[expert])
    assert (y.double() - expected).abs().max() <= 4e-3 * expected.abs().max()
    plain, nothing = kernels.grouped_linear(x[token], None, found.tiles, tile, w)
    assert nothing is None
    assert (plain.double() - torch.einsum("sk,snk->sn", gathered, w.double()[expert])).abs().max() <= 4e-3
    routed_by = routing.double().reshape(-1, 1)[found.order]
    sums = []
    for short, long, by_token, routed in (
        (t, x, True, routing),
        (t, gathered.half(), False, routing),
        (t, gathered.half(), False, None),
        (None, x, True, routing),
    ):
        ranks = rank if short is not None else 1
        out = torch.empty(k, ranks, 5).permute(2, 1, 0)
        each = outer.Outer(out, out.stride(), k, short, long, by_token, 0.3)
        outer.grouped_outer(each, None, ranks, found.order, found.ends, routing=routed, per_token=per_token)
        left = torch.ones(rows, 1).double() if short is None else short.double()
        left = left if routed is None else left * routed_by
        expected = 0.3 * torch.stack([left[expert == e].t() @ gathered[expert == e] for e in range(5)])
        assert not out[0].any() and not out[4].any()
        assert (out.double() - expected).abs().max() <= 2e-3 * expected.abs().max()
        sums.append(each)
    for first, second in ((sums[0], sums[1]), (sums[1], sums[0])):
        other = first._replace(long=y, length=n, by_token=False, scaling=-0.7, out=torch.full((5, rank, n), torch.nan))
        other = other._replace(strides=other.out.stride())
        together = [each._replace(out=torch.full_like(each.out, torch.nan)) for each in (first, second)]
        for pair in ((together[0], other), (other, together[0]), (together[0], together[1])):
            for each in pair:
                each.out.fill_(torch.nan)
            outer.grouped_outer(*pair, rank, found.order, found.ends, routing=routing, per_token=per_token)
            assert torch.equal(together[0].out, first.out) and not other.out.isnan().any()
        assert torch.equal(together[1].out, second.out)


@pytest.mark.parametrize("tile_rows", (16, 128))
@pytest.mark.parametrize("n,k,rank", ((17, 33, 3), (130, 520, 70), (136, 256, 16)))
def test_terms_beside_a_product(lora_fused, poisoned, n, k, rank, tile_rows):
    """Odd sizes and ranks, gathered and not, tiles in parts: against float64; rows of no expert are left alone."""
    kernels, count = kernels_of(lora_fused, "grouped_term"), 300
    index = torch.randint(0, 3, (count // 2, 2)) + 1  # the first expert has no rows, the last is left out
    found = kernels_of(lora_fused, "route").sort_rows(index, 3, tile_rows, True)
    end, token = int(found.ends[-1]), found.token()
    expert = found.expert()[:end]
    x, d, u = torch.randn(count // 2, k).half(), torch.randn(3, rank, k).half(), torch.randn(3, rank, n).half()
    y, bias = torch.randn(count, n).half(), torch.randn(3, n).half()
    t, gathered = kernels.grouped_shrink(x, found.order, found.tiles, tile_rows, d / k**0.5, 2, True)
    assert 0 < end < count and torch.equal(gathered[:end], x[token[:end]])
    again, nothing = kernels.grouped_shrink(x[token], None, found.tiles, tile_rows, d / k**0.5)
    assert nothing is None and torch.equal(again[:end], t[:end])
    shrunk = torch.einsum("sk,srk->sr", gathered[:end].double(), (d / k**0.5).double()[expert])
    assert (t[:end].double() - shrunk).abs().max() <= 2e-3 * shrunk.abs().max()
    term = torch.einsum("sr,srn->sn", t[:end].double(), u.double()[expert])
    wide = y.double()
    for added, given in (
        (term, (t, u)),
        (term + bias.double()[expert], (t, u, bias)),
        (bias[expert], (None, None, bias)),
    ):
        seen = y.clone()
        assert kernels.grouped_add(seen, found.tiles, tile_rows, *given) is seen
        assert torch.equal(seen[end:], y[end:])
        assert ((seen.double() - wide)[:end] - added).abs().max() <= 2e-3 * (wide[:end] + added).abs().max()


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("gate", GATES)
def test_few_rows_in_half_precision(lora_fused, poisoned, gate, transposed):
    """Every gate with columns, depth and ranks that are no multiples of a block's; more rows of one expert than a tile
    has, experts without rows, choices of none: against the oracle in float64."""
    kernels = kernels_of(lora_fused, "few_rows")
    specs, dtype = lora_fused.specs, torch.float16
    gate = specs.Gate(**GATES[gate])
    hidden, inner, experts, tokens = 150, 37, 4, 22

    def product(n, k, rank):
        weight = torch.randn(experts, k, n).transpose(1, 2) if transposed else torch.randn(experts, n, k)
        a, b = torch.randn(experts, rank, k), torch.randn(n, rank, experts).permute(2, 0, 1)
        return specs.ExpertWeights(*(t.mul(k**-0.5).to(dtype) for t in (weight, torch.randn(experts, n), a, b)), 0.7)

    up, down = product(inner * (2 if gate.gated else 1), hidden, 5), product(hidden, inner, 40)
    x, routing = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, 3)
    index = torch.stack([torch.full((tokens,), 2), torch.arange(tokens) % 2, 3 + torch.arange(tokens) % 3], 1)
    assert kernels.fits(index.numel(), tokens, up, down, gate)
    seen = kernels.few_rows(x, index, routing, up, down, gate)
    wide = [
        weights._replace(**{n: getattr(weights, n).double() for n in weights._fields[:4]}) for weights in (up, down)
    ]
    expected = oracle_of(lora_fused)(x.double(), index, routing.double(), *wide, gate)
    assert seen.shape == expected.shape and seen.dtype == torch.float32
    assert (seen.double() - expected).abs().max() <= 3e-3 * expected.abs().max()


def test_what_few_rows_leave_to_others(lora_fused):
    """Many tokens, many choices, large ranks, gates that are not known."""
    fits, weights = kernels_of(lora_fused, "few_rows").fits, lora_fused.specs.ExpertWeights
    gate, plain = lora_fused.specs.Gate(), weights(torch.empty(1, 2, 2))
    large = plain._replace(lora_a=torch.empty(1, 65, 2))
    assert fits(512, 64, plain, plain, gate)
    assert not any(
        (fits(512, 65, plain, plain, gate), fits(1088, 64, plain, plain, gate), fits(0, 0, plain, plain, gate),
         fits(512, 64, plain, large, gate), fits(512, 64, plain, plain, tanh_gate))
    )  # fmt: skip


# --- what is read, saved and made ---


@pytest.mark.parametrize(
    "path,tokens", [*itertools.product(("looped", "grouped"), (1, 3, 64)), ("in_triton", 1), ("in_triton", 5)]
)
def test_only_used_experts_are_read(lora_fused, request, path, tokens):
    """All others hold NaN: weights, biases and adapters."""
    if path != "looped":
        request.getfixturevalue(path)
    dtype = torch.float64 if path == "looped" else torch.float32
    experts = dict(looped=9, grouped=200, in_triton=24)[path]
    case = Case(lora_fused, "swiglu", True, dtype=dtype, experts=experts)
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
