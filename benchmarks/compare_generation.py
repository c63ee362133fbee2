"""Greedy generation with a static cache, whose decoding transformers compiles: the frozen model, PEFT and lora-fused.

A Llama of 8B's width, bfloat16, LoRA on all linears, not merged. ms a token are those of the tokens after the first,
from two lengths, so that the prompt's own time is not in them; "eager" decodes without compiling. Ratios are to the
frozen model of the same row. Tokens that are not PEFT's are counted: with random weights logits lie close together. A
GPU is required.

    python benchmarks/compare_generation.py --out results.json
"""

from __future__ import annotations

import statistics
import time

import compare_lora as common
import kernels
import peft
import progress
import torch
import transformers
from measuring import release_memory
from reporting import environment, parsed_on_a_gpu, parser_of, written

PROMPT, FEW, MANY, REPEATS = 128, 8, 72, 5
SHAPE = dict(common.LLAMAS["llama-8b"], vocab_size=32000)


def generate(model, ids, count: int, compiled: bool) -> torch.Tensor:
    options = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False)
    if compiled:
        options |= dict(cache_implementation="static", max_cache_len=PROMPT + MANY)
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)


def seconds(model, ids, count: int, compiled: bool) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    generate(model, ids, count, compiled)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model, ids, compiled: bool) -> dict:
    """ms a token, and the tokens."""
    torch.compiler.reset()
    start = time.perf_counter()
    tokens = generate(model, ids, MANY, compiled)
    first = time.perf_counter() - start
    generate(model, ids, FEW, compiled)
    pairs = [[seconds(model, ids, count, compiled) for count in (FEW, MANY)] for _ in range(REPEATS)]
    ms = statistics.median(1e3 * (many - few) / (MANY - FEW) for few, many in pairs)
    return {"ms": ms, "first_s": round(first, 1), "tokens": tokens[:, PROMPT:].tolist()}


def run_case(case: dict, lora_fused) -> list[dict]:
    config = transformers.LlamaConfig(**SHAPE, num_hidden_layers=case["layers"], max_position_embeddings=1024)
    base = common.build(lambda: transformers.LlamaForCausalLM(config)).eval()
    base.generation_config.eos_token_id = None
    torch.manual_seed(3)
    ids = torch.randint(SHAPE["vocab_size"], (case["batch"], PROMPT), device="cuda")
    ways = (("eager", False), ("compiled", True))
    results = [{**case, "way": way, "frozen": measure(base, ids, compiled)} for way, compiled in ways]
    targets = dict(target_modules=common.LINEARS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, peft.LoraConfig(r=32, lora_alpha=64, **targets), autocast_adapter_dtype=False)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1 * parameter.shape[-1] ** -0.5)
    model.to(torch.bfloat16).eval()
    for result, (_, compiled) in zip(results, ways, strict=True):
        result["PEFT"] = measure(model, ids, compiled)
    lora_fused.apply(model, kernels.Mode.INFERENCE)
    for result, (_, compiled) in zip(results, ways, strict=True):
        result["ours"] = measure(model, ids, compiled)
        expected = torch.tensor(result["PEFT"].pop("tokens"))
        result["differ"] = (torch.tensor(result["ours"].pop("tokens")) != expected).sum().item()
        result["of"] = expected.numel()
        del result["frozen"]["tokens"]
    return results


def describe(result: dict) -> str:
    text = f"{result['batch']} x {PROMPT}, {result['layers']} layers, {result['way']}:"
    frozen = result["frozen"]["ms"]
    for name in ("frozen", "PEFT", "ours"):
        ms, first = result[name]["ms"], result[name]["first_s"]
        text += f" {name} {ms:.2f} ms a token ({ms / frozen:.2f}x, first call {first} s)"
    return f"{text}; {result['differ']} of {result['of']} tokens are not PEFT's"


def main() -> None:
    parser = parser_of(__doc__, "benchmark_generation.json")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    arguments = parsed_on_a_gpu(parser)
    lora_fused = kernels.get_local_kernel(arguments.kernel)
    results = []
    for batch in progress.numbered(arguments.batch):
        results += run_case({"batch": batch, "layers": arguments.layers}, lora_fused)
        print("\n".join(describe(result) for result in results[-2:]), flush=True)
        release_memory()
        arguments.out.write_text(written(environment(), results))


if __name__ == "__main__":
    main()
