"""Frozen base, PEFT and lora-fused in one process: time and peak memory, forward + backward.

Every trainable parameter is changed in place before each step, as training does, and steps are queued
one after another without a wait between them; a step's time is between two events on the GPU. Each case is
checked against PEFT first (output and gradient norm); a case that fails has no speed to report.
Dropout masks differ between the two, so its outputs are compared without it. Cases "in a CUDA graph" replay
one captured step, so nothing waits for the host. A GPU is required.

    python benchmarks/compare_lora.py --kernel build --out results.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import pathlib
import statistics

import kernels
import peft
import torch
import transformers
import triton

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 2e-2  # relative difference of output and gradient norms, bfloat16


class SingleLinear(torch.nn.Module):
    def __init__(self, k: int, n: int):
        super().__init__()
        self.proj = torch.nn.Linear(k, n, bias=False)

    def forward(self, x):
        return self.proj(x)


def llama_8b_shape(layers: int, bias: bool) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        attention_bias=bias,
        mlp_bias=bias,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=256,
        max_position_embeddings=8192,
        use_cache=False,
    )
    return transformers.LlamaModel(config)


def build(make, seed=0) -> torch.nn.Module:
    torch.manual_seed(seed)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = make()
        finally:
            torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


VARIANTS = {
    "LoRA": {},
    "LoRA, dropout 0.1": dict(lora_dropout=0.1),
    "LoRA, bias all": dict(bias="all"),
    "DoRA": dict(use_dora=True),
    "DoRA, dropout 0.1": dict(use_dora=True, lora_dropout=0.1),
}


def adapt(model, case: dict, adapter_dtype) -> torch.nn.Module:
    rank, targets = case["rank"], ["proj"] if case["kind"] == "linear" else LINEARS
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **VARIANTS[case["variant"]])
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).train()
    generator = torch.Generator("cuda").manual_seed(1)
    for name, p in model.named_parameters():
        if "magnitude" in name:
            p.data = (p.data * (1 + 0.1 * torch.rand(p.shape, generator=generator, device="cuda"))).to(adapter_dtype)
        elif "lora_" in name:
            scale = p.shape[-1] ** -0.5 * (0.1 if "lora_B" in name else 1.0)
            p.data = (scale * torch.randn(p.shape, generator=generator, device="cuda")).to(adapter_dtype)
    return model


def step(model, inputs, autocast: bool, cache: bool = True):
    """Forward and backward of the hidden states; dy is random and fixed. `cache`: of autocast's weights."""
    scope = torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=cache) if autocast else contextlib.nullcontext()
    with scope:
        y = model(**inputs["call"]) if "call" in inputs else model(inputs["x"])
        y = getattr(y, "last_hidden_state", y)
    y.backward(inputs["dy"])
    return y


def change_parameters(model):
    with torch.no_grad():
        parameters = [p for p in model.parameters() if p.requires_grad]
        if parameters:
            torch._foreach_mul_(parameters, 1.0 + 1e-6)
            for p in parameters:
                p.grad = None


def norms(model, inputs, autocast):
    y = step(model, inputs, autocast)
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    grad = torch.stack(squares).sum().sqrt().item() if squares else 0.0
    for p in model.parameters():
        p.grad = None
    return y.detach(), grad


def captured(model, inputs, autocast):
    """The replay of a step; parameters and x are read anew at every replay."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(model, inputs, autocast, cache=False)
    torch.cuda.current_stream().wait_stream(aside)
    change_parameters(model)
    inputs["leaf"].grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, inputs, autocast, cache=False)
    return graph.replay


def measure(model, inputs, case):
    autocast, repeats = case["autocast"], case["repeats"]
    run = captured(model, inputs, autocast) if case.get("graph") else lambda: step(model, inputs, autocast)
    for _ in range(3):
        change_parameters(model)
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    pairs = []
    for _ in range(repeats):
        change_parameters(model)
        inputs["leaf"].grad = None
        pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        pairs[-1][0].record()
        run()
        pairs[-1][1].record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in pairs]
    return {"ms": statistics.median(times), "min_ms": min(times), "peak_gb": torch.cuda.max_memory_allocated() / 1e9}


def fuse(model, lora_fused) -> None:
    with lora_fused.use_peft_layers():
        kernels.kernelize(model, mode=kernels.Mode.TRAINING)
    rows = lora_fused.explain(model)
    assert all(row.fused for row in rows), str(rows)


def compare(case: dict, lora_fused, inputs, dtype) -> dict:
    """Our output and gradient norm beside PEFT's, for a model of two layers: rounding differences
    of two correct bfloat16 runs grow from layer to layer, mistakes show at once."""
    model = adapt(build(lambda: make_model({**case, "layers": 2})), case, dtype)
    theirs, their_grad = norms(model, inputs, case["autocast"])
    if "dropout" in case["variant"]:
        theirs, _ = norms(model.eval(), inputs, case["autocast"])
    fuse(model.train(), lora_fused)
    ours, our_grad = norms(model, inputs, case["autocast"])
    if "dropout" in case["variant"]:
        ours, _ = norms(model.eval(), inputs, case["autocast"])
    difference = ((ours - theirs).double().norm() / theirs.double().norm()).item()
    result = {"output_difference": difference, "grad_norm": {"peft": their_grad, "ours": our_grad}}
    if difference > TOLERANCE or abs(our_grad / their_grad - 1) > TOLERANCE:
        result["failed"] = "not the same result as PEFT: no speed reported"
    return result


def make_model(case: dict) -> torch.nn.Module:
    if case["kind"] == "linear":
        return SingleLinear(case["k"], case["n"])
    return llama_8b_shape(case["layers"], "bias" in VARIANTS[case["variant"]])


def release_memory() -> None:
    """What the last models held, cycles included, so that the next peak is the next model's own."""
    gc.collect()
    torch.cuda.empty_cache()


