"""Frozen base, PEFT and lora-fused in one process: time and peak memory, forward + backward or forward alone.

Every trainable parameter is changed in place before each step, as training does, and steps are queued
one after another without a wait between them; a step's time is between two events on the GPU. Each case is
checked against PEFT first (output and gradient norm); a case that fails has no speed to report.
Dropout masks differ between the two, so its outputs are compared without it. Cases "in a CUDA graph" replay
one captured step, so nothing waits for the host. `--peers` measures other ways to run the same adapter
(peers.py) on a few cases instead, by the same rules. A GPU is required.

    python benchmarks/compare_lora.py --kernel build --out results.json
"""

from __future__ import annotations

import contextlib
import functools
import time

import kernels
import measuring
import peers
import peft
import progress
import torch
import transformers
from lora_cases import KINDS, VARIANTS, cases, head_of, peer_cases, shape_of
from measuring import change_parameters, release_memory
from reporting import environment, first_line, parsed_on_a_gpu, parser_of, written

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Steps at most and at least, and the seconds that are enough: groups form in the second step, the first ones of a
# process are slow for longer.
WARM_UP, FEWEST, ENOUGH = 10, 3, 2.0
TOLERANCE = 2e-2  # relative difference of output and gradient norms, bfloat16
LLAMAS = {
    "llama-8b": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8),
    "llama-1b": dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8),
}


class SingleLinear(torch.nn.Module):
    def __init__(self, k: int, n: int):
        super().__init__()
        self.proj = torch.nn.Linear(k, n, bias=False)

    def forward(self, x):
        return self.proj(x)


def llama_shape(shape: str, layers: int, bias: bool) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        **LLAMAS[shape],
        attention_bias=bias,
        mlp_bias=bias,
        num_hidden_layers=layers,
        vocab_size=256,
        max_position_embeddings=8192,
        use_cache=False,
    )
    return transformers.LlamaModel(config)


def build(make, seed=0, device="cuda") -> torch.nn.Module:
    torch.manual_seed(seed)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = make()
        finally:
            torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def four_bit(model: torch.nn.Module, storage: torch.dtype = torch.uint8) -> torch.nn.Module:
    """`model` with its linears in NF4, double-quantized, kept as elements of `storage`: all but the head, which
    transformers leaves as it is."""
    import bitsandbytes as bnb

    options = dict(compress_statistics=True, quant_type="nf4", quant_storage=storage)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and name != "lm_head":
                sizes = child.in_features, child.out_features
                new = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, **options)
                new.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, module=new, **options)
                setattr(parent, name, new.to(child.weight.device))
                del child
    model.is_loaded_in_4bit = True
    return model


def adapt(model, case: dict, adapter_dtype) -> torch.nn.Module:
    rank, targets = case["rank"], ["proj"] if shape_of(case) == "linear" else LINEARS
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **VARIANTS[case["variant"]])
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False).train(not case.get("forward_only"))
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(1)
    for name, p in model.named_parameters():
        if "magnitude" in name:
            p.data = (p.data * (1 + 0.1 * torch.rand(p.shape, generator=generator, device=device))).to(adapter_dtype)
        elif "lora_" in name:
            scale = p.shape[-1] ** -0.5 * (0.1 if "lora_B" in name else 1.0)
            p.data = (scale * torch.randn(p.shape, generator=generator, device=device)).to(adapter_dtype)
    return model


def adapter_dtype_of(case: dict) -> torch.dtype:
    return torch.float32 if case["adapter"] == "fp32" else torch.bfloat16


