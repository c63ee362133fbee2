"""Bases that are called: the base module's own forward, the delta fused, PEFT's results.

bitsandbytes' int8 layer, transformers' FP8Linear and, where it is installed, torchao are themselves here;
the layers of GPTQ, AWQ, AQLM, HQQ and EETQ stand on a base of the same interface, and so does FP8Linear's
kernel. HQQ, EETQ and torchao need their libraries at PEFT's import: a process of their own has stand-ins.
"""

import importlib.machinery
import importlib.util
import pathlib
import subprocess
import sys
import types

import pytest
import torch
from helpers.cases import Case, DrawnDropout, randomise_adapters
from kernels import Mode, get_local_kernel, kernelize
from torch import nn

BF16, F32 = torch.bfloat16, torch.float32
CASE = Case((40,), 64, 48, 5)
ROOT = pathlib.Path(__file__).resolve().parent.parent


class Int8Base(nn.Module):
    """A linear of int8 codes that multiplies in its own dtype, and whose result is that of x."""

    def __init__(self, k, n, compute=F32):
        super().__init__()
        self.in_features, self.out_features, self.compute = k, n, compute
        self.register_buffer("codes", torch.randint(-127, 128, (n, k), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(n) / k)
        self.qweight = self.weight = self.codes
        self.calls = 0

    def dequantize(self):
        return self.codes * self.scales.view(-1, 1)

    def forward(self, x):
        self.calls += 1
        return nn.functional.linear(x.to(self.compute), self.dequantize().to(self.compute)).to(x.dtype)


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.proj = layer

    def forward(self, x):
        return self.proj(x)


def wrapped(cls, base, **config):
    """PEFT's layer of a quantization on a base, in training mode."""
    from peft import LoraConfig

    config = LoraConfig(r=CASE.r, lora_alpha=3, **config)
    layer = cls(base, "default", config=config, r=CASE.r, lora_alpha=3)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora_" in name)
    randomise_adapters(layer, F32)
    return layer.train()


def passes(model, x, dy, autocast):
    for parameter in model.parameters():
        parameter.grad = None
    x = x.clone().requires_grad_()
    from helpers import quantized

    with quantized.as_on_gpu("cpu", BF16 if autocast else None):
        y = model(x)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


def assert_as_peft(lora_fused, model, layer, dropout=0.0, dtypes=(F32, BF16)):
    """Kernelized, the base is called once and everything is PEFT's: float32, bf16 input, autocast."""
    lora_fused.register_peft_layers()
    for dtype in dtypes:
        for autocast in (False, True):
            x, dy = torch.randn(*CASE.lead, CASE.k).to(dtype), torch.randn(*CASE.lead, CASE.n)
            if dropout:
                own = layer.lora_dropout["default"]
                layer.lora_dropout["default"] = DrawnDropout(lora_fused, dropout, x.shape, "cpu")
            state = torch.get_rng_state()
            theirs = passes(model, x, dy, autocast)
            if dropout:
                layer.lora_dropout["default"] = own
            kernelize(model, mode=Mode.TRAINING, device="cpu")
            row = lora_fused.explain(model)[0]
            assert row.fused and row.backend == "fused delta" and row.reason.startswith("base layer's own forward: "), (
                row
            )
            before = getattr(layer.base_layer, "calls", None)
            torch.set_rng_state(state)
            ours = passes(model, x, dy, autocast)
            assert before is None or layer.base_layer.calls == before + 1
            model.proj.__dict__.pop("forward", None) if model.proj is layer else None
            for module in model.modules():
                module.__dict__.pop("forward", None)
            tolerance = 2.0**-6 if BF16 in (dtype, BF16 if autocast else F32) else 1e-5
            assert set(ours) == set(theirs)
            for name, value in ours.items():
                peft = theirs[name]
                assert value.dtype == peft.dtype and value.shape == peft.shape, (name, value.dtype, peft.dtype)
                error = (value.double() - peft.double()).norm() / peft.double().norm()
                assert error <= tolerance, (name, dtype, autocast, error.item())


def peft_class(module, name):
    return getattr(importlib.import_module(f"peft.tuners.lora.{module}"), name)


@pytest.mark.parametrize(
    "module, name", (("gptq", "GPTQLoraLinear"), ("awq", "AwqLoraLinear"), ("aqlm", "AqlmLoraLinear")), ids=str
)
@pytest.mark.parametrize("config", ({}, dict(lora_dropout=0.3), dict(lora_bias=True)), ids=str)
def test_stand_ins(lora_fused, module, name, config):
    layer = wrapped(peft_class(module, name), Int8Base(CASE.k, CASE.n), **config)
    assert_as_peft(lora_fused, Model(layer), layer, config.get("lora_dropout", 0.0))


def test_hooks_on_a_called_base_run(lora_fused):
    layer = wrapped(peft_class("gptq", "GPTQLoraLinear"), Int8Base(CASE.k, CASE.n))
    seen = []
    layer.base_layer.register_forward_hook(lambda *args: seen.append(1))
    assert_as_peft(lora_fused, Model(layer), layer, dtypes=(F32,))
    assert len(seen) == 4


def test_a_qalora_variant_is_pefts(lora_fused):
    layer = wrapped(
        peft_class("gptq", "GPTQLoraLinear"), Int8Base(CASE.k, CASE.n), use_qalora=True, qalora_group_size=16
    )
    model = Model(layer)
    lora_fused.register_peft_layers()
    kernelize(model, mode=Mode.TRAINING, device="cpu")
    with pytest.warns(UserWarning):
        assert "QALora" in lora_fused.explain(model)[0].reason
    assert torch.isfinite(model(torch.randn(40, CASE.k))).all()


def int8_model(bias=False, **config):
    from helpers import quantized

    torch.manual_seed(0)
    case = Case((40,), CASE.k, CASE.n, CASE.r, bias=bias)
    model = quantized.replace(quantized.One(case, F32, "cpu"), quantized.eight_bit)
    model, layer = quantized.adapted(model, case, **config)
    assert type(layer).__name__ == "Linear8bitLt"
    return Model(layer), layer


@pytest.mark.parametrize("config", ({}, dict(lora_dropout=0.3)), ids=str)
@pytest.mark.parametrize("bias", (False, True))
def test_bitsandbytes_int8(lora_fused, config, bias):
    pytest.importorskip("bitsandbytes")
    model, layer = int8_model(bias, **config)
    assert_as_peft(lora_fused, model, layer, config.get("lora_dropout", 0.0), dtypes=(F32,))


@pytest.mark.parametrize("bias", (False, True))
def test_dora_on_int8(lora_fused, bias):
    """The norm from the int8 rows, at every step. PEFT's own DoRA loses the layer's scales on the CPU, so
    that it computes once, and a later call says so."""
    pytest.importorskip("bitsandbytes")
    x, dy = torch.randn(40, CASE.k), torch.randn(40, CASE.n)
    peft_model, peft_layer = int8_model(bias, use_dora=True)
    theirs = passes(peft_model, x, dy, False)
    model, _ = int8_model(bias, use_dora=True)
    lora_fused.register_peft_layers()
    kernelize(model, mode=Mode.TRAINING, device="cpu")
    for _ in range(2):
        for name, value in passes(model, x, dy, False).items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)
    kernelize(peft_model, mode=Mode.TRAINING, device="cpu")
    with pytest.raises(ValueError, match=r"Linear8bitLt\(64, 48\): the scales of the int8 weight are missing"):
        peft_model(x)


