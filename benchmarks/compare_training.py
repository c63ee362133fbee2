"""Training as people do it: a Llama of 8B's shape with its head and loss, gradient checkpointing, one packed row of
8192 or 16384 tokens, LoRA on all linears, AdamW; the base in bfloat16 or in NF4 (QLoRA).

    python benchmarks/compare_training.py --out results.json
    python benchmarks/compare_training.py --layers 8 --compiled           torch.compile by layer as well
    torchrun --nproc-per-node 2 benchmarks/compare_training.py --fsdp     FSDP2 over two GPUs, a row each
    python benchmarks/compare_training.py --tiny                          small shapes, on a CPU: it runs, that is all

PEFT and lora-fused train the same model on the same rows: each is built anew from the same seed, takes a few steps that
do not count, then those that do, one queued after another. The frozen base goes forward and backward alone. Adapters
are float32 under bfloat16's autocast, as Trainer has them, and B is drawn: from zero, PEFT's first updates are lost
where bfloat16 adds them to the base output (first_step.py). Rows are packed as they come ("wrapped"): attention sees
the whole row. What does not have PEFT's losses has no speed to report.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time

import compare_lora as common
import kernels
import peers
import peft
import progress
import torch
import torch.distributed as dist
import transformers
from measuring import release_memory
from reporting import environment, first_line, parser_of, written
from torch.distributed.fsdp import fully_shard

RANK, WARM_UP, LEARNING_RATE = 32, 3, 1e-5  # groups form in the second step
TOLERANCE = 5e-2  # of a step's loss, bfloat16
LLAMA_8B = dict(common.LLAMAS["llama-8b"], vocab_size=128256)
TINY = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=256)


def cases(options: argparse.Namespace) -> list[dict]:
    """Base and tokens of a row."""
    fixed = dict(kind="llama-8b", layers=options.layers, batch=1, rank=RANK, world=options.world, steps=options.steps)
    return [dict(fixed, base=base, seq=seq) for base in options.base for seq in options.tokens]


def ways_of(options: argparse.Namespace) -> list[str]:
    """A frozen base that is sharded gathers for nothing, so it is no baseline."""
    ways = ["PEFT", "lora-fused"] if options.fsdp else ["frozen base", "PEFT", "lora-fused"]
    return ways + (["PEFT, torch.compile", "lora-fused, torch.compile"] if options.compiled else [])


def rows_of(case: dict, count: int, rank: int) -> list[torch.Tensor]:
    """Token ids [1, seq] of each step: bytes of the language reference that every Python ships, one process after
    another."""
    from pydoc_data import topics

    text = torch.tensor(list("\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()))
    starts = [(case["world"] * step + rank) * case["seq"] % (len(text) - case["seq"]) for step in range(count)]
    return [text[start : start + case["seq"]][None] for start in starts]


def built(case: dict, way: str, options: argparse.Namespace) -> torch.nn.Module:
    """The model that is trained, the same each time; sharded where it is to be."""
    shape = TINY if options.tiny else LLAMA_8B
    config = transformers.LlamaConfig(
        **shape, num_hidden_layers=case["layers"], max_position_embeddings=16384, use_cache=False
    )
    model = common.build(lambda: transformers.LlamaForCausalLM(config), device=options.device)
    if case["base"] == "NF4":
        # FSDP2 of torch 2.11 makes parameters that may have gradients of what it shards.
        model = common.four_bit(model, torch.bfloat16 if options.fsdp else torch.uint8)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    layers = model.model.layers
    if way != "frozen base":
        torch.manual_seed(1)
        targets = dict(target_modules=common.LINEARS, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, **targets))
        draw_b(model)
    if options.fsdp:
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def draw_b(model: torch.nn.Module) -> None:
    """As of an adapter that has been trained: of the adapter's part in an output a tenth of the base output's."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1 * parameter.shape[1] ** -0.5)


class Clock:
    """Times between marks in ms: of the GPU's own, so that nothing waits for it, or else of the host."""

    def __init__(self, device: str):
        self.cuda, self.marks = device != "cpu", []

    def mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def times(self) -> list[float]:
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:])]
        return [1e3 * (b - a) for a, b in zip(self.marks, self.marks[1:])]


