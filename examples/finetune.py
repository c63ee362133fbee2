#!/usr/bin/env python3
"""LoRA fine-tuning of a causal language model, with PEFT alone and with lora-fused, side by side.

All runs start from the same weights and see the same batches, so their losses must agree. On a GPU, or with --compiled,
both run once more with torch.compile, decoder layer by decoder layer.
Without --model: a Llama built here (on a GPU of a 1B shape); without --data: the language reference
that every Python ships. Exits with 1 if the losses disagree or nothing was fused, with 2 for bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # largest |difference of losses| of a step
WARMUP_STEPS = 5  # left out of the step time: groups form, the compiler runs
BASE_LR = {"cpu": 3e-3, "cuda": 3e-4}  # the base model is first trained itself, for half of --steps


class BadInput(Exception):
    """The user's arguments or files cannot be used."""


class Way(NamedTuple):
    title: str
    fused: bool
    compiled: bool


WAYS = (
    Way("PEFT", fused=False, compiled=False),
    Way("lora-fused", fused=True, compiled=False),
    Way("PEFT, compiled", fused=False, compiled=True),
    Way("lora-fused, compiled", fused=True, compiled=True),
)
COLORS = {"PEFT": "tab:orange", "lora-fused": "tab:blue", "PEFT, compiled": "tab:red", WAYS[-1].title: "tab:green"}