def run_case(case: dict, lora_fused) -> dict:
    dtype = torch.float32 if case["adapter"] == "fp32" else torch.bfloat16
    torch.manual_seed(2)
    if case["kind"] == "linear":
        x = torch.randn(case["m"], case["k"], device="cuda", dtype=torch.bfloat16, requires_grad=True)
        inputs = {"x": x, "leaf": x, "dy": torch.randn(case["m"], case["n"], device="cuda", dtype=torch.bfloat16)}
    else:
        x = torch.randn(case["batch"], case["seq"], 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        inputs = {"call": {"inputs_embeds": x}, "leaf": x, "dy": torch.randn_like(x)}
    result = {**case, **compare(case, lora_fused, inputs, dtype)}
    release_memory()
    if "failed" in result:
        return result
    base = build(lambda: make_model(case))
    if case.get("checkpointing"):
        base.train().gradient_checkpointing_enable({"use_reentrant": False})
    result["frozen"] = measure(base, inputs, case)
    model = adapt(base, case, dtype)
    fuse(model, lora_fused)
    result["ours"] = measure(model, inputs, case)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    try:
        result["peft"] = measure(model, inputs, case)
    except torch.cuda.OutOfMemoryError:
        result["peft"] = None
    return result


def cases(repeats: int, layers: int) -> list[dict]:
    single = [
        dict(kind="linear", variant="LoRA", m=m, k=k, n=n, rank=32, adapter=adapter, autocast=autocast, repeats=3 * repeats)
        for m in (64, 2048, 8192)
        for k, n in ((4096, 4096), (4096, 14336), (14336, 4096))
        for adapter, autocast in (("fp32", True), ("bf16", False))
    ]
    short = [(variant, "fp32", variant != "LoRA, bias all") for variant in VARIANTS] + [("LoRA", "bf16", False)]
    runs = [(1, *run, False, graph) for graph in (False, True) for run in short]
    runs.append((1, "LoRA", "fp32", False, False, False))
    runs += [(4, variant, "fp32", True, cp, False) for cp in (False, True) for variant in ("LoRA", "DoRA")]
    model = [
        dict(
            kind="llama-8b",
            variant=variant,
            layers=layers,
            batch=batch,
            seq=2048,
            rank=32,
            adapter="bf16" if variant == "LoRA, bias all" else adapter,
            autocast=autocast,
            checkpointing=checkpointing,
            graph=graph,
            repeats=repeats,
        )
        for batch, variant, adapter, autocast, checkpointing, graph in runs
    ]
    return single + model


def describe(result: dict) -> str:
    shape = (
        f"linear {result['k']}->{result['n']}, M={result['m']}"
        if result["kind"] == "linear"
        else f"{result['layers']} Llama-8B layers, {result['batch']}x{result['seq']}"
    )
    shape += ", checkpointing" if result.get("checkpointing") else ", CUDA graph" if result.get("graph") else ""
    head = f"{shape:50} {result['variant']:18} {result['adapter']}{' autocast' if result['autocast'] else '':9}"
    if "failed" in result:
        return f"{head} {result['failed']}"
    frozen, ours, theirs = result["frozen"], result["ours"], result["peft"]
    peft_part = f"PEFT {theirs['ms'] / frozen['ms']:5.2f}x {theirs['peak_gb']:6.2f} GB" if theirs else "PEFT out of memory"
    return (
        f"{head} frozen {frozen['ms']:8.3f} ms {frozen['peak_gb']:6.2f} GB | ours {ours['ms'] / frozen['ms']:5.2f}x "
        f"{ours['peak_gb']:6.2f} GB | {peft_part} | |grad| {result['grad_norm']['ours']:.5g} / {result['grad_norm']['peft']:.5g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", type=pathlib.Path, default=ROOT / "build", help="build folder to load")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmark_lora.json"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kind", choices=("linear", "llama-8b"), help="only these cases")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is required")
    lora_fused = kernels.get_local_kernel(arguments.kernel)
    environment = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
    }
    results = []
    for case in cases(arguments.repeats, arguments.layers):
        if arguments.kind not in (None, case["kind"]):
            continue
        results.append(run_case(case, lora_fused))
        print(describe(results[-1]), flush=True)
        release_memory()
        arguments.out.write_text(json.dumps({"environment": environment, "results": results}, indent=1))


if __name__ == "__main__":
    main()
