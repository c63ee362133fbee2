"""The embedding's kernels alone: against the reference and float64, compiled, chosen, out of range."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers.cases import assert_as_good, relative, summation
from helpers.embeddings import CASES, VARIANTS, Case, draw_ids, fused, peft_embedding
from torch.utils._python_dispatch import TorchDispatchMode


def test_norm_without_a_table_sized_transient(lora_fused):
    """Chunked over the vocabulary: a V×H float32 transient would be several times the limit."""
    v, h = 20000, 64
    w, a, b = torch.randn(v, h).half(), torch.randn(4, v), torch.randn(h, 4)
    norm = lora_fused.backends.reference.embedding.column_norm(w, a, b, 0.5)
    truth = torch.linalg.vector_norm(w.double() + 0.5 * (b.double() @ a.double()).t(), dim=0)
    assert relative(norm, truth)[1] <= summation(v)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Sizes():
        lora_fused.backends.reference.embedding.column_norm(w, a, b, 0.5)
    assert 0 < max(size for size in sizes) <= lora_fused.backends.reference.embedding.NORM_CHUNK * h


HALVES = (torch.float16,) + ((torch.bfloat16,) if torch.cuda.is_available() else ())
KERNELS = [("triton", case, dtype) for case in CASES for dtype in (torch.float32, *HALVES)]
if torch.cuda.is_available():
    # Enough tokens for large blocks and for several steps of one, ids that come again far apart, the largest rank.
    LARGE = (Case((1500,), 400, 1032, 20, padding=5), Case((5000,), 300, 520, 8), Case((700,), 50, 64, 512))
    KERNELS += [
        pytest.param("native", case, dtype, marks=pytest.mark.sm80_kernels)
        for case in (*CASES, *LARGE) for dtype in HALVES if case.h % 8 == 0
    ]  # fmt: skip


@pytest.mark.parametrize("backend,case,dtype", KERNELS, ids=str)
@pytest.mark.parametrize("scale", (1.0, 7.3, "tensor"))
@pytest.mark.parametrize("dora", VARIANTS, ids=("lora", "dora"))
@pytest.mark.parametrize("half_adapter", (False, True))
def test_kernels_are_as_good_as_the_reference(
    lora_fused, poisoned, device, backend, case, dtype, scale, dora, half_adapter
):
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
            ids,
            w,
            a,
            b,
            case.scaling,
            magnitude=m if dora else None,
            embed_scale=e,
            padding_idx=case.padding,
            backend=backend,
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
    kernels = lora_fused.backends.select.get("triton")
    for case in CASES:
        w, a, b = (
            torch.randn(case.v, case.h, device=device),
            torch.randn(case.r, case.v, device=device),
            torch.randn(case.h, case.r, device=device),
        )
        truth = torch.linalg.vector_norm(w.double() + 0.7 * (b.double() @ a.double()).t(), dim=0)
        assert relative(kernels.column_norm(w, a, b, 0.7), truth)[1] <= 2 * summation(case.v + case.r)


def test_triton_sums_repeated_tokens_and_spreads_no_nan(lora_fused, device):
    """An infinite row reaches its own id alone; the pairwise and the sorted scatter agree."""
    kernels, plain = lora_fused.backends.select.get("triton"), lora_fused.backends.reference.embedding
    ids = torch.randint(0, 9, (300,), device=device)
    drows, lora_a = torch.randn(300, 5, device=device), torch.zeros(5, 11, device=device)
    for padding in (None, 4):
        ours, theirs = (
            kernels.scatter_rows(drows, ids, lora_a, padding),
            plain.scatter_rows(drows, ids, lora_a, padding),
        )
        torch.testing.assert_close(ours, theirs)
        assert ours.is_contiguous() and ours[:, 9:].abs().max() == 0
    drows[7] = float("inf")
    infinite = ~kernels.scatter_rows(drows, ids, lora_a, None).isfinite().all(0)
    assert infinite.nonzero().flatten().tolist() == [ids[7].item()]


def test_triton_compiles_for_a_gpu_whatever_is_frozen(lora_fused):
    """The interpreter runs only the branches that are taken; a compiler reads them all."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "compile_embedding.py"), str(ROOT / "build")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "compiled 16" in done.stdout, done.stderr[-2000:]


@pytest.mark.sm80_kernels
def test_choice_of_backend(lora_fused):
    choose = lora_fused.backends.select.choose_embedding
    table = lora_fused.specs.EmbeddingOperands(torch.empty(16, 8), torch.empty(2, 16), torch.empty(8, 2))
    assert choose(table, 5) == "reference"
    if torch.cuda.is_available():
        on_gpu = lora_fused.specs.EmbeddingOperands(*(t.cuda() for t in table[:3]))
        assert choose(on_gpu, 5) == "triton"  # float32: the native ops take half-precision tables
        on_gpu = on_gpu._replace(weight=on_gpu.weight.bfloat16())
        up_to = lora_fused.backends.device_config.of(on_gpu.weight.device).embedding_tokens
        assert choose(on_gpu, up_to) == "native" and choose(on_gpu, up_to + 1) == "triton"
        assert choose(on_gpu._replace(lora_a=on_gpu.lora_a.t().contiguous().t()), 5) == "triton"
        assert choose(on_gpu._replace(lora_a=on_gpu.lora_a.double()), 5) == "reference"
        for rank, name in (
            (lora_fused.backends.native_embedding.RANKS, "native"),
            (lora_fused.backends.native_embedding.RANKS + 1, "triton"),
        ):
            a, b = torch.empty(rank, 16, device="cuda"), torch.empty(8, rank, device="cuda")
            assert choose(on_gpu._replace(lora_a=a, lora_b=b), 5) == name
    for backend in ("cutlass", "native"):
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
        for backend in ("native", "triton"):
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
