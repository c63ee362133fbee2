"""The cases of compare_lora.py: shapes, variants and precisions, and what a row calls them."""

from __future__ import annotations

VARIANTS = {
    "LoRA": {},
    "LoRA, dropout 0.1": dict(lora_dropout=0.1),
    "LoRA, bias all": dict(bias="all"),
    "DoRA": dict(use_dora=True),
    "DoRA, dropout 0.1": dict(use_dora=True, lora_dropout=0.1),
}
PRECISIONS = (("fp32", True), ("bf16", False))  # adapter, whether under autocast
KINDS = ("linear", "llama-8b", "small", "high-rank")


def shape_of(case: dict) -> str:
    """ "linear" or a key of LLAMAS; kinds that mix shapes name it."""
    return case.get("shape", case["kind"])


def head_of(result: dict) -> str:
    if shape_of(result) == "linear":
        shape = f"linear {result['k']}->{result['n']}, M={result['m']}"
    else:
        shape = f"{result['layers']} {shape_of(result).title()} layers, {result['batch']}x{result['seq']}"
    for option, text in (("checkpointing", "checkpointing"), ("graph", "CUDA graph"), ("forward_only", "forward")):
        shape += f", {text}" if result.get(option) else ""
    variant = result["variant"] + (f" r={result['rank']}" if result["rank"] != 32 else "")
    return f"{shape:50} {variant:18} {result['adapter']}{' autocast' if result['autocast'] else '':9}"


def single_cases(kind: str, tokens, shapes, precisions, **options) -> list[dict]:
    """Single linears of rank 32 with LoRA but for `options`; a precision is (adapter, under autocast)."""
    fixed = {**dict(kind=kind, shape="linear", variant="LoRA", rank=32), **options}
    return [
        dict(fixed, m=m, k=k, n=n, adapter=adapter, autocast=autocast)
        for m in tokens
        for k, n in shapes
        for adapter, autocast in precisions
    ]


def small_cases(repeats: int) -> list[dict]:
    """Work that waits for the host: few rows without a gradient, and a small model."""
    options = dict(forward_only=True, repeats=3 * repeats)
    single = single_cases("small", (1, 16, 64, 256), ((4096, 4096),), PRECISIONS, **options)
    model = dict(kind="small", shape="llama-1b", variant="LoRA", layers=16, batch=1, seq=512, rank=32, repeats=repeats)
    return single + [
        dict(model, adapter=adapter, autocast=autocast, forward_only=forward_only)
        for forward_only in (False, True)
        for adapter, autocast in PRECISIONS
    ]


def high_rank_cases(repeats: int) -> list[dict]:
    shapes = ((4096, 4096), (8192, 8192))
    options = dict(variant="DoRA", rank=384, repeats=3 * repeats)
    return [
        case
        for graph in (False, True)
        for case in single_cases("high-rank", (4096,), shapes, PRECISIONS[1:], graph=graph, **options)
    ]


def model_cases(repeats: int, layers: int) -> list[dict]:
    short = [(variant, "fp32", variant != "LoRA, bias all") for variant in VARIANTS] + [("LoRA", "bf16", False)]
    runs = [(1, *run, False, graph) for graph in (False, True) for run in short]
    runs += [(1, variant, "fp32", False, False, False) for variant in ("LoRA", "LoRA, dropout 0.1")]
    runs += [(4, variant, "fp32", True, cp, False) for cp in (False, True) for variant in ("LoRA", "DoRA")]
    return [
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


def cases(repeats: int, layers: int) -> list[dict]:
    shapes = ((4096, 4096), (4096, 14336), (14336, 4096))
    single = single_cases("linear", (64, 2048, 8192), shapes, PRECISIONS, repeats=3 * repeats)
    # Fewer tokens take the GPU less time than the host takes to ask for a replay.
    single += single_cases("linear", (2048, 8192), shapes, PRECISIONS, repeats=3 * repeats, graph=True)
    return single + model_cases(repeats, layers) + small_cases(repeats) + high_rank_cases(repeats)


def peer_cases(repeats: int, layers: int) -> list[dict]:
    """The model first: what other packages change in PEFT when they are imported comes with the single linears."""
    model = dict(kind="llama-8b", layers=layers, batch=1, seq=2048, rank=32, adapter="fp32", autocast=True)
    single = single_cases("linear", (8192,), ((4096, 4096), (4096, 14336)), PRECISIONS, repeats=3 * repeats)
    return [dict(model, variant=variant, repeats=repeats) for variant in ("LoRA", "DoRA")] + single
