"""Mixtures of experts: one frozen layer with transformers' grouped_mm, PEFT's target_parameters and lora-fused, in one
process.

Training is forward + backward with every trained parameter changed in place before each step; decoding is a call of a
few tokens without a gradient. Times are medians between two events on the GPU. "x" is the time over that of the frozen
layer with grouped_mm (training) or with the faster of grouped_mm and batched_mm (decoding) of the same run. Each fused
case is held against PEFT first, in float32 routing of the same indices: y and all gradients. "saved" is what a forward
keeps for its backward besides parameters, "peak" what a step needs on top of what is there before it.

    python benchmarks/compare_experts.py --out results.json  # a GPU of 40 GB or more, some minutes
    python benchmarks/compare_experts.py --shapes qwen3 --tokens 2048
    python benchmarks/compare_experts.py --small  # on a CPU: that all of it runs, not how fast it is
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import pathlib
import statistics
import time
import warnings
from typing import NamedTuple

import kernels
import measuring
import peft
import torch
import transformers
from measuring import release_memory
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parent.parent
RANK, SCALING = 16, 2.0
LAYER = "layer.experts"


class Shape(NamedTuple):
    """title, configuration, module and class of the block, and the configuration's sizes."""

    title: str
    config: str
    block: str
    sizes: dict


def _qwen3(hidden, width, experts, chosen):
    sizes = dict(hidden_size=hidden, moe_intermediate_size=width, num_experts=experts, num_experts_per_tok=chosen)
    return Shape(
        "Qwen3-30B-A3B", "Qwen3MoeConfig", "qwen3_moe.Qwen3MoeSparseMoeBlock", dict(sizes, norm_topk_prob=True)
    )


def _mixtral(hidden, width, experts, chosen):
    sizes = dict(hidden_size=hidden, intermediate_size=width, num_local_experts=experts, num_experts_per_tok=chosen)
    return Shape("Mixtral-8x7B", "MixtralConfig", "mixtral.MixtralSparseMoeBlock", dict(sizes, router_jitter_noise=0.0))


def _gpt_oss(hidden, width, experts, chosen):
    sizes = dict(hidden_size=hidden, intermediate_size=width, num_local_experts=experts, num_experts_per_tok=chosen)
    return Shape("gpt-oss-20b", "GptOssConfig", "gpt_oss.GptOssMLP", sizes)


SHAPES = {
    "qwen3": _qwen3(2048, 768, 128, 8),
    "mixtral": _mixtral(4096, 14336, 8, 2),
    "gpt_oss": _gpt_oss(2880, 2880, 32, 4),
}
SMALL = {"qwen3": _qwen3(64, 48, 16, 4), "mixtral": _mixtral(64, 96, 4, 2), "gpt_oss": _gpt_oss(64, 64, 8, 2)}


class Layer(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


def build(shape: Shape, device: str, dtype: torch.dtype) -> Layer:
    """A frozen layer of random weights, the same for every variant."""
    module, _, name = shape.block.partition(".")
    modeling = getattr(getattr(transformers.models, module), f"modeling_{module}")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            layer = Layer(getattr(modeling, name)(getattr(transformers, shape.config)(**shape.sizes)))
    finally:
        torch.set_default_dtype(before)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
        nn.init.normal_(parameter, std=shape.sizes["hidden_size"] ** -0.5)
    set_implementation(layer, "grouped_mm")
    return layer


def set_implementation(model: nn.Module, name: str) -> None:
    for module in model.modules():
        if hasattr(type(module), "_apply_gate"):
            module.config._experts_implementation = name


def adapt(layer: Layer, adapter_dtype: torch.dtype) -> nn.Module:
    """PEFT's model of a layer, its adapters the same at every call."""
    names = [f"{LAYER}.gate_up_proj", f"{LAYER}.down_proj"]
    config = peft.LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=[], target_parameters=names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(layer, config, autocast_adapter_dtype=False)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.02)
            parameter.data = parameter.data.to(adapter_dtype)
    return model


def kernelized(lora_fused, model: nn.Module, device: str) -> nn.Module:
    with lora_fused.use_peft_layers():
        return kernels.kernelize(model, mode=kernels.Mode.TRAINING, device=device)


