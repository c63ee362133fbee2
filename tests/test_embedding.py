"""Embeddings with LoRA and DoRA: PEFT itself is the truth, its own forward the answer to the rest."""

import contextlib
import copy
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch
from cases import assert_as_good, randomise_adapters, relative, summation, tiny_llama
from conftest import ROOT
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Case:
    """ids of a shape into a table [v, h] with rank r."""

    lead: tuple[int, ...]
    v: int
    h: int
    r: int
    padding: int | None = None
    scaling: float = 0.7

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.lead)) or 'scalar'}-v{self.v}-h{self.h}-r{self.r}-pad{self.padding}"


# Odd sizes, no token, a single id, every leading shape, ranks below, at and above a dot's tile, more
# tokens than rows (all repeated) and fewer.
CASES = (
    Case((), 11, 16, 2),
    Case((0,), 20, 32, 4),
    Case((7,), 33, 17, 5, padding=0),
    Case((2, 65), 40, 130, 16, padding=39),
    Case((3, 2, 11), 301, 72, 33),
    Case((40,), 129, 257, 100, padding=3),
)
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
)
VARIANTS = (False, True)


class Model(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, ids):
        return self.table(ids)


def adapt(table, case, base, adapter, device="cpu", dora=False):
    config = LoraConfig(r=case.r, lora_alpha=case.scaling * case.r, target_modules=["table"], use_dora=dora)
    model = get_peft_model(Model(table.to(device, base)), config, autocast_adapter_dtype=False)
    randomise_adapters(model, adapter)
    return model


def peft_embedding(case, base=torch.float32, adapter=torch.float32, device="cpu", dora=False, **options):
    table = nn.Embedding(case.v, case.h, padding_idx=case.padding, **options)
    table.weight.data.normal_()  # the padding row too: an adapted table need not hold zeros there
    return adapt(table, case, base, adapter, device, dora)


def draw_ids(case, device="cpu", dtype=torch.int64):
    ids = torch.randint(0, case.v, case.lead, device=device, dtype=dtype)
    if case.padding is not None and ids.numel() > 2:
        ids.view(-1)[::3] = case.padding
    return ids


def kernelized(lora_fused, model, device="cpu"):
    lora_fused.register_peft_layers()
    return kernelize(model, mode=Mode.TRAINING, device=device)


def fused(lora_fused, model, device="cpu"):
    model = kernelized(lora_fused, model, device)
    rows = lora_fused.explain(model)
    assert len(rows) > 0 and all(row.fused for row in rows), str(rows)
    return model


def run(model, ids, dy, autocast=None):
    """Output and every gradient of one forward and backward, by name."""
    scope = torch.autocast(ids.device.type, dtype=autocast) if autocast else contextlib.nullcontext()
    with scope:
        y = model(ids)
    y.backward(dy.to(y.dtype))
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values())
    return {"y": y, **grads}


def assert_parity(lora_fused, model, ids, dy, device="cpu", autocast=None, terms=0):
    unit = autocast or next(p.dtype for p in model.parameters())
    truth = run(copy.deepcopy(model).double(), ids, dy.double())
    theirs = run(copy.deepcopy(model), ids, dy, autocast)
    ours = run(fused(lora_fused, model, device), ids, dy, autocast)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert_as_good(name, value, theirs[name], truth[name], unit, terms=terms)
    return ours