def train(model: torch.nn.Module, rows: list[torch.Tensor], device: str) -> dict:
    """A step a row: forward, backward, and AdamW on what is trained. Times and peak memory of all but the first."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True) if trained else None
    clock, losses = Clock(device), []
    rows = [row.to(device) for row in rows]
    for step, ids in enumerate(rows):
        if step == WARM_UP and clock.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        clock.mark()
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    clock.mark()
    times = clock.times()[WARM_UP:]
    peak = torch.cuda.max_memory_allocated() / 1e9 if clock.cuda else None
    return {
        "ms": statistics.median(times),
        "min_ms": min(times),
        "times_ms": [round(time, 3) for time in times],
        "peak_gb": peak,
        "losses": torch.stack(losses).float().tolist(),
    }


def over_processes(found: dict, device: str) -> dict:
    """The slowest process and the largest peak count; losses are means."""
    peak = found["peak_gb"] or 0.0
    largest = torch.tensor([found["ms"], found["min_ms"], peak], device=device, dtype=torch.float64)
    losses = torch.tensor(found["losses"], device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    dist.all_reduce(losses)
    ms, min_ms, peak = largest.tolist()
    losses = (losses / dist.get_world_size()).tolist()
    return {**found, "ms": ms, "min_ms": min_ms, "peak_gb": peak or None, "losses": losses}


def run_way(case: dict, way: str, lora_fused, options: argparse.Namespace) -> dict:
    """One contender's figures, or "failed" and why there are none."""
    try:
        model = built(case, way, options)
        if way.startswith("lora-fused"):
            lora_fused.apply(model)
        rows = rows_of(case, WARM_UP + case["steps"], options.rank)
        compiled = "torch.compile" in way
        with peers.compiled(model) if compiled else contextlib.nullcontext(), lora_fused.record() as calls:
            found = train(model, rows, options.device)
        if way == "lora-fused" and (calls.own or not calls.fused):
            return {"failed": f"not all of it is fused: {', '.join(map(str.strip, str(calls).splitlines()))}"}
        found = over_processes(found, options.device) if options.fsdp else found
    except (torch.OutOfMemoryError, ImportError) as error:
        return {"failed": first_line(error)}
    return {**found, "tokens_per_s": 1e3 * case["world"] * case["seq"] / found["ms"]}


def run_case(case: dict, lora_fused, options: argparse.Namespace) -> dict:
    """Every contender in turn, each alone on the device."""
    ways = {}
    for way in ways_of(options):
        ways[way] = run_way(case, way, lora_fused, options)
        release_memory()
        theirs, ours = ways.get("PEFT"), ways[way]
        if way not in ("frozen base", "PEFT") and "failed" not in {**theirs, **ours}:
            apart = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
            if not apart <= TOLERANCE:  # a NaN is no agreement
                said = f"not PEFT's losses, apart by {apart:.3g}: no speed reported"
                ways[way] = {"failed": said, "losses": ours["losses"]}
    return {**case, "ways": ways}


def describe(result: dict) -> str:
    head = f"{result['layers']} layers, {result['base']}, {result['world']} x 1x{result['seq']}"
    lines = [head]
    for way, found in result["ways"].items():
        if "failed" in found:
            lines.append(f"  {way:26} {found['failed']}")
            continue
        memory = "" if found["peak_gb"] is None else f" {found['peak_gb']:7.2f} GB"
        speed = f"{found['ms']:9.1f} ms {found['tokens_per_s']:9.0f} tokens/s{memory}"
        lines.append(f"  {way:26} {speed}, loss {found['losses'][0]:.4f} -> {found['losses'][-1]:.4f}")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = parser_of(__doc__, "benchmark_training.json")
    parser.add_argument("--layers", type=int, help="32, or 2 with --tiny")
    parser.add_argument("--steps", type=int, default=5, help=f"that count, after {WARM_UP} that do not")
    parser.add_argument("--base", nargs="+", choices=("bf16", "NF4"), default=("bf16", "NF4"), help="only these")
    parser.add_argument("--tokens", nargs="+", type=int, help="of a row; 8192 16384, or 32 64 with --tiny")
    parser.add_argument("--compiled", action="store_true", help="torch.compile by layer, too: minutes for 32 of them")
    parser.add_argument("--fsdp", action="store_true", help="sharded over the processes that torchrun has started")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("a CUDA GPU is required, or --tiny")
    options.layers = options.layers or (2 if options.tiny else 32)
    options.tokens = options.tokens or ((32, 64) if options.tiny else (8192, 16384))
    options.rank, options.world = 0, 1
    if options.fsdp:
        options.rank, options.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    options.device = "cpu" if options.tiny else f"cuda:{os.environ['LOCAL_RANK']}" if options.fsdp else "cuda"
    return options


def main() -> None:
    options = parse_args()
    if options.fsdp:
        if not options.tiny:
            torch.cuda.set_device(options.device)
        dist.init_process_group("gloo" if options.tiny else "nccl")
    lora_fused = kernels.get_local_kernel(options.kernel)
    made_with, results = environment("cpu" if options.tiny else "cuda"), []
    for case in progress.numbered(cases(options), shown=options.rank == 0):
        results.append(run_case(case, lora_fused, options))
        if options.rank == 0:
            print(describe(results[-1]), flush=True)
            options.out.write_text(written(made_with, results))
    if options.fsdp:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
