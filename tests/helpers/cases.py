"""The only home of shapes, dtypes and tolerances, and of the tiny models that tests train."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """One projection: x [*lead, k], weight [n, k], rank r, base bias or none; `conv1d` stores the weight
    transposed and always has a bias."""

    lead: tuple[int, ...]
    k: int
    n: int
    r: int
    bias: bool = False
    scaling: float = 0.7
    conv1d: bool = False

    def __str__(self) -> str:
        lead = "x".join(map(str, self.lead)) or "vector"
        return f"{lead}-k{self.k}-n{self.n}-r{self.r}{'-bias' if self.bias else ''}{'-conv1d' if self.conv1d else ''}"


# Odd sizes, no tokens, one token, every leading shape, ranks below, at and above a dot's tile.
# Not one token of rank one: its dA is a single inner product, whose error is its condition number.
CASES = (
    Case((), 64, 64, 8),
    Case((0,), 64, 32, 4, bias=True),
    Case((1,), 33, 17, 5),
    Case((40,), 24, 80, 1),
    Case((7,), 72, 100, 3, bias=True),
    Case((2, 65), 96, 130, 16),
    Case((3, 2, 11), 136, 72, 33, bias=True),
    Case((130,), 257, 129, 100),
    Case((70,), 64, 192, 512, bias=True),
    Case((2, 21), 40, 56, 6, conv1d=True),
)

# On quantized bases. On the CPU bitsandbytes takes rows of broken blocks apart in its own way, so that
# it is called there: K is a multiple of the blocksize where the product is to be ours.
QUANTIZED_CASES = (
    Case((1,), 64, 64, 8),
    Case((0,), 64, 32, 4, bias=True),
    Case((4,), 128, 48, 5),
    Case((40,), 64, 80, 1),
    Case((7,), 128, 100, 3, bias=True),
    Case((2, 65), 192, 130, 16),
    Case((3, 2, 11), 256, 71, 33, bias=True),
)
BROKEN_ROWS = (Case((40,), 96, 70, 4), Case((2, 9), 33, 17, 5, bias=True))

# What PEFT's configuration makes of a linear, each alone and together where PEFT allows it.
VARIANTS = {
    "lora": {},
    "lora_bias": dict(lora_bias=True),
    "dropout": dict(lora_dropout=0.3),
    "dropout-lora_bias": dict(lora_dropout=0.3, lora_bias=True),
    "dora": dict(use_dora=True),
    "dora-dropout": dict(use_dora=True, lora_dropout=0.3),
}

# (base, adapter); PEFT keeps adapters of a half-precision base in float32 unless told otherwise.
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
)

# Our error may be this many times PEFT's own, plus the rounding unit of what is stored.
FACTOR = 2.0
UNIT = {torch.float64: 2.0**-50, torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def relative(value: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """(RMS, maximum) error of `value`, each over the RMS and the maximum of `truth`."""
    if truth.numel() == 0:
        return 0.0, 0.0
    truth = truth.detach().double().cpu()
    error = value.detach().double().cpu() - truth
    rms, peak = truth.square().mean().sqrt().item(), truth.abs().max().item()
    if rms == 0.0:
        return error.abs().max().item(), error.abs().max().item()
    return error.square().mean().sqrt().item() / rms, error.abs().max().item() / peak


def summation(terms: int) -> float:
    """Error of a float32 sum taken term by term, √n·2⁻²⁴ with high probability (Higham & Mary
    2019, doi 10.1137/18M1226312); a library that sums in blocks stays below it."""
    return terms**0.5 * 2.0**-24


def assert_as_good(name: str, ours, theirs, truth, unit_of: torch.dtype, terms: int = 0, stored: int = 1) -> None:
    """Our error against float64 truth is within FACTOR of PEFT's in the same dtype, plus a unit for
    each result `stored` on the way (one for a linear), plus `summation(terms)` where the kernel adds
    that many terms one after another."""
    assert ours.shape == theirs.shape, f"{name}: shape {tuple(ours.shape)}, PEFT {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype}, PEFT {theirs.dtype}"
    for kind, mine, peft in zip(("RMS", "max"), relative(ours, truth), relative(theirs, truth)):
        bound = FACTOR * peft + stored * UNIT[unit_of] + summation(terms)
        assert mine <= bound, f"{name}: {kind} error {mine:.3g}, bound {bound:.3g}, PEFT {peft:.3g}"


def peft_linear(case: Case, base_dtype, adapter_dtype, device=DEVICE, **config):
    """A `peft.tuners.lora.Linear` with random A and B (B is never zero), a magnitude away from the norm
    where there is one, and a frozen base; in training mode."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            if case.conv1d:
                self.proj = Conv1D(case.n, case.k)
                self.proj.weight.data.mul_(50 * case.k**-0.5)
            else:
                self.proj = torch.nn.Linear(case.k, case.n, bias=case.bias)

        def forward(self, x):
            return self.proj(x)

    lora = LoraConfig(
        r=case.r, lora_alpha=case.scaling * case.r, target_modules=["proj"], fan_in_fan_out=case.conv1d, **config
    )
    model = get_peft_model(Model().to(device=device, dtype=base_dtype), lora, autocast_adapter_dtype=False)
    randomise_adapters(model, adapter_dtype)
    return model.train(), model.base_model.model.proj