@pytest.mark.parametrize("dora", VARIANTS, ids=("lora", "dora"))
@pytest.mark.parametrize("base,adapter", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("autocast", (None, torch.bfloat16), ids=("plain", "autocast"))
def test_embedding_matches_peft(lora_fused, device, case, base, adapter, autocast, dora):
    model = peft_embedding(case, base, adapter, device, dora)
    dy = torch.randn(*case.lead, case.h, device=device).to(base)
    terms = case.v + case.h + dy.numel() if device == "cuda" else 0
    assert_parity(lora_fused, model, draw_ids(case, device), dy, device, autocast, terms)


@pytest.mark.parametrize("dora", VARIANTS, ids=("lora", "dora"))
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_ids_of_both_dtypes_and_any_strides(lora_fused, device, dora, dtype):
    case = Case((5, 12), 30, 24, 4)
    ids = torch.randint(0, case.v, (12, 10), device=device, dtype=dtype).t()[::2]
    dy = torch.randn(24, 5, 12, device=device).permute(1, 2, 0)
    assert not ids.is_contiguous() and not dy.is_contiguous()
    assert_parity(lora_fused, peft_embedding(case, device=device, dora=dora), ids, dy, device)


@pytest.mark.parametrize("dora", VARIANTS, ids=("lora", "dora"))
def test_padding_row_gets_no_gradient_but_b_gets_its_tokens(lora_fused, device, dora):
    case = Case((4,), 10, 16, 3, padding=2)
    ids = torch.full((4,), 2, device=device)
    ours = assert_parity(lora_fused, peft_embedding(case, device=device, dora=dora), ids, torch.randn(4, 16, device=device), device)
    da = next(value for name, value in ours.items() if "embedding_A" in name)
    db = next(value for name, value in ours.items() if "embedding_B" in name)
    assert da.abs().max() == 0 and db.abs().max() > 0


@pytest.mark.parametrize("dora", VARIANTS, ids=("lora", "dora"))
@pytest.mark.parametrize("padding", (None, 3))
def test_trainable_table(lora_fused, device, dora, padding):
    case = Case((50,), 20, 24, 4, padding=padding)
    model = peft_embedding(case, device=device, dora=dora)
    model.base_model.model.table.base_layer.requires_grad_(True)
    ours = assert_parity(lora_fused, model, draw_ids(case, device), torch.randn(50, 24, device=device), device)
    assert any(name.endswith("base_layer.weight") for name in ours)


def scaled_tables(case, scale):
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    for cls in (Gemma3TextScaledWordEmbedding, BartScaledWordEmbedding):
        yield cls(case.v, case.h, case.padding, embed_scale=scale)


@pytest.mark.parametrize("dora", VARIANTS, ids=("lora", "dora"))
@pytest.mark.parametrize("base,adapter", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_scale_of_the_embedding(lora_fused, device, base, adapter, dora):
    """Applied after norm and gain, to base and delta alike; 7.3 is no bfloat16 number."""
    case = Case((2, 9), 31, 40, 4, padding=0)
    for table in scaled_tables(case, 7.3):
        model = adapt(table, case, base, adapter, device, dora)
        if isinstance(table.embed_scale, torch.Tensor):
            assert table.embed_scale.dtype == base  # `model.to(dtype)` casts the buffer
        dy = torch.randn(2, 9, 40, device=device).to(base)
        assert_parity(lora_fused, model, draw_ids(case, device), dy, device)


def test_a_fresh_adapter_changes_no_bit(lora_fused, device):
    """B is zero: the result is the base embedding's own, its scale rounded as the base rounds it."""
    case = Case((40,), 31, 48, 4)
    for table in (nn.Embedding(31, 48), *scaled_tables(case, 7.3)):
        table = table.to(device, torch.bfloat16)
        if hasattr(table, "embed_scale") and isinstance(table.embed_scale, torch.Tensor):
            table.embed_scale = nn.Buffer(torch.tensor(7.3, device=device), persistent=False)
        ids = draw_ids(case, device)
        expected = table(ids)
        model = get_peft_model(Model(table), LoraConfig(r=4, target_modules=["table"]))
        for name, parameter in model.named_parameters():
            if "embedding_B" in name:
                parameter.data.zero_()
        assert torch.equal(fused(lora_fused, model, device)(ids), expected)


def test_gradcheck(lora_fused):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    ids = torch.tensor([[0, 3, 3], [6, 0, 1]])
    w, a, b, m = draw(7, 5), draw(3, 7), draw(5, 3), draw(5)
    lora = lambda w, a, b: lora_fused.lora_embedding(ids, w, a, b, 0.3, embed_scale=2.0)  # noqa: E731
    assert torch.autograd.gradcheck(lora, (w, a, b))
    dora = lambda m: lora_fused.lora_embedding(ids, w, a, b, 0.3, magnitude=m, embed_scale=2.0)  # noqa: E731
    assert torch.autograd.gradcheck(dora, (m,))


@pytest.mark.parametrize("frozen", ("embedding_A", "embedding_B", "magnitude"))
def test_one_frozen_parameter(lora_fused, device, frozen):
    case = Case((30,), 12, 24, 4)
    model = peft_embedding(case, device=device, dora=True)
    next(p for name, p in model.named_parameters() if frozen in name).requires_grad_(False)
    ours = assert_parity(lora_fused, model, draw_ids(case, device), torch.randn(30, 24, device=device), device)
    assert len(ours) == 3


def test_no_gradient_wanted_and_double_backward(lora_fused):
    case = Case((5,), 12, 16, 4)
    model = peft_embedding(case, dora=True)
    ids = draw_ids(case)
    expected = copy.deepcopy(model)(ids)
    model = fused(lora_fused, model)
    for scope in (torch.no_grad, torch.inference_mode):
        with scope():
            torch.testing.assert_close(model(ids), expected)
    b = next(p for name, p in model.named_parameters() if "embedding_B" in name)
    (db,) = torch.autograd.grad(model(ids).square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        db.sum().backward()


def test_saved_for_backward(lora_fused):
    """The ids, the gathered rows and the norm; nothing of size M×H or V×H beyond the parameters."""
    case = Case((50,), 40, 64, 8)
    model = fused(lora_fused, peft_embedding(case, dora=True))
    ids, saved = draw_ids(case), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(ids)
    known = {p.data_ptr() for p in model.parameters()} | {ids.data_ptr()}
    assert sorted(tuple(t.shape) for t in saved if t.data_ptr() not in known) == [(50, 8), (64,)]


def test_the_norm_follows_every_change(lora_fused, device):
    """No norm outlives a call: changed in place, through .data and by an optimizer."""
    case = Case((9,), 20, 24, 4)
    plain = peft_embedding(case, device=device, dora=True)
    ours, ids = fused(lora_fused, copy.deepcopy(plain), device), draw_ids(case, device)
    for change in range(3):
        torch.testing.assert_close(ours(ids), plain(ids), rtol=1e-4, atol=1e-5)
        for model in (plain, ours):
            b = next(p for name, p in model.named_parameters() if "embedding_B" in name)
            b.data.mul_(3) if change else b.detach().add_(1)


def test_same_bits_every_time(lora_fused, device):
    case = Case((3000,), 50, 96, 8)
    model = fused(lora_fused, peft_embedding(case, device=device, dora=True), device)
    ids, dy = draw_ids(case, device), torch.randn(3000, 96, device=device)
    first, second = run(copy.deepcopy(model), ids, dy), run(copy.deepcopy(model), ids, dy)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_norm_without_a_table_sized_transient(lora_fused):
    """Chunked over the vocabulary: a V×H float32 transient would be several times the limit."""
    v, h = 20000, 64
    w, a, b = torch.randn(v, h).half(), torch.randn(4, v), torch.randn(h, 4)
    norm = lora_fused.reference_embedding.column_norm(w, a, b, 0.5)
    truth = torch.linalg.vector_norm(w.double() + 0.5 * (b.double() @ a.double()).t(), dim=0)
    assert relative(norm, truth)[1] <= summation(v)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Sizes():
        lora_fused.reference_embedding.column_norm(w, a, b, 0.5)
    assert 0 < max(size for size in sizes) <= lora_fused.reference_embedding.NORM_CHUNK * h


HALVES = (torch.float16,) + ((torch.bfloat16,) if torch.cuda.is_available() else ())
KERNELS = [("triton", case, dtype) for case in CASES for dtype in (torch.float32, *HALVES)]
if torch.cuda.is_available():
    KERNELS += [("cuda", case, dtype) for case in CASES for dtype in HALVES if case.h % 8 == 0]


@pytest.mark.parametrize("backend,case,dtype", KERNELS, ids=str)
@pytest.mark.parametrize("scale", (1.0, 7.3, "tensor"))
@pytest.mark.parametrize("dora", VARIANTS, ids=("lora", "dora"))
@pytest.mark.parametrize("half_adapter", (False, True))
def test_kernels_are_as_good_as_the_reference(lora_fused, poisoned, device, backend, case, dtype, scale, dora, half_adapter):
    """Forward and every gradient through the autograd Function, float64 truth."""
    pytest.importorskip("triton")
    ids = draw_ids(case, device, torch.int32)
    e = torch.tensor(7.3, device=device) if scale == "tensor" else scale

    def draw(backend, cast):
        torch.manual_seed(1)
        shapes = ((case.v, case.h), (case.r, case.v), (case.h, case.r), (case.h,))
        w, a, b, m = [torch.randn(shape, device=device) for shape in shapes]
        adapter = dtype if half_adapter else torch.float32
        w, a, b, m = cast(w.to(dtype)), cast(a.to(adapter)), cast((b * case.r**-0.5).to(adapter)), cast(m)
        tensors = [t.requires_grad_() for t in ((w, a, b, m) if dora else (w, a, b))]
        y = lora_fused.lora_embedding(
            ids, w, a, b, case.scaling, magnitude=m if dora else None, embed_scale=e, padding_idx=case.padding, backend=backend
        )
        y.backward(torch.randn(y.shape, device=device).to(dtype).to(y.dtype))
        return {"y": y, **{name: t.grad for name, t in zip("wabm", tensors)}}

    if scale == "tensor":  # as the base rounds it, on both sides
        e = e.to(dtype)
    truth, theirs = draw("reference", lambda t: t.double()), draw("reference", lambda t: t)
    terms = case.v + case.h + case.r + ids.numel()
    for name, value in draw(backend, lambda t: t).items():
        assert_as_good(name, value, theirs[name], truth[name], dtype, terms=terms)


def test_triton_column_norm(lora_fused, poisoned, device):
    kernels = lora_fused.backend.get("triton")
    for case in CASES:
        w, a, b = torch.randn(case.v, case.h, device=device), torch.randn(case.r, case.v, device=device), torch.randn(case.h, case.r, device=device)
        truth = torch.linalg.vector_norm(w.double() + 0.7 * (b.double() @ a.double()).t(), dim=0)
        assert relative(kernels.column_norm(w, a, b, 0.7), truth)[1] <= 2 * summation(case.v + case.r)


def test_triton_sums_repeated_tokens_and_spreads_no_nan(lora_fused, device):
    """An infinite row reaches its own id alone; the pairwise and the sorted scatter agree."""
    kernels, plain = lora_fused.backend.get("triton"), lora_fused.reference_embedding
    ids = torch.randint(0, 9, (300,), device=device)
    drows, lora_a = torch.randn(300, 5, device=device), torch.zeros(5, 11, device=device)
    for padding in (None, 4):
        ours, theirs = kernels.scatter_rows(drows, ids, lora_a, padding), plain.scatter_rows(drows, ids, lora_a, padding)
        torch.testing.assert_close(ours, theirs)
        assert ours.is_contiguous() and ours[:, 9:].abs().max() == 0
    drows[7] = float("inf")
    infinite = ~kernels.scatter_rows(drows, ids, lora_a, None).isfinite().all(0)
    assert infinite.nonzero().flatten().tolist() == [ids[7].item()]


def test_triton_compiles_for_a_gpu_whatever_is_frozen(lora_fused):
    """The interpreter runs only the branches that are taken; a compiler reads them all."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "compile_embedding.py"), str(ROOT / "build")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "compiled 16" in done.stdout, done.stderr[-2000:]


def test_choice_of_backend(lora_fused):
    choose, up_to = lora_fused.backend.choose_embedding, lora_fused.backend.CUDA_EMBEDDING_TOKENS
    table = lora_fused.table.Table(torch.empty(16, 8), torch.empty(2, 16), torch.empty(8, 2))
    assert choose(table, 5) == "reference"
    if torch.cuda.is_available():
        on_gpu = lora_fused.table.Table(*(t.cuda() for t in table[:3]))
        assert choose(on_gpu, 5) == "triton"  # float32: the native ops take half-precision tables
        on_gpu = on_gpu._replace(weight=on_gpu.weight.bfloat16())
        assert choose(on_gpu, up_to) == "cuda" and choose(on_gpu, up_to + 1) == "triton"
        assert choose(on_gpu._replace(lora_a=on_gpu.lora_a.t().contiguous().t()), 5) == "triton"
        assert choose(on_gpu._replace(lora_a=on_gpu.lora_a.double()), 5) == "reference"
    for backend in ("cutlass", "cuda"):
        with pytest.raises(ValueError, match=f"^backend: '{backend}'"):
            lora_fused.lora_embedding(torch.tensor([1]), *table[:3], 1.0, backend=backend)


OUT_OF_RANGE = """
import pathlib, sys, torch
from kernels import get_local_kernel
k = get_local_kernel(pathlib.Path(sys.argv[1]))
w, a, b = torch.randn(12, 16, device="cuda"), torch.randn(2, 12, device="cuda"), torch.randn(16, 2, device="cuda")
k.lora_embedding(torch.tensor([int(sys.argv[2])], device="cuda"), w.half(), a, b, 1.0, backend=sys.argv[3])
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("bad", (12, -1))
def test_index_out_of_range(lora_fused, device, bad):
    if device == "cuda":
        for backend in ("cuda", "triton"):
            command = [sys.executable, "-c", OUT_OF_RANGE, str(ROOT / "build"), str(bad), backend]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode != 0 and "device-side assert" in done.stderr, done.stderr
        return
    case = Case((3,), 12, 16, 4)
    model = peft_embedding(case)
    ids = torch.tensor([1, bad, 2])
    with pytest.raises(IndexError) as theirs:
        copy.deepcopy(model)(ids)
    with pytest.raises(IndexError) as mine:
        fused(lora_fused, model)(ids)
    assert str(mine.value) == str(theirs.value)


# --- PEFT's own forward ---


def explain(lora_fused, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lora_fused.explain(model)


def assert_peft_runs(lora_fused, model, reason, ids, **call):
    ours = kernelized(lora_fused, copy.deepcopy(model))
    (row,) = explain(lora_fused, ours)
    assert not row.fused and reason in row.reason, str(row)
    result = ours(ids, **call)
    assert torch.equal(result, model(ids, **call))
    return result


CASE = Case((6,), 20, 16, 4)


@pytest.mark.parametrize(
    "options,reason",
    ((dict(max_norm=1.0), "max_norm"), (dict(scale_grad_by_freq=True), "scale_grad_by_freq"), (dict(sparse=True), "sparse")),
)
def test_options_left_to_peft(lora_fused, options, reason):
    assert_peft_runs(lora_fused, peft_embedding(CASE, **options), reason, draw_ids(CASE))


def test_merged_disabled_several_and_none_active(lora_fused):
    ids = draw_ids(CASE)
    for dora in VARIANTS:
        model = peft_embedding(CASE, dora=dora)
        layer = model.base_model.model.table
        layer.merge()
        assert_peft_runs(lora_fused, model, "merged", ids)
        layer.unmerge()
        layer.enable_adapters(False)
        assert_peft_runs(lora_fused, model, "disabled", ids)
        layer.enable_adapters(True)
        model.add_adapter("second", LoraConfig(r=3, target_modules=["table"], init_lora_weights=False))
        layer.set_adapter(["default", "second"])
        assert_peft_runs(lora_fused, model, "several active adapters", ids)
        layer._active_adapter = "elsewhere"
        assert_peft_runs(lora_fused, model, "no active adapter", ids)


def test_adapter_names(lora_fused):
    model = peft_embedding(CASE).eval()
    ours = kernelized(lora_fused, copy.deepcopy(model)).base_model.model.table
    names = ["default", "__base__"] * 3
    ids = draw_ids(CASE)
    assert torch.equal(ours(ids, adapter_names=names), model.base_model.model.table(ids, adapter_names=names))
    with pytest.raises(ValueError, match="adapter_names"):
        ours(ids, adapter_names=names[:2])


def test_unknown_tables_hooks_and_sharding(lora_fused):
    class Doubling(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    ids = draw_ids(CASE)
    model = adapt(Doubling(20, 16), CASE, torch.float32, torch.float32)
    assert_peft_runs(lora_fused, model, "unknown base layer Doubling", ids)
    model = peft_embedding(CASE)
    handle = model.base_model.model.table.base_layer.register_forward_hook(lambda module, args, output: 2 * output)
    assert_peft_runs(lora_fused, model, "base_layer has hooks", ids)
    handle.remove()
    assert explain(lora_fused, kernelized(lora_fused, model))[0].fused
    model.base_model.model.table.input_fns["default"] = lambda inputs: inputs[0]
    assert_peft_runs(lora_fused, model, "tensor parallelism", ids)


def test_embed_scale_that_the_base_ignores(lora_fused):
    model = peft_embedding(CASE)
    model.base_model.model.table.base_layer.embed_scale = 3.0
    assert_peft_runs(lora_fused, model, "embed_scale on a plain Embedding", draw_ids(CASE))


def test_autocast_with_float64_and_two_adapter_dtypes(lora_fused):
    ids = draw_ids(CASE)
    model = peft_embedding(CASE, torch.float64, torch.float64)
    ours = fused(lora_fused, copy.deepcopy(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(ids), model(ids)) and not explain(lora_fused, ours)[0].fused
    model = peft_embedding(CASE)
    layer = model.base_model.model.table
    layer.lora_embedding_B["default"].data = layer.lora_embedding_B["default"].data.bfloat16()
    ours = kernelized(lora_fused, copy.deepcopy(model))
    assert "two dtypes" in explain(lora_fused, ours)[0].reason
    for each in (model, ours):
        with pytest.raises(RuntimeError, match="same dtype"):
            each(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert explain(lora_fused, ours)[0].fused
        torch.testing.assert_close(ours(ids), model(ids), rtol=2e-2, atol=2e-2)


def test_resized_vocabulary_and_trainable_tokens(lora_fused):
    llama = tiny_llama()
    llama.resize_token_embeddings(71)
    model = get_peft_model(llama, LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False))
    ids = torch.randint(60, 71, (2, 7))
    expected = copy.deepcopy(model)(ids).logits
    torch.testing.assert_close(fused(lora_fused, model)(ids).logits, expected, rtol=1e-4, atol=1e-5)

    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 5]}, init_lora_weights=False)
    model = get_peft_model(tiny_llama(), config)
    for name, parameter in model.named_parameters():
        if "trainable_tokens" in name:
            parameter.data.normal_()
    ids = torch.tensor([[1, 5, 9]])
    expected = copy.deepcopy(model)(ids).logits
    torch.testing.assert_close(kernelized(lora_fused, model)(ids).logits, expected, rtol=1e-4, atol=1e-5)


# --- training ---


def train(model, device, steps=20):
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(2)).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.double().item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("dora", VARIANTS, ids=("lora", "dora"))
@pytest.mark.parametrize("tied", (False, True), ids=("untied", "tied with LoRA on the head"))
@pytest.mark.parametrize("dtype,tolerance", ((torch.float32, 1e-4), (torch.float64, 1e-10)), ids=str)
def test_twenty_steps_on_a_llama(lora_fused, device, dora, tied, dtype, tolerance):
    """float64 shows that nothing but rounding separates the two runs."""
    targets = ["embed_tokens", "lm_head"] if tied else ["embed_tokens"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about merging tied weights
        plain = get_peft_model(tiny_llama(dtype, tie_word_embeddings=tied), config, autocast_adapter_dtype=False)
    randomise_adapters(plain, dtype)
    plain = plain.to(device, dtype).train()
    ours = fused(lora_fused, copy.deepcopy(plain), device)
    theirs, losses = train(plain, device), train(ours, device)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(losses, theirs, rtol=tolerance, atol=0)


# --- input errors ---


def arguments():
    return dict(
        ids=torch.tensor([1, 2]),
        weight=torch.randn(8, 16),
        lora_a=torch.randn(4, 8),
        lora_b=torch.randn(16, 4),
        magnitude=torch.ones(16),
        embed_scale=torch.tensor(2.0),
    )


@pytest.mark.parametrize(
    "name,shape",
    (("weight", (8,)), ("lora_a", (4, 7)), ("lora_a", (0, 8)), ("lora_b", (16, 3)), ("magnitude", (8,)), ("embed_scale", (2,))),
)
def test_bad_shapes_name_the_tensor(lora_fused, name, shape):
    with pytest.raises(ValueError, match=f"^{name}: shape"):
        lora_fused.lora_embedding(**{**arguments(), name: torch.ones(shape)}, scaling=1.0)


def test_bad_types_name_the_argument(lora_fused):
    for name, tensor in arguments().items():
        with pytest.raises(TypeError, match=f"^{name}: dtype"):
            lora_fused.lora_embedding(**{**arguments(), name: tensor.bool()}, scaling=1.0)
    for name in ("ids", "weight", "lora_a", "lora_b"):
        with pytest.raises(TypeError, match=f"^{name}: list"):
            lora_fused.lora_embedding(**{**arguments(), name: [1.0]}, scaling=1.0)
    with pytest.raises(TypeError, match="^scaling: nan"):
        lora_fused.lora_embedding(**arguments(), scaling=float("nan"))
    with pytest.raises(ValueError, match="^padding_idx: 8"):
        lora_fused.lora_embedding(**arguments(), scaling=1.0, padding_idx=8)
    with pytest.raises(ValueError, match="^lora_a: on meta"):
        lora_fused.lora_embedding(**{**arguments(), "lora_a": torch.empty(4, 8, device="meta")}, scaling=1.0)
