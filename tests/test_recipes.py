"""The blocks of docs/usage.md as they stand there, with a small model, and the commands of its table of scripts."""

import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections import Counter

import accelerate
import pytest
import torch
from conftest import ROOT
from helpers.cases import randomise_adapters
from helpers.checkpoints import save_checkpoint
from helpers.kernelizing import explain, forwards
from helpers.llamas import keep_names
from torch._dynamo.backends.registry import lookup_backend
from transformers import CompileConfig

USAGE = ROOT / "docs" / "usage.md"
RECIPES = dict(re.findall(r"<!-- recipe: (\w+) -->\n```python\n(.*?)```", USAGE.read_text(), re.DOTALL))
NEEDS = {"trl": "trl", "deepspeed": "deepspeed", "qlora": "bitsandbytes", "diffusers": "diffusers"}
# The table of scripts: the command and what it needs.
COMMANDS = dict(re.findall(r"^\| [^|]+ \| `(.+?)` \| ([^|]*?) ?\|$", USAGE.read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(
        folder, hidden_size=64, intermediate_size=128, num_hidden_layers=2
    )  # rows of whole blocks in four bits
    return folder


@pytest.fixture(autouse=True)
def no_compiler_is_left():
    """Trainer leaves its compiler in the environment, for every later Accelerator of the process."""
    for moment in ("before", "after"):
        for variable in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[variable]
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        torch.compiler.reset()
        if moment == "before":
            yield


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch, lora_fused):
    """Runs a recipe after the setup, and gives its names, with the calls that were recorded meanwhile."""
    monkeypatch.setenv("LOCAL_KERNELS", f"org/lora-fused={ROOT / 'build'}")
    monkeypatch.chdir(tmp_path)

    def run(name):
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
        if name == "use_kernels" and torch.cuda.is_available():
            pytest.skip("transformers would ask the Hub for its CUDA kernels")
        setup = RECIPES["setup"]
        assert setup.count('"path/to/a/checkpoint"') == 1
        names = {}
        torch.manual_seed(0)
        exec(compile(setup.replace('"path/to/a/checkpoint"', repr(str(checkpoint))), "setup", "exec"), names)
        names["lora_fused"].peft.small_batch.SMALL_ROWS = -1  # as conftest.py has it
        with names["lora_fused"].record() as calls, warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*lora_fused")
            exec(compile(RECIPES[name], name, "exec"), names)
        return names, calls

    return run


def test_the_page_has_them():
    assert len(RECIPES) == USAGE.read_text().count("```python") >= 15
    named = {word.removeprefix("examples/") for command in COMMANDS for word in command.split() if "examples/" in word}
    assert named == {path.name for path in (ROOT / "examples").iterdir() if path.is_file()} - {"shared.py"}


# The number of LoRA modules, and how often the model has been called: each time four linears and the MLP in two layers.
TRAINED = {
    "loop": (14, 2),
    "trainer": (14, 4),
    "trl": (14, 8),  # it checkpoints: each layer is computed again
    "accelerate": (14, 2),
    "qlora": (14, 2),
    "adapters": (14, 2),
    "merging": (14, 3),
    "use_kernels": (14, 1),
    "record": (14, 1),
}


@pytest.mark.parametrize("name", TRAINED)
def test_trained_fused(run, name, capsys):
    names, calls = run(name)
    modules, passes = TRAINED[name]
    rows = explain(names["lora_fused"], names["model"])
    assert len(rows) == modules and all(row.fused and row.last == "fused" for row in rows), str(rows)
    assert (calls.fused, calls.own) == (10 * passes, 0), str(calls)
    grads = [p.grad for name, p in names["model"].named_parameters() if "lora_" in name and p.grad is not None]
    assert grads == [] or all(grad.isfinite().all() for grad in grads)
    if name in ("loop", "record"):
        assert "14 of 14 LoRA modules fused, 100.0% of the adapter parameters" in capsys.readouterr().out


@pytest.fixture
def graphs(monkeypatch):
    """What Inductor is given is compiled by AOT eager, which takes a tenth of the time. Gives the ops of this kernel in
    each graph of Dynamo, by name."""
    found = []

    def compile_fx(module, inputs, **_):
        targets = (node.target for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload))
        names = [target._schema.name.partition("::")[2] for target in targets if "lora_fused" in target.namespace]
        found.append(Counter(names))
        return lookup_backend("aot_eager")(module, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return found


LAYER = dict(traced_linear=4, traced_gated_mlp=1)
MODEL = dict(traced_linear=8, traced_gated_mlp=2)


# The graphs of each recipe: by layer the first one's, whose input needs no gradient, and that of all others, for each
# row's length; else the model's.
COMPILED = {
    "compiled": [LAYER] * 4,
    "compiled_trainer": [MODEL],
    "compiled_regions": [LAYER] * 4,
    "compiled_mode": [MODEL],
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(run, graphs, name):
    """No call is outside of the graphs, which have every linear and MLP."""
    names, calls = run(name)
    assert [dict(found) for found in graphs if found] == COMPILED[name]
    assert calls.fused == calls.own == 0, str(calls)
    assert all(row.fused for row in explain(names["lora_fused"], names["model"]))
    if name == "compiled_trainer":
        assert names["trainer"].state.log_history[0]["lora_fused"] == 1.0
    if name == "compiled_mode":
        assert_peft_s_gradients(names)


def assert_peft_s_gradients(names):
    model, grads = names["model"], []
    for stance in ("default", "force_eager"):
        model.zero_grad()
        with torch.compiler.set_stance(stance):
            model(input_ids=names["ids"], labels=names["ids"]).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        names["lora_fused"].restore(model)
    ours, theirs = grads
    assert len(ours) == 28 and any(grad.abs().max() > 0 for grad in theirs.values())
    for key, grad in theirs.items():
        torch.testing.assert_close(ours[key], grad, rtol=1e-4, atol=1e-6)


def test_generation_with_a_static_cache(run, graphs):
    """Compiled on a GPU by itself, on a CPU where it is told to; the tokens are those of PEFT's model."""
    names, _ = run("compiled_generation")
    assert names["generated"].shape[1] == names["ids"].shape[1] + 4
    randomise_adapters(names["model"], torch.float32)
    model, options = names["model"], dict(input_ids=names["ids"], max_new_tokens=4, do_sample=False)
    compiled = CompileConfig(backend="inductor", mode="default", fullgraph=True)
    compiled._compile_all_devices = True
    ours = model.generate(**options, cache_implementation="static", compile_config=compiled)
    assert [dict(found) for found in graphs] == [MODEL]
    names["lora_fused"].restore(model)
    theirs = model.generate(**options)
    assert torch.equal(ours, theirs) and not torch.equal(names["generated"], theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step(run):
    """What replays add up is what eager steps do."""
    names, _ = run("captured")
    losses, trained = names["losses"], [p for p in names["model"].parameters() if p.requires_grad]
    assert len(set(losses)) == 4 and torch.tensor(losses).isfinite().all()
    names["graph"].replay()
    names["graph"].replay()  # adds
    replayed = [p.grad.clone() for p in trained]
    names["optimizer"].zero_grad()
    names["step"]()
    for p, grad in zip(trained, replayed, strict=True):
        torch.testing.assert_close(grad, 2 * p.grad, rtol=1e-3, atol=1e-5)


def test_trainer_reports(run):
    names, _ = run("trainer")
    assert [row.get("lora_fused") for row in names["trainer"].state.log_history][:2] == [1.0, None]


def test_dora_with_an_embedding(run):
    names, calls = run("dora")
    rows = explain(names["lora_fused"], names["model"])
    assert len(rows) == 7 and all(row.fused and row.last == "fused" for row in rows), str(rows)
    assert {row.layer for row in rows} == {"LoraLinear", "LoraEmbedding", "LoraGatedMLP"} and calls.own == 0
    assert any(
        "magnitude" in name and p.grad.abs().max() > 0
        for name, p in names["model"].named_parameters()
        if p.grad is not None
    )


def test_weights_are_sent_merged(run):
    names, _ = run("merging")
    model = names["model"]
    assert not any("lora_" in name for name in names["weights"])
    assert not any(row.reason for row in explain(names["lora_fused"], model))  # unmerged


def test_merging_a_hundred_times_keeps_names_and_values(run, checkpoint):
    """Names as they were, values within rounding of where they began: PEFT adds and takes the same product."""
    names, _ = run("merging")
    model = names["model"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(100):
        model.merge_adapter()
        model.unmerge_adapter()
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5)
    assert all(row.fused for row in explain(names["lora_fused"], model))


def test_undo(run):
    names, _ = run("undo")
    model = names["model"]
    assert forwards(model) == {} and not any("lora_" in name for name, _ in model.named_parameters())


def test_leaves_of_zero_3(run):
    names, _ = run("deepspeed")
    assert all(row.fused for row in explain(names["lora_fused"], names["model"]))
    assert sum(getattr(module, "_z3_leaf", False) for module in names["model"].modules()) == 2


@pytest.mark.parametrize("name,modules", (("experts", 12), ("diffusers", 14)))
def test_other_models(run, name, modules):
    names, calls = run(name)
    rows = explain(names["lora_fused"], names["model"])
    assert len(rows) == modules and all(row.fused for row in rows), str(rows)
    assert calls.fused > 0 and calls.own == 0


def losses_of(out):
    """Of each step, as the scripts print them: a line each, or a list."""
    listed = re.search(r"^losses \[(.*)\]$", out, re.MULTILINE)
    return [float(loss) for loss in (listed[1].split(", ") if listed else re.findall(r"step \d+: loss (\S+)", out))]


@pytest.fixture
def alone(monkeypatch, tmp_path, capsys):
    """Runs `python examples/...` in this process, and gives what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    keep_names(monkeypatch)  # --liger replaces them

    def run(command):
        _, script, *arguments = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        out = capsys.readouterr().out
        assert ended.value.code == 0, out
        return out

    return run


@pytest.fixture
def together(tmp_path):
    """Runs a command that starts two processes, on two GPUs or else on the CPU, and gives what it prints."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    launchers = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
        "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
    }

    def run(command):
        launcher, *words = shlex.split(command)
        if torch.cuda.device_count() == 1 and (launcher == "accelerate" or "--deepspeed" in words):
            pytest.skip("needs two GPUs, or none")
        gpus = torch.cuda.device_count()
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"} if gpus < 2 else None
        command = [*launchers[launcher], *words, *(["--cpu"] if gpus == 1 else [])]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


ALONE = [command for command in COMMANDS if command.startswith("python ") and "finetune.py" not in command]
TOGETHER = [command for command in COMMANDS if not command.startswith("python ") and "deepspeed" not in command]
UNSTEADY = ("dit.py", "merging.py", "adapters.py", "grpo")  # noise or a reward decides what a few steps end with


def skip_without(needs):
    for name in filter(None, needs.split(", ")):
        if name == "a GPU":
            if not torch.cuda.is_available():
                pytest.skip("needs a GPU")
        elif importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")


def assert_trained(command, out):
    """The script itself ends with an error where a call was not fused."""
    counted = r"^14 of 14 LoRA modules fused" if "--compile" in command else r"^[1-9]\d* fused calls, "
    assert re.search(counted, out, re.MULTILINE), out
    losses = losses_of(out)
    if not any(name in command for name in UNSTEADY):
        assert len(losses) > 2 and losses[-1] < losses[0], out


def test_every_command_is_run_by_a_test():
    zero = [command for command in COMMANDS if "--deepspeed" in command]
    assert len(ALONE) == 10 and len(TOGETHER) == 4 and len(zero) == 2
    assert {*COMMANDS} - {*ALONE, *TOGETHER, *zero} == {"python examples/finetune.py"}  # tests/test_example.py


@pytest.mark.parametrize("command", ALONE, ids=lambda command: command.removeprefix("python examples/"))
def test_command(alone, command):
    skip_without(COMMANDS[command])
    assert_trained(command, alone(command))


DDP = "torchrun --nproc-per-node 2 examples/train.py"
FSDP2 = "accelerate launch --config_file examples/fsdp2.yaml examples/train.py"  # DDP, too, on CPUs


@pytest.mark.parametrize(
    "command",
    [pytest.param(command, marks=pytest.mark.slow if command in (DDP, FSDP2) else ()) for command in TOGETHER],
)
def test_command_of_two_processes(together, command):
    skip_without(COMMANDS[command])
    out = together(command)
    assert_trained(command, out)
    assert out.count(" fused calls, ") == 1  # two trainings of one process each would say it twice


def test_fsdp2_by_accelerates_configuration(together, tmp_path):
    """Sharded by accelerate as on GPUs, and fused in each call."""
    out = together(FSDP2.replace("examples/train.py", str(ROOT / "tests" / "helpers" / "fsdp2_on_cpu.py")))
    assert_trained(FSDP2, out)
    assert "60 fused calls, 0 of the modules' own forwards" in out
    for rank in range(2):
        assert "LlamaDecoderLayer LlamaDecoderLayer" in (tmp_path / f"sharded{rank}.txt").read_text()


@pytest.mark.slow
def test_zero_has_the_losses_of_ddp(together):
    """Adam makes a little of other sums' rounding."""
    skip_without("deepspeed")
    expected = losses_of(together(DDP))
    zero = [command for command in COMMANDS if "--deepspeed" in command]
    for command in zero:
        out = together(command)
        assert "60 fused calls, 0 of the modules' own forwards" in out
        assert losses_of(out) == pytest.approx(expected, abs=2e-3), command
    assert len(zero) == 2 and len(expected) == 6
