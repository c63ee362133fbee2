"""QLoRA and QDoRA: the frozen bitsandbytes stack, PEFT and lora-fused in one process.

Three parts: the dequantization alone, against bitsandbytes' and the GPU's own bandwidth; single linears of
few rows, PEFT's own forward against the fused path; an 8B-shaped model in NF4 with double quantization, forward
+ backward, every trainable parameter changed in place before each step, step by step and in a CUDA graph. What
does not give bitsandbytes' bits or PEFT's results has no speed to report; what cannot be captured says why. A
GPU is required.

    python benchmarks/compare_qlora.py --kernel build --out results.json
"""

from __future__ import annotations

import json
import sys
import time

import bitsandbytes as bnb
import compare_lora as common
import kernels
import torch
from measuring import release_memory
from reporting import ROOT, environment, first_line, parsed_on_a_gpu, parser_of

sys.path.insert(0, str(ROOT / "scripts"))

from kernel_checks import CACHE, microseconds as graph_us

SHAPES = ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672))


def wall_us(function, calls=30) -> float:
    """Time of a call in a row of them, host and GPU as they overlap."""
    for _ in range(5):
        function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls * 1e6


def quantize(weight):
    return bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)


def bandwidth() -> float:
    """Bytes per second, read and written, of a copy by a kernel."""
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_us(lambda x: torch.neg(x, out=target), [source]) * 1e6


def dequantization(lora_fused, shape, dtype, copy_rate) -> dict:
    n, k = shape
    count = min(8, 1 + CACHE // (n * k))
    stored = [quantize(torch.randn(shape, device="cuda", dtype=dtype) * k**-0.5) for _ in range(count)]
    outs = [torch.empty(shape, device="cuda", dtype=dtype) for _ in range(count)]
    inputs = []
    for (packed, state), out in zip(stored, outs):
        inner = state.state2
        operands = lora_fused.Operands(
            packed, absmax=state.absmax, nested_absmax=inner.absmax, nested_code=inner.code, offset=state.offset
        )
        inputs.append((operands, packed, state, out))
    spec = lora_fused.specs.FourBit(shape, 64, 256, False, dtype)
    ours = lora_fused.backends.select.dequantize_4bit(inputs[0][0], spec, 0, outs[0])
    result = {"kind": "dequantize", "n": n, "k": k, "dtype": str(dtype)[6:]}
    if not torch.equal(ours, bnb.functional.dequantize_4bit(*stored[0])):
        return {**result, "failed": "not bitsandbytes' values: no speed reported"}
    result["ours_us"] = graph_us(lambda x: lora_fused.backends.select.dequantize_4bit(x[0], spec, 0, x[3]), inputs)
    result["bitsandbytes_us"] = graph_us(lambda x: bnb.functional.dequantize_4bit(x[1], x[2], out=x[3]), inputs)
    result["triton_us"] = graph_us(
        lambda x: lora_fused.backends.select.get("triton").dequantize_4bit(x[0], spec, 0, x[3]), inputs
    )
    written = n * k * outs[0].element_size()
    result["bytes"] = n * k // 2 + written + n * k // 64
    result["of_copy_bandwidth"] = result["bytes"] / result["ours_us"] * 1e6 / copy_rate
    return result


def few_rows(lora_fused, k, n, rows, backward) -> dict:
    """One linear: PEFT, PEFT's own forward as we come to run it, the fused path, wall time of a call."""
    case = dict(kind="linear", variant="LoRA", rank=32)
    model = common.adapt(common.four_bit(common.build(lambda: common.SingleLinear(k, n))), case, torch.bfloat16)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16, requires_grad=backward)
    dy = torch.randn(rows, n, device="cuda", dtype=torch.bfloat16)

    def run():
        if backward:
            model(x).backward(dy)
        else:
            with torch.no_grad():
                model(x)

    result = {"kind": "few rows", "k": k, "n": n, "rows": rows, "backward": backward, "peft_us": wall_us(run)}
    fuse(model, lora_fused)
    model.train(backward)
    own = lora_fused.peft.linear.FEW_ROWS
    for name, limit in (("own_us", 2**30), ("fused_us", -1)):
        lora_fused.peft.linear.FEW_ROWS = limit
        result[name] = wall_us(run)
    lora_fused.peft.linear.FEW_ROWS = own
    return result


def fuse(model, lora_fused) -> None:
    with lora_fused.use_peft_layers():
        kernels.kernelize(model, mode=kernels.Mode.TRAINING)
    rows = lora_fused.explain(model)
    assert all(row.fused and row.backend != "fused delta" for row in rows), str(rows)


def quantized_model(layers: int) -> torch.nn.Module:
    return common.four_bit(common.build(lambda: common.llama_shape("llama-8b", layers, False)))


def measure(model, inputs, case: dict) -> dict:
    """As compare_lora's; in a CUDA graph an error is a result, since not every step can be captured."""
    if not case["graph"]:
        return common.measure(model, inputs, case)
    try:
        return common.measure(model, inputs, case)
    except RuntimeError as error:
        return {"failed": first_line(error)}


