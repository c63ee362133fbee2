"""Embeddings: frozen table, PEFT and lora-fused in one process, LoRA and DoRA, forward + backward.

Every trainable parameter is changed in place before each step, as training does, and steps are queued one
after another without a wait between them; a step's time is between two events on the GPU. Each case is checked first,
output and every gradient, against PEFT's; a case that fails has no speed to report. Beside the times stand those of the
same step in a CUDA graph, which the host takes no part in, and the floor of DoRA's norm: one read of the table,
measured in the same run. A GPU is required.

    python benchmarks/compare_embedding.py --out results.json
"""

from __future__ import annotations

import functools
import json

import kernels
import measuring
import peft
import torch
from reporting import environment, parsed_on_a_gpu, parser_of

VOCABULARY, RANK, SCALING = 151936, 32, 2.0
WARM_UP = 30  # steps: the first ones of a model are slow for longer than three
TOLERANCE = 1.5e-2  # ‖ours - PEFT's‖ / ‖PEFT's‖ of the output and of each gradient, bfloat16


class Model(torch.nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, hidden, device="cuda", dtype=torch.bfloat16)
        self.table.weight.data.normal_(std=0.5)

    def forward(self, ids):
        return self.table(ids)


def adapt(model: Model, adapter_dtype, dora: bool):
    config = peft.LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=["table"], use_dora=dora)
    model = peft.get_peft_model(model.requires_grad_(False), config, autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "magnitude" in name:
            p.data = (p.data.float() * (0.5 + torch.rand(p.shape, device="cuda"))).to(adapter_dtype)
        elif p.requires_grad:
            p.data = (torch.randn(p.shape, device="cuda") * RANK**-0.5).to(adapter_dtype)
    return model


def timed(step, before, repeats: int, calls: int = 1) -> dict:
    """Milliseconds of `step`, called `calls` times in a row, `before` outside of the clock, and the peak of memory."""
    for _ in range(WARM_UP):
        before()
        step()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()  # one for each stream that a graph had
    found = measuring.measured(step, before, repeats, calls)
    return {name: found[name] for name in ("ms", "min_ms", "peak_gb")}


def measure(model, ids, dy, repeats: int) -> dict:
    layer, change = layer_of(model), functools.partial(measuring.change_parameters, model)
    step = lambda: layer(ids).backward(dy)  # noqa: E731
    measured = timed(step, change, repeats)
    replay = measuring.captured(step, change)
    return {**measured, "graph_ms": timed(replay, change, repeats)["ms"]}


def layer_of(model) -> torch.nn.Module:
    """The embedding itself: what the model around it costs is the same for all."""
    return model.base_model.model.table


def results_of(model, ids, dy) -> dict:
    for p in model.parameters():
        p.grad = None
    y = model(ids)
    y.backward(dy)
    return {"y": y.detach(), **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def differences(ours: dict, theirs: dict) -> dict:
    def distance(name):
        truth = theirs[name].double()
        return ((ours[name].double() - truth).norm() / truth.norm()).item()

    return {name: distance(name) for name in theirs}


def norm_and_floor(table, lora_fused, hidden: int, adapter_dtype) -> dict:
    """The norm alone, and beside it the time that one read of the table takes."""
    a = torch.randn(RANK, VOCABULARY, device="cuda").to(adapter_dtype)
    b = torch.randn(hidden, RANK, device="cuda").to(adapter_dtype)
    flat = table.view(torch.int32).view(-1)
    copy_from, copy_to = flat[: flat.numel() // 2], torch.empty_like(flat[: flat.numel() // 2])
    operands = lora_fused.specs.EmbeddingOperands(table, a, b)

    steps = {
        "norm_ms": lambda: lora_fused.backends.select.column_norm("native", operands, SCALING),
        "triton_norm_ms": lambda: lora_fused.backends.select.get("triton").column_norm(table, a, b, SCALING),
        # A copy of half the table moves as many bytes as one read of all of it.
        "floor_ms": lambda: copy_to.copy_(copy_from),
        "sum_ms": lambda: flat.view(torch.float32).sum(),  # a library's read
    }
    # Ten calls in a row: no host time.
    ways = {name: functools.partial(timed, step, lambda: None, 3, calls=10) for name, step in steps.items()}
    return {name: found["ms"] for name, found in measuring.in_turns(ways, rounds=3).items()}


def run_case(model, ids, dy, lora_fused, repeats: int) -> dict:
    theirs = results_of(model, ids, dy)
    with lora_fused.use_peft_layers():
        kernels.kernelize(model, mode=kernels.Mode.TRAINING)
    explained = lora_fused.explain(model, ids.numel())
    assert all(row.fused for row in explained), str(explained)
    result = {"backend": explained[0].backend, "difference": differences(results_of(model, ids, dy), theirs)}
    del theirs
    if not max(result["difference"].values()) <= TOLERANCE:
        return {**result, "failed": "not the same result as PEFT: no speed reported"}
    result["ours"] = measure(model, ids, dy, repeats)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    result["peft"] = measure(model, ids, dy, repeats)
    return result


def describe(case: dict) -> str:
    head = f"H={case['hidden']:5} tokens {case['tokens']:6} {'DoRA' if case['dora'] else 'LoRA'} {case['adapter']}"
    if "failed" in case:
        return f"{head} {case['failed']}: {case['difference']}"
    ours, theirs = case["ours"], case["peft"]
    return (
        f"{head} frozen {case['frozen_ms']:6.3f} | ours {ours['ms']:7.3f} ms {ours['peak_gb']:5.2f} GB | "
        f"PEFT {theirs['ms']:7.3f} ms {theirs['peak_gb']:5.2f} GB | {theirs['ms'] / ours['ms']:5.2f}x | "
        f"in a graph {ours['graph_ms']:.3f}, {theirs['graph_ms']:.3f} ms, {theirs['graph_ms'] / ours['graph_ms']:.2f}x"
    )


def main() -> None:
    parser = parser_of(__doc__, "benchmark_embedding.json")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 64, 65536])
    arguments = parsed_on_a_gpu(parser)
    lora_fused = kernels.get_local_kernel(arguments.kernel)
    torch.manual_seed(0)
    results, floors = [], []
    for hidden in (2560, 4096):
        base = Model(hidden)
        for adapter in ("fp32", "bf16"):
            dtype = torch.float32 if adapter == "fp32" else torch.bfloat16
            floor = norm_and_floor(base.table.weight.data, lora_fused, hidden, dtype)
            floors.append({"hidden": hidden, "adapter": adapter, **floor})
            print(
                f"H={hidden} {adapter}: norm {floor['norm_ms']:.3f} ms, Triton's {floor['triton_norm_ms']:.3f}, "
                f"one read {floor['floor_ms']:.3f} ms, torch's sum {floor['sum_ms']:.3f}",
                flush=True,
            )
            for dora in (False, True):
                for tokens in arguments.tokens:
                    ids = torch.randint(0, VOCABULARY, (1, tokens), device="cuda")
                    dy = torch.randn(1, tokens, hidden, device="cuda", dtype=torch.bfloat16)
                    frozen = timed(functools.partial(base.table, ids), lambda: None, arguments.repeats)["ms"]
                    model = adapt(base, dtype, dora)
                    case = {"hidden": hidden, "tokens": tokens, "dora": dora, "adapter": adapter, "frozen_ms": frozen}
                    results.append({**case, **run_case(model, ids, dy, lora_fused, arguments.repeats)})
                    print(describe(results[-1]), flush=True)
                    base = model.unload()
                    del model, ids, dy
                    torch.cuda.empty_cache()
                    written = {"environment": environment(), "norm": floors, "results": results}
                    arguments.out.write_text(json.dumps(written, indent=1))
    if any("failed" in case for case in results):
        raise SystemExit("parity failed")


if __name__ == "__main__":
    main()