def inputs_of(case: dict, device="cuda") -> dict:
    """x, whose gradient is wanted, and a random and fixed dy; without a dy a step is the forward alone."""
    torch.manual_seed(2)
    if shape_of(case) == "linear":
        x = torch.randn(case["m"], case["k"], device=device, dtype=torch.bfloat16, requires_grad=True)
        inputs = {"x": x, "leaf": x, "dy": torch.randn(case["m"], case["n"], device=device, dtype=torch.bfloat16)}
    else:
        hidden = LLAMAS[shape_of(case)]["hidden_size"]
        x = torch.randn(case["batch"], case["seq"], hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
        inputs = {"call": {"inputs_embeds": x}, "leaf": x, "dy": torch.randn_like(x)}
    if case.get("forward_only"):
        del inputs["dy"]
    return inputs


def step(model, inputs, autocast: bool, cache: bool = True):
    """Forward of the hidden states, and backward where there is a dy. `cache`: of autocast's weights."""
    device = inputs["leaf"].device.type
    scope = torch.autocast(device, dtype=torch.bfloat16, cache_enabled=cache) if autocast else contextlib.nullcontext()
    with scope, torch.set_grad_enabled("dy" in inputs):
        y = model(**inputs["call"]) if "call" in inputs else model(inputs["x"])
        y = getattr(y, "last_hidden_state", y)
    if "dy" in inputs:
        y.backward(inputs["dy"])
    return y


def norms(model, inputs, autocast):
    """The output, and the norm of all parameters' gradients together."""
    for p in model.parameters():
        p.grad = None
    y = step(model, inputs, autocast)
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    grad = torch.stack(squares).sum().sqrt().item() if squares else 0.0
    for p in model.parameters():
        p.grad = None
    return y.detach(), grad


def unmasked(model, inputs, case: dict):
    """`norms`, the output without dropout, whose masks differ between implementations."""
    y, grad = norms(model, inputs, case["autocast"])
    if "dropout" in case["variant"]:
        y, _ = norms(model.eval(), inputs, case["autocast"])
        model.train()
    return y, grad


def measure(model, inputs, case):
    def change():
        change_parameters(model)
        inputs["leaf"].grad = None

    def run(cache: bool = True):
        return step(model, inputs, case["autocast"], cache)

    if case.get("graph"):
        run = measuring.captured(functools.partial(run, cache=False), change)
    start = time.perf_counter()
    for i in range(WARM_UP):
        change_parameters(model)
        run()
        torch.cuda.synchronize()
        if i + 1 >= FEWEST and time.perf_counter() - start > ENOUGH:
            break
    change()
    return measuring.measured(run, change, case["repeats"])


def bytes_of(model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def measure_in_turns(base, model, lora_fused, inputs, case, rounds: int = 5) -> dict:
    """Frozen, ours and PEFT; each peak without the other model."""

    def way(measured, other, scope=contextlib.nullcontext):
        def run() -> dict:
            with scope():
                found = measure(measured, inputs, case)
            return {**found, "peak_gb": found["peak_gb"] - bytes_of(other) / 1e9}

        return run

    ways = {
        "frozen": way(base, model),
        "ours": way(model, base, lambda: fused(model, lora_fused)),
        "peft": way(model, base),
    }
    return measuring.in_turns(ways, rounds)


def fuse(model, lora_fused) -> None:
    with lora_fused.use_peft_layers():
        kernels.kernelize(model, mode=kernels.Mode.TRAINING)
    rows = lora_fused.explain(model)
    assert all(row.fused for row in rows), str(rows)


@contextlib.contextmanager
def fused(model, lora_fused):
    """`model` runs fused inside, with PEFT's own forwards after it."""
    fuse(model, lora_fused)
    try:
        yield
    finally:
        for module in model.modules():
            module.__dict__.pop("forward", None)


def agreement(theirs: tuple, ours: tuple) -> dict:
    """PEFT's (output, gradient norm) and another's: how far they are apart, and "failed" where that is too far. A
    forward alone has no gradients to compare."""
    (their_y, their_grad), (our_y, our_grad) = theirs, ours
    difference = ((our_y - their_y).double().norm() / their_y.double().norm()).item()
    result = {"output_difference": difference, "grad_norm": our_grad}
    # Written so that NaN fails.
    if not (difference <= TOLERANCE and abs(our_grad - their_grad) <= TOLERANCE * their_grad):
        result["failed"] = "not PEFT's result: no speed reported"
    return result


def compare(case: dict, lora_fused, inputs) -> dict:
    """Our output and gradient norm beside PEFT's, for a model of two layers: rounding differences
    of two correct bfloat16 runs grow from layer to layer, mistakes show at once."""
    device = inputs["leaf"].device
    model = adapt(build(lambda: make_model({**case, "layers": 2}), device=device), case, adapter_dtype_of(case))
    theirs = unmasked(model, inputs, case)
    with fused(model, lora_fused):
        result = agreement(theirs, unmasked(model, inputs, case))
    return {**result, "grad_norm": {"peft": theirs[1], "ours": result["grad_norm"]}}


def make_model(case: dict) -> torch.nn.Module:
    if shape_of(case) == "linear":
        return SingleLinear(case["k"], case["n"])
    return llama_shape(shape_of(case), case["layers"], "bias" in VARIANTS[case["variant"]])


def run_case(case: dict, lora_fused, device="cuda") -> dict:
    inputs = inputs_of(case, device)
    result = {**case, **compare(case, lora_fused, inputs)}
    release_memory()
    if "failed" in result:
        return result
    base = build(lambda: make_model(case), device=device)
    if shape_of(case) == "linear":
        model = adapt(build(lambda: make_model(case), device=device), case, adapter_dtype_of(case))
        return {**result, **measure_in_turns(base, model, lora_fused, inputs, case)}
    if case.get("checkpointing"):
        base.train().gradient_checkpointing_enable({"use_reentrant": False})
    result["frozen"] = measure(base, inputs, case)
    model = adapt(base, case, adapter_dtype_of(case))
    with fused(model, lora_fused):
        result["ours"] = measure(model, inputs, case)
    try:
        result["peft"] = measure(model, inputs, case)
    except torch.cuda.OutOfMemoryError:
        result["peft"] = None
    return result


def against_peft(case: dict, ways: dict, inputs) -> dict:
    """Each way's output and gradient norm beside PEFT's for two layers, as `compare` has it; "failed" says why a way
    did not run. A way is a context manager that takes PEFT's model."""
    device = inputs["leaf"].device
    model = adapt(build(lambda: make_model({**case, "layers": 2}), device=device), case, adapter_dtype_of(case))
    theirs = norms(model, inputs, case["autocast"])
    result = {}
    for name, way in ways.items():
        try:
            with way(model):
                result[name] = agreement(theirs, norms(model, inputs, case["autocast"]))
        except Exception as error:  # whatever stops another project's code is that row's result
            result[name] = {"failed": first_line(error)}
    return result


def run_peers(case: dict, lora_fused, device="cuda") -> dict:
    """A case's time in every way that gives PEFT's result, all of them on the same model and inputs."""
    own = {"PEFT": lambda model: contextlib.nullcontext(), "lora-fused": lambda model: fused(model, lora_fused)}
    ways = {**own, **peers.of(case)}
    inputs = inputs_of(case, device)
    result = {**case, "peers": against_peft(case, ways, inputs)}
    release_memory()
    base = build(lambda: make_model(case), device=device)
    result["frozen"] = measure(base, inputs, case)
    model = adapt(base, case, adapter_dtype_of(case))
    for name, row in result["peers"].items():
        if "failed" in row:
            continue
        try:
            with ways[name](model) as notes:
                row.update(measure(model, inputs, case))
            row.update(notes or {})
        except Exception as error:
            row["failed"] = first_line(error)
        release_memory()
    return result


def times_of(measured: dict | None, frozen: dict) -> str:
    if measured is None:
        return "out of memory"
    memory = f"{measured['peak_gb']:6.2f} GB ({measured['transient_gb']:.3f} a step)"
    return f"{measured['ms'] / frozen['ms']:5.2f}x {memory}"


def describe(result: dict) -> str:
    if "failed" in result:
        return f"{head_of(result)} {result['failed']}"
    frozen, grad = result["frozen"], result["grad_norm"]
    return (
        f"{head_of(result)} frozen {frozen['ms']:8.3f} ms {frozen['peak_gb']:6.2f} GB | "
        f"ours {times_of(result['ours'], frozen)} | PEFT {times_of(result['peft'], frozen)} | "
        f"|grad| {grad['ours']:.5g} / {grad['peft']:.5g}"
    )


def describe_peers(result: dict) -> str:
    frozen = result["frozen"]
    lines = [f"{head_of(result)} frozen {frozen['ms']:8.3f} ms {frozen['peak_gb']:6.2f} GB"]
    for name, row in result["peers"].items():
        grad = f" |grad| {row['grad_norm']:.5g}" if "grad_norm" in row else ""
        graphs = f", {row['graphs']} graphs, {row['graph_breaks']} breaks" if "graphs" in row else ""
        lines.append(f"  {name:20} {row.get('failed') or times_of(row, frozen)}{grad}{graphs}")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__, "benchmark_lora.json")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS, help="only these cases")
    parser.add_argument("--match", nargs="+", metavar="WORD", help="only cases whose first words hold one of these")
    parser.add_argument("--peers", action="store_true", help="other ways to run the adapter, on a few cases")
    arguments = parsed_on_a_gpu(parser)
    lora_fused = kernels.get_local_kernel(arguments.kernel)
    results = []
    make, run, show = (peer_cases, run_peers, describe_peers) if arguments.peers else (cases, run_case, describe)
    words, chosen = arguments.match or [""], make(arguments.repeats, arguments.layers)
    chosen = [case for case in chosen if any(word in head_of(case) for word in words)]
    for case in progress.numbered([case for case in chosen if case["kind"] in arguments.kind]):
        results.append(run(case, lora_fused))
        print(show(results[-1]), flush=True)
        release_memory()
        arguments.out.write_text(written(environment(), results))


if __name__ == "__main__":
    main()