def model_case(case: dict, lora_fused) -> dict:
    dtype, inputs = common.adapter_dtype_of(case), common.inputs_of(case)
    two = common.adapt(quantized_model(2), case, dtype)
    theirs = common.norms(two, inputs, case["autocast"])
    fuse(two, lora_fused)
    result = {**case, **common.agreement(theirs, common.norms(two, inputs, case["autocast"]))}
    result["grad_norm"] = {"peft": theirs[1], "ours": result["grad_norm"]}
    del two, theirs
    release_memory()
    if "failed" in result:
        return result
    base = quantized_model(case["layers"])
    release_memory()
    result["frozen"] = measure(base, inputs, case)
    model = common.adapt(base, case, dtype)
    fuse(model, lora_fused)
    result["ours"] = measure(model, inputs, case)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    result["peft"] = measure(model, inputs, case)
    return result


def model_cases(layers: int, repeats: int) -> list[dict]:
    """Graphs last: an error in a capture is then behind everything else."""
    runs = (("LoRA", "fp32", True), ("DoRA", "fp32", True), ("LoRA", "bf16", False))
    fixed = dict(kind="llama-8b", layers=layers, batch=1, seq=2048, rank=32, repeats=repeats)
    return [
        dict(fixed, variant=variant, adapter=adapter, autocast=autocast, graph=graph)
        for graph in (False, True)
        for variant, adapter, autocast in runs
    ]


def time_of(measured: dict, frozen: dict, graph: bool) -> str:
    """A graph's replay has its memory elsewhere than where the peak is read."""
    if "failed" in measured:
        return f"not captured ({measured['failed']})"
    ratio = f" ({measured['ms'] / frozen['ms']:.2f}x)" if "ms" in frozen else ""
    return f"{measured['ms']:.1f} ms{ratio}" + ("" if graph else f" {measured['peak_gb']:.2f} GB")


def describe(r: dict) -> str:
    if r["kind"] == "dequantize":
        head = f"dequantize {r['n']}x{r['k']} {r['dtype']}"
        return f"{head:36} " + (
            r.get("failed")
            or f"ours {r['ours_us']:7.1f} us ({r['of_copy_bandwidth']:.2f} of a copy's rate), "
            f"Triton {r['triton_us']:7.1f}, "
            f"bitsandbytes {r['bitsandbytes_us']:7.1f} ({r['bitsandbytes_us'] / r['ours_us']:.2f}x)"
        )
    if r["kind"] == "few rows":
        head = f"{r['k']}->{r['n']}, {r['rows']} rows{', backward' if r['backward'] else ''}"
        return f"{head:36} own {r['own_us']:7.1f} us, fused {r['fused_us']:7.1f} us, PEFT {r['peft_us']:7.1f} us"
    head = f"{r['layers']} layers {r['variant']} {r['adapter']}{' autocast' if r['autocast'] else ''}"
    head += ", CUDA graph" if r["graph"] else ""
    if "failed" in r:
        return f"{head:36} {r['failed']} {r['output_difference']:.3g} {r['grad_norm']}"
    parts = (f"{name} {time_of(r[name], r['frozen'], r['graph'])}" for name in ("frozen", "ours", "peft"))
    return f"{head:36} {', '.join(parts)}"


def main() -> None:
    parser = parser_of(__doc__, "benchmark_qlora.json")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kind", choices=("dequantize", "few rows", "llama-8b"), help="only these cases")
    parser.add_argument("--variant", choices=("LoRA", "DoRA"), help="only the model's cases of this variant")
    parser.add_argument("--graph", action="store_true", help="only the model's cases in a CUDA graph")
    arguments = parsed_on_a_gpu(parser)
    lora_fused = kernels.get_local_kernel(arguments.kernel)
    rate = bandwidth()
    made_with = {**environment(), "bitsandbytes": bnb.__version__, "copy_tb_per_s": rate / 1e12}
    results = []

    def run(kind, make):
        if arguments.kind not in (None, kind):
            return
        results.append(make())
        print(describe(results[-1]), flush=True)
        release_memory()
        arguments.out.write_text(json.dumps({"environment": made_with, "results": results}, indent=1))

    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            run("dequantize", lambda: dequantization(lora_fused, shape, dtype, rate))
    for k, n in ((4096, 4096), (4096, 14336)):
        for rows in (1, 4, 8, 16, 32, 64):
            run("few rows", lambda: few_rows(lora_fused, k, n, rows, backward=False))
        for rows in (4, 16):
            run("few rows", lambda: few_rows(lora_fused, k, n, rows, backward=True))
    for case in model_cases(arguments.layers, arguments.repeats):
        if arguments.variant in (None, case["variant"]) and (case["graph"] or not arguments.graph):
            run("llama-8b", lambda: model_case(case, lora_fused))


if __name__ == "__main__":
    main()
