"""A variant without native code, as torch-rocm and torch-xpu are: laid out from the sources, loaded beside the native
one, and run on the CPU and in Triton's interpreter."""

import copy
import importlib.util
import json
import pathlib
import sys

import pytest
import torch
from helpers import quantized
from helpers.cases import UNIT, peft_llama, relative
from helpers.embeddings import Case as EmbeddingCase, peft_embedding
from helpers.experts import adapt, block_of
from helpers.mlps import assert_same, glu, step
from kernels import Mode, kernelize
from kernels._rust import Backend, Build
from kernels.resolver import resolve_local_kernel
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import check_build
import noarch


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noarch")
    noarch.write_source(folder / "source")
    noarch.write_variants(folder / "source", folder)
    return folder


@pytest.fixture(scope="module")
def package(variants):
    """As torch-rocm's is imported, in another namespace than that of the library that is loaded here."""
    variant = variants / "torch-rocm"
    spec = importlib.util.spec_from_file_location("lora_fused_without_ops", variant / "__init__.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.peft.small_batch.SMALL_ROWS = -1
    return module


def kernelized(package, model, device="cpu"):
    with package.use_peft_layers():
        return kernelize(copy.deepcopy(model), mode=Mode.TRAINING, device=device)


def test_the_variants_are_as_the_hub_asks(variants):
    """Imported once: they differ in names alone."""
    assert check_build.check_variant(variants / "torch-rocm") == ([], "")
    for backend in noarch.BACKENDS:
        variant = variants / f"torch-{backend}"
        assert check_build.check_layout(variant) == check_build.check_metadata(variant) == []
        assert {path.suffix for path in variant.rglob("*") if path.is_file()} == {".py", ".json"}
        assert json.loads((variant / "metadata.json").read_text())["backend"] == {"type": backend}


@pytest.mark.parametrize("backend, version", (("hip", "6.4.43482"), ("xpu", "20250300")))
def test_the_client_picks_it(variants, backend, version, monkeypatch):
    """Of the torch that it finds; where that is another, there is no variant here."""
    for name in ("cuda", "hip", "xpu"):
        monkeypatch.setattr(torch.version, name, version if name == backend else None)
    picked = resolve_local_kernel(variants, backend=None)
    assert picked.variant_path == variants / f"torch-{backend.replace('hip', 'rocm')}"
    monkeypatch.setattr(torch.version, backend, None)
    with pytest.raises(FileNotFoundError, match="Cannot find a build variant"):
        resolve_local_kernel(variants, backend=None)


def test_faults_of_the_variant(variants, tmp_path):
    variant = tmp_path / "torch-xpu"
    copied = variants / "torch-xpu"
    for path in copied.rglob("*.*"):
        (variant / path.relative_to(copied)).parent.mkdir(parents=True, exist_ok=True)
        (variant / path.relative_to(copied)).write_bytes(path.read_bytes())
    (variant / "x.abi3.so").write_bytes(b"")
    (variant / "_ops.py").write_text("import torch\nops = torch.ops.other\n")
    (variant / "metadata.json").write_text((variant / "metadata.json").read_text().replace('"xpu"', '"rocm"'))
    problems = "\n".join(check_build.check_variant(variant)[0])
    for words in ("expected none in a variant without native code", "_ops.py does not import", "the name says xpu"):
        assert words in problems, problems


def test_source_for_kernel_builder(variants):
    build, text = Build.open(variants / "source"), (ROOT / "build.toml").read_text()
    assert build.general.backends == [Backend.ROCm, Backend.XPU]
    made = noarch.tomllib.loads((variants / "source" / "build.toml").read_text())
    own = noarch.tomllib.loads(text)
    assert made["general"] | {"backends": None} == own["general"] | {"backends": None}
    assert made["torch-noarch"] == {"pyext": own["torch"]["pyext"]} and set(made) == {"general", "torch-noarch"}
    flake = (ROOT / "flake.nix").read_text()
    clean = noarch.noarch_flake(flake, {"commit": "0123456789abcdef", "dirty": False})
    assert 'self = self // { rev = "0123456789abcdef"; shortRev = "0123456"; };' in clean
    dirty = noarch.noarch_flake(flake, {"commit": "0123456789abcdef", "dirty": True})
    assert 'dirtyRev = "0123456789abcdef-dirty"; dirtyShortRev = "0123456-dirty";' in dirty
    with pytest.raises(ValueError, match="expected a line of backends"):
        noarch.noarch_toml(text.replace("backends =", "no_backends ="))


def test_what_it_is(package, lora_fused):
    native, own = package.backends.native, lora_fused.backends.native
    assert not native.available and own.available
    for name in ("ACTIVATIONS", "FORMATS", "QUANTIZED_DTYPES"):
        assert getattr(native, name) == getattr(own, name), name
    assert {device for layer in package.mapping.layer_mapping().values() for device in layer} == {"cpu", "rocm", "xpu"}
    assert {device for layer in lora_fused.mapping.layer_mapping().values() for device in layer} == {"cpu", "cuda"}


@pytest.mark.parametrize("kind", ("rocm", "xpu"))
def test_kernelize_knows_the_device(package, kind, monkeypatch):
    monkeypatch.setattr("kernels.layer.repos._find_capability", lambda: 94)  # which it asks of torch for rocm
    model = kernelized(package, glu(torch.float32), kind)
    bound = [module for module in model.modules() if getattr(type(module), "__module__", "").startswith("peft.tuners")]
    forwards = {module.forward.__func__ for module in bound if "forward" in module.__dict__}
    assert forwards == {package.layers.LoraLinear.forward}


@pytest.mark.parametrize("p", (0.0, 0.3, 0.50001, 1.0))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16), ids=str)
def test_masks_are_those_of_the_ops(package, lora_fused, p, dtype):
    for seed in (0, 5, 2**40 + 1, 2**63 - 1):
        for shape in ((37, 129), (5, 8), (0, 9), (4, 0)):
            x, mask = torch.randn(shape, dtype=dtype), lora_fused.specs.Mask(torch.tensor([seed]), p)
            for to in (dtype, torch.float32):
                ours = package.backends.native.dropout(x, mask, to)
                assert torch.equal(ours, lora_fused.backends.native.dropout(x, mask, to)) and ours.dtype == to


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_scales_are_those_of_the_ops(package, lora_fused, dtype):
    norm = torch.rand(4001, dtype=dtype) + 0.5
    units = torch.arange(-2000, 2001, dtype=dtype).div(200) * torch.finfo(dtype).eps
    for magnitude in (norm * (1 + units), torch.rand(4001, dtype=dtype)):
        ours = package.backends.native.mag_norm_scale(magnitude, norm)
        assert torch.equal(ours, lora_fused.backends.native.mag_norm_scale(magnitude, norm))
    assert 0 < (package.backends.native.mag_norm_scale(norm * (1 + units), norm) == 1).sum() < 4001


