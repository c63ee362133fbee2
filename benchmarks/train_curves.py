"""Loss curves of DoRA with dropout and trained biases on all linears: PEFT alone and kernelized.

    python benchmarks/train_curves.py --out curves.json
    python benchmarks/train_curves.py --plot curves.json docs/loss_dora_dropout_bias.png

A Llama-shaped model with biases in attention and MLP, built from a configuration, learns Python's own
language reference byte by byte for 200 steps, from the same weights and batches. PEFT's dropout and
ours draw different masks, so PEFT runs with a second seed too: ours must lie no further from PEFT's
first run than twice the distance of its second. Exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import pathlib
import time

import kernels
import peft
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMOOTH = 10  # steps of the running mean that is compared
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(device: str) -> torch.nn.Module:
    size = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16)
    if device == "cpu":
        size = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlamaConfig(**size, vocab_size=256, attention_bias=True, mlp_bias=True, use_cache=False)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)


def batches(steps: int, device: str) -> list[torch.Tensor]:
    from pydoc_data import topics

    text = torch.tensor(list("\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()))
    rows, length = (8, 512) if device == "cuda" else (4, 64)
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, len(text) - length, (steps, rows), generator=generator)
    return [torch.stack([text[start : start + length] for start in row]).to(device) for row in starts]


def train(model, data, seed: int, device: str) -> dict:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    torch.manual_seed(seed)
    losses, started = [], time.perf_counter()
    for tokens in data:
        scope = torch.autocast("cuda", dtype=torch.bfloat16) if device == "cuda" else contextlib.nullcontext()
        with scope:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    losses = torch.stack(losses).float().cpu()
    return {"losses": losses.tolist(), "step_ms": 1e3 * (time.perf_counter() - started) / len(data)}


def distance(a: dict, b: dict) -> float:
    """Mean |difference| of the smoothed losses."""
    smooth = [torch.tensor(run["losses"]).unfold(0, SMOOTH, 1).mean(1) for run in (a, b)]
    return (smooth[0] - smooth[1]).abs().mean().item()


def plot(results: dict, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, run in results["runs"].items():
        axes.plot(run["losses"], label=name, linewidth=1)
    axes.set(
        xlabel="step", ylabel="loss", title=f"DoRA, dropout 0.1, biases trained; {results['environment']['device']}"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("curves.json"))
    parser.add_argument("--plot", nargs=2, type=pathlib.Path, metavar=("JSON", "PICTURE"), help="draw, do not train")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(json.loads(arguments.plot[0].read_text()), arguments.plot[1])
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lora_fused = kernels.get_local_kernel(ROOT / "build")
    config = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.1, use_dora=True, bias="all", target_modules=LINEARS, task_type="CAUSAL_LM"
    )
    model, data = peft.get_peft_model(base_model(device), config).train(), batches(arguments.steps, device)
    ours = copy.deepcopy(model)
    with lora_fused.use_peft_layers():
        kernels.kernelize(ours, mode=kernels.Mode.TRAINING, device=device)
    rows = lora_fused.explain(ours)
    assert all(row.fused for row in rows), str(rows)
    runs = {
        "PEFT": train(copy.deepcopy(model), data, 1, device),
        "PEFT, another seed": train(copy.deepcopy(model), data, 2, device),
        "lora-fused": train(ours, data, 1, device),
    }
    spread, difference = distance(runs["PEFT"], runs["PEFT, another seed"]), distance(runs["PEFT"], runs["lora-fused"])
    environment = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
    }
    results = {"environment": environment, "runs": runs, "seed_to_seed": spread, "ours_to_peft": difference}
    arguments.out.write_text(json.dumps(results, indent=1))
    for name, run in runs.items():
        print(f"{name:20} first {run['losses'][0]:.4f} last {run['losses'][-1]:.4f}  {run['step_ms']:.1f} ms a step")
    print(f"mean difference of smoothed losses: ours to PEFT {difference:.5f}, PEFT seed to seed {spread:.5f}")
    return int(difference > 2 * spread)


if __name__ == "__main__":
    raise SystemExit(main())