class Run(NamedTuple):
    losses: list[float]
    step_ms: float
    peak_bytes: int | None  # the GPU allocator's peak; None on a CPU


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a checkpoint with its tokenizer")
    parser.add_argument("--data", type=Path, help="text file to train on, default: Python's language reference")
    seq = 1024 if torch.cuda.is_available() else 128
    for name, default in (("steps", 60), ("rank", 16), ("batch", 8), ("seq", seq), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the base: bfloat16 on a GPU, else float32")
    shown = "torch.compile as well: on a GPU unless --no-compiled"
    action, default = argparse.BooleanOptionalAction, torch.cuda.is_available()
    parser.add_argument("--compiled", action=action, default=default, help=shown)
    parser.add_argument("--kernel", metavar="ORG/NAME", help="load the kernel from the Hub instead of build/")
    parser.add_argument("--trust-remote-code", action="store_true", help="with --kernel, for an untrusted publisher")
    parser.add_argument("--out", type=Path, default=ROOT / ".demo" / "loss.png", help="picture; a .json goes beside it")
    args = parser.parse_args()
    if min(args.steps, args.rank, args.batch) < 1 or args.seq < 2:
        parser.error("--steps, --rank and --batch must be 1 or more, --seq 2 or more")
    args.out = args.out.with_suffix(".png")
    return args


def load_kernel(args: argparse.Namespace):
    """The kernel named by --kernel or in LOCAL_KERNELS, or else the one in build/."""
    from kernels import get_kernel, get_local_kernel

    local = [entry.split("=")[0] for entry in os.environ.get("LOCAL_KERNELS", "").split(":")]
    name = args.kernel or next((name for name in local if name.endswith("/lora-fused")), None)
    try:
        if name:
            return get_kernel(name, version=1, trust_remote_code=args.trust_remote_code)
        return get_local_kernel(ROOT / "build")
    except (OSError, ValueError) as error:
        raise BadInput(f"no kernel in {name or 'build/, run `make build` first'} ({error})") from error


def read_text(path: Path | None) -> str:
    if path is None:
        from pydoc_data import topics

        return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--data {path}: cannot be read ({error})") from error


def from_checkpoint(auto_class: str, args: argparse.Namespace, **options):
    import transformers

    if not (args.model / "config.json").is_file():
        raise BadInput(f"--model {args.model}: no config.json there, not a checkpoint's folder")
    try:
        return getattr(transformers, auto_class).from_pretrained(args.model, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        raise BadInput(f"--model {args.model}: {auto_class} cannot load it ({error})") from error


def tokenize(args: argparse.Namespace, text: str) -> torch.Tensor:
    """Token ids of the whole text: its bytes for the small model, the checkpoint's own otherwise."""
    if args.model is None:
        ids = torch.tensor(list(text.encode()))
    else:
        tokenizer = from_checkpoint("AutoTokenizer", args)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) <= args.seq:
        raise BadInput(f"the text is too short: {len(ids)} tokens, --seq {args.seq} needs at least {args.seq + 1}")
    return ids


def draw_batches(ids: torch.Tensor, args: argparse.Namespace, steps: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - args.seq, (steps, args.batch, 1), generator=generator)
    return list(ids[starts + torch.arange(args.seq)])


def base_maker(args: argparse.Namespace, ids: torch.Tensor, device: str, dtype: torch.dtype) -> Callable:
    """A function that makes the same base model each time it is called."""
    if args.model is not None:
        return lambda: from_checkpoint("AutoModelForCausalLM", args, dtype=dtype).to(device)
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=256, hidden_size=256, intermediate_size=768, num_hidden_layers=3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=max(512, args.seq))
    if device == "cuda":  # a 1B shape: less waits for the host, and shows nothing
        sizes.update(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)
        heads.update(num_attention_heads=32, num_key_value_heads=8)
    config = LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=None)
    base = LlamaForCausalLM(config).to(device, dtype)
    batches = draw_batches(ids, args, args.steps // 2 + 1, args.seed + 1)
    train(base, batches, BASE_LR[device], contextlib.nullcontext, "base model")
    weights = {name: tensor.to("cpu", dtype) for name, tensor in base.state_dict().items()}

    def build():
        model = LlamaForCausalLM(config).to(dtype)
        model.load_state_dict(weights)
        return model.to(device)

    return build


def train(model, batches: list[torch.Tensor], lr: float, autocast: Callable, title: str) -> Run:
    """One optimizer step per batch on every parameter that requires a gradient."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    model.train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for batch in (bar := tqdm(batches, desc=f"{title:<20}", unit="step", file=sys.stderr)):
        start = time.perf_counter()
        batch = batch.to(device)
        with autocast():
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
    measured = seconds[min(WARMUP_STEPS, len(seconds) - 1) :]
    return Run(losses, 1e3 * statistics.median(measured), torch.cuda.max_memory_allocated() if cuda else None)


def compile_layers(model) -> None:
    """torch.compile, in place: each decoder layer, which takes less time than the model, or else the model."""
    base = model.get_base_model()
    names = getattr(base, "_no_split_modules", None) or ()
    for layer in [module for module in base.modules() if type(module).__name__ in names] or [model]:
        layer.compile()


def difference_of(run: Run, peft: Run) -> float:
    """The largest of two runs' losses of a step; a NaN is the largest."""
    return max((abs(a - b) for a, b in zip(peft.losses, run.losses)), key=lambda d: (d != d, d))


def report(runs: dict[str, Run], tolerance: float) -> None:
    peft, widths = runs["PEFT"], {title: max(12, len(title)) for title in runs}
    columns = functools.partial(print, sep="  ")
    columns(f"\n{'step':>14}", *(f"{title:>{width}}" for title, width in widths.items()))
    for i in range(len(peft.losses)):
        if i % max(1, len(peft.losses) // 12) == 0 or i + 1 == len(peft.losses):
            columns(f"{i + 1:>14}", *(f"{run.losses[i]:>{widths[title]}.6f}" for title, run in runs.items()))
    rows = {
        "difference": lambda run: f"{difference_of(run, peft):.1e}",
        "step time": lambda run: f"{run.step_ms:.1f} ms",
        "over PEFT": lambda run: f"{run.step_ms / peft.step_ms:.2f}x",
    }
    if peft.peak_bytes is not None:
        rows["peak memory"] = lambda run: f"{run.peak_bytes / 2**20:.0f} MiB"
    for name, cell in rows.items():
        columns(f"{name:>14}", *(f"{cell(run):>{widths[title]}}" for title, run in runs.items()))
    print(f"difference: the largest of the losses from PEFT's, tolerance {tolerance:.0e}; step time: the median")
    if peft.peak_bytes is None:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"peak memory: {resident:.0f} MiB resident, the whole process: a CPU has no figure per run")
        print("A CPU shows that results agree; what is gained in time and memory shows on a GPU.")


def draw(runs: dict[str, Run], path: Path) -> None:
    """Losses, step time, and on a GPU peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    peft = runs["PEFT"]
    place = "" if peft.peak_bytes is not None else "\non a CPU"
    bars = [(f"step time, ms{place}", [run.step_ms for run in runs.values()])]
    if peft.peak_bytes is not None:
        bars.append(("peak memory, MiB", [run.peak_bytes / 2**20 for run in runs.values()]))
    widths = [4, *(len(runs) / 2 for _ in bars)]
    figure, (axes, *panels) = pyplot.subplots(
        1, len(widths), figsize=(6 + len(runs) * len(bars), 4), width_ratios=widths, constrained_layout=True
    )
    steps, colors = range(1, len(peft.losses) + 1), [COLORS[title] for title in runs]
    for title, run in runs.items():
        look = dict(linewidth=5, alpha=0.45) if title == "PEFT" else dict(linewidth=1.5)
        axes.plot(steps, run.losses, color=COLORS[title], label=title, **look)
    axes.set(xlabel="step", ylabel="loss", title="LoRA fine-tuning, same seed and data")
    axes.legend()
    for panel, (title, values) in zip(panels, bars):
        panel.bar_label(panel.bar([name.replace(", ", ",\n") for name in runs], values, color=colors), fmt="%.1f")
        panel.set(title=title)
    figure.savefig(path, dpi=120)


def run_all(
    ways: list[Way], lora_fused, make_model: Callable, train_one: Callable, autocast: Callable
) -> tuple[dict[str, Run], list]:
    """The run of each way by its title, and what `explain` says of each kernelized model."""
    runs, explained = {}, []
    for way in ways:
        model = make_model()
        if way.fused:
            lora_fused.apply(model)
        try:
            if way.compiled:
                compile_layers(model)
            runs[way.title] = train_one(model, title=way.title)
            if way.fused:
                with autocast():
                    explained.append(lora_fused.explain(model))
        except RuntimeError as error:  # a compiler that is not there, or fails: what ran without it is still to be seen
            if not way.compiled:
                raise
            said = " ".join(str(error).split("\n")[:2])  # "backend=... raised:", and what
            print(f"{way.title}: failed: {said}", file=sys.stderr)
        del model
        gc.collect()
        torch.compiler.reset()
    return runs, explained


def problem_of(ways: list[Way], runs: dict[str, Run], explained: list, tolerance: float) -> str | None:
    """What is not as it should be with the kernelized models."""
    ours = [way.title for way in ways if way.fused]
    if not all(title in runs for title in ours):
        return "a compiled model did not run"
    if not all(any(row.fused for row in rows) for rows in explained):
        return "no LoRA module was fused"
    if not all(difference_of(runs[title], runs["PEFT"]) <= tolerance for title in ours):  # a NaN is no agreement
        return "the losses differ by more than the tolerance"
    return None


def compare(args: argparse.Namespace) -> int:
    ids = tokenize(args, read_text(args.data))
    from peft import LoraConfig, get_peft_model

    lora_fused = load_kernel(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    # fp32 adapters on a bf16 base under autocast, as transformers' Trainer runs them
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=dtype is torch.bfloat16)
    print(f"device: {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, base model in {dtype}")
    torch.manual_seed(args.seed)
    make_base = base_maker(args, ids, device, dtype)
    batches = draw_batches(ids, args, args.steps, args.seed)

    def make_model():
        base = make_base()
        torch.manual_seed(args.seed)
        config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(base, config)

    ways = [way for way in WAYS if args.compiled or not way.compiled]
    train_one = functools.partial(train, batches=batches, lr=args.lr, autocast=autocast)
    runs, explained = run_all(ways, lora_fused, make_model, train_one, autocast)
    print(f"\n{explained[0]}")
    if len(explained) > 1:
        print(f"compiled: {explained[1].headline()}")
    tolerance = TOLERANCE[dtype]
    report(runs, tolerance)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, args.out)
    result = dict(device=device, dtype=str(dtype), tolerance=tolerance, lora_modules=len(explained[0]))
    result["fused_modules"] = sum(row.fused for row in explained[0])
    result["runs"] = {
        title: run._asdict() | dict(largest_difference=difference_of(run, runs["PEFT"])) for title, run in runs.items()
    }
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"picture: {args.out}, all losses: {args.out.with_suffix('.json')}")
    problem = problem_of(ways, runs, explained, tolerance)
    if problem:
        print(f"FAILED: {problem}, see the tables above", file=sys.stderr)
    return 1 if problem else 0


def main() -> int:
    try:
        return compare(parse_args())
    except BadInput as error:
        print(f"finetune.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