def test_dora_with_dropout_on_a_called_base_is_pefts(lora_fused):
    pytest.importorskip("bitsandbytes")
    from helpers import quantized

    model = quantized.replace(quantized.One(CASE, F32, "cpu"), quantized.eight_bit)
    model, layer = quantized.adapted(model, CASE, use_dora=True, lora_dropout=0.3)
    with pytest.warns(UserWarning, match="DoRA with dropout on a base that is called"):
        assert not quantized.fuse(lora_fused, model)[0].fused
    assert torch.isfinite(model(torch.randn(40, CASE.k))).all()


def fp8_reference(x, weight, scale, block_size=None, activation_scale=None, bias=None, *_, **__):
    """What the FP8 kernel computes, but for the quantization of x: weights times the scales of their blocks."""
    wide = weight.float()
    if block_size is None or scale.numel() == 1:
        wide = wide * scale
    else:
        rows, cols = (torch.arange(size) // block for size, block in zip(wide.shape, block_size))
        wide = wide * scale[rows][:, cols]
    return nn.functional.linear(x, wide.to(x.dtype), bias)


@pytest.mark.parametrize("block_size", (None, (128, 128), (1, CASE.k)), ids=("tensor", "blocks", "rows"))
def test_fp8(lora_fused, monkeypatch, block_size):
    """transformers' own layer and PEFT's plain LoRA linear on it; the kernel, which needs a GPU, is replaced."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    monkeypatch.setattr(fp8, "fp8_linear", fp8_reference)
    base = fp8.FP8Linear(CASE.k, CASE.n, block_size=block_size)
    base.weight.data = torch.randn(CASE.n, CASE.k).to(torch.float8_e4m3fn)
    base.weight_scale_inv.data = torch.rand_like(base.weight_scale_inv.data) / CASE.k
    base.requires_grad_(False)
    layer = wrapped(peft_class("layer", "Linear"), base)
    assert_as_peft(lora_fused, Model(layer), layer)


@pytest.mark.parametrize("kind", ("hqq", "eetq", "torchao"))
def test_stand_ins_in_a_process_of_their_own(kind):
    if importlib.util.find_spec(kind) is not None:
        pytest.skip(f"{kind} itself is installed")
    code = f"import test_fused_delta; test_fused_delta.with_stand_in({kind!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("as PEFT\n"), done.stdout + done.stderr


def stand_in_module(name, **contents):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    for key, value in contents.items():
        setattr(module, key, value)
    sys.modules[name] = module


def with_stand_in(kind):
    """PEFT's layer of a library that is not installed, on a base of its interface."""
    torch.manual_seed(0)
    if kind == "hqq":
        stand_in_module("hqq")
        stand_in_module("hqq.core")
        stand_in_module("hqq.core.quantize", HQQLinear=Int8Base)
        cls = peft_class("hqq", "HqqLoraLinear")
    elif kind == "eetq":
        stand_in_module("eetq", EetqLinear=Int8Base)
        cls = peft_class("eetq", "EetqLoraLinear")
    else:
        stand_in_module("torchao")
        stand_in_module("torchao.quantization", Int4Tensor=tuple)
        cls = peft_class("torchao", "TorchaoLoraLinear")
    lora_fused = get_local_kernel(ROOT / "build")
    configs = ({}, dict(lora_dropout=0.3))
    for config in configs:
        layer = wrapped(cls, Int8Base(CASE.k, CASE.n), **config)
        assert_as_peft(lora_fused, Model(layer), layer, config.get("lora_dropout", 0.0))
    print("as PEFT")


def test_torchao(lora_fused):
    """torchao itself, int8 weight only."""
    torchao = pytest.importorskip("torchao.quantization")
    from peft import LoraConfig, get_peft_model

    inner = Model(nn.Linear(CASE.k, CASE.n, bias=False))
    torchao.quantize_(inner, torchao.Int8WeightOnlyConfig())
    model = get_peft_model(inner, LoraConfig(r=CASE.r, lora_alpha=3, target_modules=["proj"]))
    layer = model.base_model.model.proj
    assert type(layer).__name__ == "TorchaoLoraLinear"
    randomise_adapters(model, F32)
    assert_as_peft(lora_fused, Model(layer.train()), layer, dtypes=(F32,))


@pytest.mark.parametrize("trained", (True, False))
def test_x_is_saved_for_a_alone(lora_fused, trained):
    x, base = torch.randn(5, 16, requires_grad=True), torch.randn(5, 12)
    a, b = torch.randn(3, 16, requires_grad=trained), torch.randn(12, 3, requires_grad=True)
    projection = lora_fused.Projection(lora_fused.Operands(torch.randn(12, 16), lora_a=a, lora_b=b), 0.5)
    saved, dy = [], torch.randn(5, 12)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_fused.functional.delta.add_delta(base, x, projection, False)
    assert [t.data_ptr() for t in saved].count(x.data_ptr()) == trained
    dx, db = torch.autograd.grad(y, (x, b), dy)
    torch.testing.assert_close(dx, 0.5 * dy @ b @ a)
    torch.testing.assert_close(db, 0.5 * dy.t() @ (x @ a.t()))