def timed(step, before, repeats: int, warm_up: int, device: str) -> dict:
    """The median in ms and the peak in GB above what was allocated, which a CPU has none of."""
    for _ in range(warm_up):
        before()
        step()
    if device == "cuda":
        found = measuring.measured(step, before, repeats)
        return dict(ms=found["ms"], peak_gb=found["transient_gb"])
    times = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return dict(ms=statistics.median(times), peak_gb=None)


def train(model: nn.Module, x: torch.Tensor, dy: torch.Tensor, repeats: int) -> dict:
    def before():
        x.grad = None
        measuring.change_parameters(model)

    measured = timed(lambda: model(x).backward(dy), before, repeats, 5, x.device.type)
    return {**measured, "saved_gb": saved(model, x) / 1e9}


def saved(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward keeps besides parameters and x."""
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    seen: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return sum(seen.values())


def results_of(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict:
    for parameter in model.parameters():
        parameter.grad = None
    x.grad = None
    y = model(x)
    y.backward(dy)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad.clone(), **grads}


def differences(ours: dict, theirs: dict) -> dict:
    """‖ours - PEFT's‖ / ‖PEFT's‖ and the norm of PEFT's, of y and of every gradient."""
    found = {}
    for name, truth in theirs.items():
        norm = truth.double().norm()
        found[name] = (((ours[name].double() - truth.double()).norm() / norm).item(), norm.item())
    return found


def training_rows(lora_fused, shape: Shape, tokens: int, args) -> list[dict]:
    rows = []
    x = torch.randn(1, tokens, shape.sizes["hidden_size"], device=args.device, dtype=args.dtype).requires_grad_()
    dy = torch.randn_like(x)
    layer = build(shape, args.device, args.dtype)
    for implementation in args.frozen:
        set_implementation(layer, implementation)
        rows.append(attempt(f"frozen, {implementation}", lambda: train(layer, x, dy, args.repeats)))
    set_implementation(layer, "grouped_mm")
    for adapter_dtype in args.adapters:
        kind = str(adapter_dtype).removeprefix("torch.")
        model = adapt(copy.deepcopy(layer), adapter_dtype)
        if args.compile:
            torch._dynamo.reset()
            compiled = torch.compile(model, dynamic=False)
            row = attempt(f"PEFT compiled, {kind}", lambda: train(compiled, x, dy, args.repeats))
            rows.append(row)
        theirs = results_of(model, x, dy)
        rows.append(attempt(f"PEFT, {kind}", lambda: train(model, x, dy, args.repeats)))
        model = None
        release_memory()
        model = kernelized(lora_fused, adapt(copy.deepcopy(layer), adapter_dtype), args.device)
        for backend in args.backends:
            with backend_of(lora_fused, backend):
                found = differences(results_of(model, x, dy), theirs)
                assert_fused(lora_fused, model)
                row = attempt(variant(kind, backend), lambda: train(model, x, dy, args.repeats))
            rows.append({**row, "differs": max(error for error, _ in found.values()), "differences": found})
        model = theirs = None
        release_memory()
    return [dict(row, shape=shape.title, tokens=tokens, kind="training") for row in rows]


def decoding_rows(lora_fused, shape: Shape, tokens: int, args) -> list[dict]:
    rows = []
    x = torch.randn(1, tokens, shape.sizes["hidden_size"], device=args.device, dtype=args.dtype)
    layer = build(shape, args.device, args.dtype).eval()

    @torch.no_grad()
    def row(name, model):
        return attempt(name, lambda: timed(lambda: model(x), lambda: None, 5 * args.repeats, 10, args.device))

    for implementation in ("grouped_mm", "batched_mm"):
        set_implementation(layer, implementation)
        rows.append(row(f"frozen, {implementation}", layer))
    for adapter_dtype in args.adapters:
        kind = str(adapter_dtype).removeprefix("torch.")
        model = adapt(copy.deepcopy(layer), adapter_dtype).eval()
        rows.append(row(f"PEFT, batched_mm, {kind}", model))
        model = kernelized(lora_fused, model, args.device)
        assert_fused(lora_fused, model)
        for backend in args.backends:
            with backend_of(lora_fused, backend):
                rows.append(row(variant(kind, backend), model))
        model = None
        release_memory()
    return [dict(each, shape=shape.title, tokens=tokens, kind="decoding") for each in rows]


def variant(kind: str, backend: str) -> str:
    return f"lora-fused, {kind}" + ("" if backend == "default" else f", {backend}")


@contextlib.contextmanager
def backend_of(lora_fused, name: str):
    """Products of one backend, whatever would be chosen."""
    select = lora_fused.backends.select
    chosen = select.choose_experts, select.few_rows
    if name != "default":
        select.choose_experts = lambda *_: name
    if name not in ("default", "triton"):
        select.few_rows = lambda *_: None
    try:
        yield
    finally:
        select.choose_experts, select.few_rows = chosen


def assert_fused(lora_fused, model: nn.Module) -> None:
    rows = lora_fused.explain(model)
    assert len(rows) == 2 and all(row.fused for row in rows), str(rows)


def attempt(name: str, measure) -> dict:
    """A row; what cannot run is said, and takes no other with it."""
    try:
        return dict(variant=name, **measure())
    except (RuntimeError, ImportError, ValueError) as error:
        return dict(
            variant=name, note=f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
        )


def with_ratios(rows: list[dict]) -> list[dict]:
    """Each time over the frozen layer's of the same shape, tokens and kind."""
    for row in rows:
        same = [each for each in rows if all(each[key] == row[key] for key in ("shape", "tokens", "kind"))]
        frozen = [each["ms"] for each in same if each["variant"].startswith("frozen") and "ms" in each]
        if row["kind"] == "training":
            frozen = [each["ms"] for each in same if each["variant"] == "frozen, grouped_mm" and "ms" in each]
        if "ms" in row and frozen:
            row["ratio"] = row["ms"] / min(frozen)
    return rows


def show(rows: list[dict]) -> None:
    header = f"{'shape':14s} {'tokens':>6s}  {'variant':32s} {'ms':>9s} {'x':>6s} {'saved':>7s} {'peak':>7s}  differs"
    for kind in ("training", "decoding"):
        print(f"\n{kind}, GB\n{header}")
        for row in (each for each in rows if each["kind"] == kind):
            head = f"{row['shape']:14s} {row['tokens']:6d}  {row['variant']:32s}"
            if "ms" not in row:
                print(f"{head} {row['note']}")
                continue
            numbers = (row.get("ratio"), row.get("saved_gb"), row.get("peak_gb"))
            ratio, kept, peak = (" " * w if v is None else f"{v:{w}.2f}" for v, w in zip(numbers, (6, 7, 7)))
            differs = "" if "differs" not in row else f"  {row['differs']:.1e}"
            print(f"{head} {row['ms']:9.3f} {ratio} {kept} {peak}{differs}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--decoding", nargs="*", type=int, default=[1, 2, 4, 8, 64], help="tokens; none: no decoding")
    parser.add_argument("--frozen", nargs="+", default=["grouped_mm"], help="implementations of the frozen layer, "
                        "such as deepgemm and sonicmoe, where they can be loaded")  # fmt: skip
    parser.add_argument("--adapters", nargs="+", default=["float32", "bfloat16"])
    backends = ("default", "grouped_mm", "triton", "reference")
    parser.add_argument(
        "--backends", nargs="+", default=["default"], choices=backends, help="of lora-fused, a row each"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile of PEFT's, too: minutes")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="small shapes on a CPU")
    parser.add_argument("--out", help="a JSON file for all numbers")
    args = parser.parse_args()
    args.device, args.dtype = ("cpu" if args.small else "cuda"), torch.bfloat16
    if args.small:
        args.tokens, args.decoding, args.repeats = [64], args.decoding[:2], 2
    elif not torch.cuda.is_available():
        parser.error("no GPU: --small runs on a CPU")
    args.adapters = [getattr(torch, name) for name in args.adapters]
    return args


def main() -> None:
    args = arguments()
    logging.getLogger("kernels").setLevel(logging.ERROR)  # it lists layers that are not ours
    lora_fused = kernels.get_local_kernel(ROOT / "build")
    device = "CPU" if args.small else torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(f"{device}, {versions}, r={RANK}, {args.dtype}, median of {args.repeats}", flush=True)
    rows = []
    for name in args.shapes:
        shape = (SMALL if args.small else SHAPES)[name]
        found = []
        for tokens in args.tokens:
            found += training_rows(lora_fused, shape, tokens, args)
            release_memory()
        for tokens in args.decoding:
            found += decoding_rows(lora_fused, shape, tokens, args)
            release_memory()
        show(with_ratios(found))
        rows += found
    if args.out:
        found = dict(device=device, versions=versions, rank=RANK, rows=rows)
        pathlib.Path(args.out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