def take_exactly(lora_fused, monkeypatch) -> list:
    """From here on layers on the CPU give the native op what they give it on a GPU, float32 adapters without
    autocast included; the list gets whether each call was exact."""
    own, calls = lora_fused.functional.dispatch.native_path, []

    def native_path(projections, dtype, lora_dtype, is_cuda):
        taken = own(projections, dtype, lora_dtype, True)
        calls.append(taken.bf16x3)
        return taken

    monkeypatch.setattr(lora_fused.functional.dispatch, "native_path", native_path)
    return calls


def randomise_adapters(model, dtype) -> None:
    """At fresh initialisation B is zero and the magnitude equals the norm: wrong formulas pass."""
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data = (parameter.data.float() * (0.5 + torch.rand_like(parameter, dtype=torch.float32))).to(
                dtype
            )
        elif "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * parameter.shape[-1] ** -0.5
            parameter.data = parameter.data.to(dtype)


class DrawnDropout(torch.nn.Module):
    """Dropout with the mask that our kernels draw at the next call with the generator as it is now:
    given to PEFT, so that both compute the same thing."""

    def __init__(self, lora_fused, p: float, shape, device, index: int = 0, members: int = 1):
        super().__init__()
        state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
        seeds = torch.randint(0, 2**63 - 1, (members,), device=device)
        torch.set_rng_state(state) if device == "cpu" else torch.cuda.set_rng_state(state)
        rows = int(torch.Size(shape[:-1]).numel())
        self.scale = torch.empty((rows, shape[-1]), dtype=torch.float64, device=device)
        ones = torch.ones_like(self.scale)
        lora_fused._ops.ops.dropout(ones, seeds[index : index + 1], p, self.scale)
        self.scale = self.scale.view(shape)

    def forward(self, x):
        return x * self.scale.to(x.dtype)


class SeededDropout(torch.nn.Module):
    """Dropout that draws its seed when it is called, as a projection of our layers does, and with it the same mask:
    in place of PEFT's own, both models compute the same from the same state of the generator."""

    def __init__(self, lora_fused, p: float):
        super().__init__()
        self.op, self.p = lora_fused._ops.ops.dropout, p

    def forward(self, x):
        if not self.training:
            return x
        seed = torch.randint(0, 2**63 - 1, (1,), device=x.device)
        scale = torch.empty((x.numel() // max(x.shape[-1], 1), x.shape[-1]), dtype=torch.float64, device=x.device)
        self.op(torch.ones_like(scale), seed, self.p, scale)
        return x * scale.view(x.shape).to(x.dtype)

    @classmethod
    def replace_all(cls, lora_fused, model) -> int:
        """In place of every dropout of LoRA's in `model`; how many those are."""
        places = [
            (module.lora_dropout, name, drop)
            for module in model.modules()
            for name, drop in getattr(module, "lora_dropout", {}).items()
            if isinstance(drop, torch.nn.Dropout)
        ]
        for drops, name, drop in places:
            drops[name] = cls(lora_fused, drop.p).train(drop.training)
        return len(places)


class OwnForwards:
    """Counts the calls of PEFT's own LoRA forwards in a with-block, by class, and touches none of them: a forward that
    is replaced is a reason to run it. Sees this thread alone."""

    def __init__(self):
        from peft.tuners.lora import LoraLayer

        classes = [LoraLayer]
        for cls in classes:
            classes += cls.__subclasses__()
        self._names = {cls.forward.__code__: cls.__name__ for cls in classes if "forward" in vars(cls)}
        self.calls: Counter[str] = Counter()

    def _profile(self, frame, event, _):
        if event == "call" and frame.f_code in self._names:
            self.calls[self._names[frame.f_code]] += 1

    def __enter__(self) -> Counter[str]:
        self._before = sys.getprofile()
        sys.setprofile(self._profile)
        return self.calls

    def __exit__(self, *_):
        sys.setprofile(self._before)


def tiny_llama(dtype=torch.float32, **overrides):
    """A Llama-architecture causal LM of two layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**shape, **overrides})).to(dtype)


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_llama(dtype=torch.float32, shape=None, **config):
    """The tiny Llama, of another `shape` where given, with LoRA on all linears, B drawn at random, magnitudes
    away from the norm."""
    from peft import LoraConfig, get_peft_model

    options = dict(r=4, lora_alpha=8, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(dtype, **(shape or {})), LoraConfig(**{**options, **config}))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter)
        elif "lora_magnitude" in name:
            parameter.data *= 0.8 + 0.4 * torch.rand(parameter.shape, generator=generator, device="cpu").to(parameter)
    return model


def assert_computes_gated_mlp(module, found, maths, width):
    """down(f(gate(x))·up(x)), computed in float64 as `found` says, is what the module computes."""
    module = module.double()
    for parameter in module.parameters():
        assert parameter.numel() > 0
        torch.nn.init.normal_(parameter, std=0.3)
    child = module.get_submodule
    x = torch.randn(3, 5, width, dtype=torch.float64)
    if found.fused:
        parts = child(found.gate)(x).chunk(2, dim=-1)
        gate, up = parts[found.gate_half], parts[1 - found.gate_half]
    else:
        gate, up = child(found.gate)(x), child(found.up)(x)
    ours = child(found.down)(maths.gated(gate, up, found.activation))
    for mode in (module.train(), module.eval()):
        torch.testing.assert_close(ours, mode(x), rtol=1e-12, atol=1e-12)
