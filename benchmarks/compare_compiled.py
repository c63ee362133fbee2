"""torch.compile by decoder layer: the frozen model, PEFT and lora-fused compiled in one process, beside both eager.

Forward and backward by the rules of compare_lora.py: every trainable parameter changes before each step, medians of
queued steps, results checked against PEFT's first on two layers. The compiled models take turns, in changing order; the
eager ones come before. Ratios are to the compiled frozen model. "options": layers are compiled with
`lora_fused.compile_options()`. Each row says how many graphs its steps have, and how often they broke off. A GPU is
required; `--match` chooses cases.

    python benchmarks/compare_compiled.py --kernel build --out results.json
"""

from __future__ import annotations

import contextlib
import time

import compare_lora
import kernels
import measuring
import peers
import profile_step
import progress
import torch
from measuring import release_memory
from reporting import environment, parsed_on_a_gpu, parser_of, written


def make_base(case: dict, layers: int) -> torch.nn.Module:
    def make():
        return compare_lora.llama_shape("llama-8b", layers, False)

    base = compare_lora.build(make)
    return compare_lora.four_bit(base) if case["base"] == "nf4" else base


def check(case: dict, lora_fused, inputs) -> dict:
    """Output and gradient norm of two compiled layers beside PEFT's eager ones; without dropout's masks."""
    model = compare_lora.adapt(make_base(case, 2), case, torch.float32)
    theirs = compare_lora.unmasked(model, inputs, case)
    with compare_lora.fused(model, lora_fused), peers.compiled(model):
        result = compare_lora.agreement(theirs, compare_lora.unmasked(model, inputs, case))
    release_memory()
    return result


class Contender:
    """A model whose layers are compiled, in turns with others: each step's figures are of it alone."""

    def __init__(self, model: torch.nn.Module, inputs, case: dict):
        self.model, self.inputs, self.case = model, inputs, case
        self.notes = dict(graphs=0, graph_breaks=0)

    def noted(self, run):
        """What `run` gives; graphs and breaks that it makes are this model's."""
        counters = torch._dynamo.utils.counters
        counters.clear()
        found = run()
        self.notes["graphs"] += counters["stats"]["unique_graphs"]
        self.notes["graph_breaks"] += sum(counters["graph_break"].values())
        return found

    def first_step(self) -> None:
        start = time.perf_counter()
        self.noted(lambda: compare_lora.step(self.model, self.inputs, self.case["autocast"]))
        torch.cuda.synchronize()
        self.notes["first_step_s"] = round(time.perf_counter() - start, 1)

    def __call__(self) -> dict:
        """`compare_lora.measure`; memory without what other models hold."""
        release_memory()
        others = torch.cuda.memory_allocated() - compare_lora.bytes_of(self.model)
        found = self.noted(lambda: compare_lora.measure(self.model, self.inputs, self.case))
        for tensor in (self.inputs["leaf"], *self.model.parameters()):
            tensor.grad = None
        return {**found, "peak_gb": found["peak_gb"] - others / 1e9}


def run_case(case: dict, lora_fused) -> dict:
    inputs = compare_lora.inputs_of(case)
    result = {**case, **check(case, lora_fused, inputs)}
    if "failed" in result:
        return result
    names = ["frozen", "ours"] + ["ours, options"] * case["options"] + ["PEFT"] * case["peft"]
    with contextlib.ExitStack() as scopes:
        contenders = {}
        for name in names:
            model = make_base(case, case["layers"])
            if name != "frozen":
                model = compare_lora.adapt(model, case, torch.float32)
            if name.startswith("ours"):
                compare_lora.fuse(model, lora_fused)
            contenders[name] = Contender(model, inputs, case)
        for name in ("frozen", "ours"):
            result[f"{name}, eager"] = contenders[name]()
        for name, contender in contenders.items():
            how = {"options": lora_fused.compile_options()} if "options" in name else {}
            scopes.enter_context(peers.compiled(contender.model, **how))
        for contender in contenders.values():
            contender.first_step()
        if case["profile"]:
            for name in ("frozen", "ours"):
                print(profile_step.gpu_table(contenders[name].model, inputs, case["autocast"], case["profile"]))
        for name, found in measuring.in_turns(contenders, ROUNDS).items():
            result[name] = {**found, **contenders[name].notes}
    return result


ROUNDS = 3
ROWS = ("frozen, eager", "frozen", "ours, eager", "ours", "ours, options", "PEFT")


def describe(result: dict) -> str:
    head = f"{result['batch']}x{result['seq']} {result['variant']} {result['base']}, {result['layers']} layers"
    if "failed" in result:
        return f"{head}: {result['failed']}"
    lines, frozen = [head], result["frozen"]
    for name in ROWS:
        row = result.get(name)
        if row is None:
            continue
        text = f"  {name:14} {row['ms']:8.2f} ms {row['ms'] / frozen['ms']:5.2f}x  {row['peak_gb']:6.2f} GB "
        text += f"{row['peak_gb'] / frozen['peak_gb']:4.2f}x, {row['transient_gb']:.2f} a step"
        if "graphs" in row:
            text += f", {row['graphs']} graphs, {row['graph_breaks']} breaks, first step {row['first_step_s']} s"
        lines.append(text)
    return "\n".join(lines)


def cases(repeats: int, layers: int) -> list[dict]:
    common = dict(kind="llama-8b", seq=2048, rank=32, adapter="fp32", autocast=True, repeats=repeats, layers=layers)
    variants = ((1, "LoRA", "bf16"), (4, "LoRA", "bf16"), (1, "DoRA", "bf16"), (1, "LoRA", "nf4"))
    variants += ((1, "LoRA, dropout 0.1", "bf16"), (4, "DoRA", "bf16"))
    return [
        dict(common, batch=batch, variant=variant, base=base, options=(batch, variant, base) == variants[0], peft=True)
        for batch, variant, base in variants
    ]


def head_of(case: dict) -> str:
    return f"{case['batch']}x{case['seq']} {case['variant']} {case['base']}"


def main() -> None:
    parser = parser_of(__doc__, "benchmark_compiled.json")
    parser.add_argument("--repeats", type=int, default=4, help=f"steps of each model in each of {ROUNDS} turns")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS", help="print the kernels of a step, so many")
    parser.add_argument("--match", nargs="+", metavar="WORD", help="only cases whose first words hold one of these")
    arguments = parsed_on_a_gpu(parser)
    lora_fused = kernels.get_local_kernel(arguments.kernel)
    results = []
    words, chosen = arguments.match or [""], cases(arguments.repeats, arguments.layers)
    for case in progress.numbered([case for case in chosen if any(word in head_of(case) for word in words)]):
        results.append(run_case({**case, "profile": arguments.profile}, lora_fused))
        print(describe(results[-1]), flush=True)
        release_memory()
        arguments.out.write_text(written(environment(), results))


if __name__ == "__main__":
    main()