@pytest.mark.parametrize("dropout", (0.0, 0.3))
@pytest.mark.parametrize("dora", (False, True))
def test_a_model_as_with_the_ops(package, lora_fused, dora, dropout):
    """In float64, masks included; without dropout as PEFT too."""
    model = peft_llama(torch.float64, use_dora=dora, lora_dropout=dropout).train()
    ids, results = torch.randint(0, 64, (2, 9)), []
    others = [] if dropout else [model]
    for each in (kernelized(package, model), kernelized(lora_fused, model), *others):
        torch.manual_seed(3)
        loss = each(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append({"loss": loss, **{name: p.grad for name, p in each.named_parameters() if p.requires_grad}})
    assert len(results[0]) > 20
    for other in results[1:]:
        assert_same(results[0], other)


def test_explain_says_so(package, lora_fused):
    model = peft_llama()
    told = package.explain(kernelized(package, model))
    assert all(row.fused and row.backend == "torch" for row in told) and len(told) == 14
    assert "no native ops in this variant" in str(told)
    assert "no native ops" not in str(lora_fused.explain(kernelized(lora_fused, model)))


def test_gated_mlps_embeddings_and_experts(package):
    model, x = glu(), torch.randn(5, 32, dtype=torch.float64)
    assert_same(step(kernelized(package, model), x), step(model, x))
    table = peft_embedding(EmbeddingCase((7,), 33, 16, 4), torch.float64, torch.float64, "cpu", dora=True)
    ids = torch.randint(0, 33, (7,))
    torch.testing.assert_close(kernelized(package, table)(ids), table(ids), rtol=1e-10, atol=1e-10)
    mixture, x = adapt(block_of("mixtral")), torch.randn(2, 5, 32, dtype=torch.float64)
    ours = kernelized(package, mixture)
    assert any(row.fused for row in package.explain(ours))
    torch.testing.assert_close(ours(x), mixture(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
def test_weights_of_four_bits(package, lora_fused, quant_type):
    pytest.importorskip("bitsandbytes")
    layer = quantized.four_bit(nn.Linear(64, 48, bias=False), torch.float32, "cpu", quant_type)
    made = []
    for module in (package, lora_fused):
        base = module.peft.base_layer.read_base(layer, False, False)
        operands = module.specs.Operands(base.weight, None, None, None, None, None, *base.scales)
        made.append(module.quantization.dequantize(operands, base.quantized, torch.float32))
    assert torch.equal(*made)


@pytest.mark.parametrize("dora", (False, True))
@pytest.mark.parametrize("backend", ("reference", "triton", None))
def test_public_functions(package, device, backend, dora):
    """Triton's kernels in the interpreter, where there is no GPU."""
    pytest.importorskip("triton")
    x, w, a, b = (torch.randn(*shape, device=device) for shape in ((20, 48), (33, 48), (4, 48), (33, 4)))
    options = dict(magnitude=torch.rand(33, device=device) + 1) if dora else {}
    y = package.lora_linear(x, w, a, b, 0.5, backend=backend, **options)
    exact = w.double() + 0.5 * b.double() @ a.double()
    if dora:
        exact = exact * (options["magnitude"].double() / exact.norm(dim=1))[:, None]
    assert relative(y, x.double() @ exact.t())[1] < UNIT[torch.float32] * 8
    norm = package.row_norm(w, a, b, 0.5)
    torch.testing.assert_close(norm.double(), (w.double() + 0.5 * b.double() @ a.double()).norm(dim=1))
