"""From the Hub to a training step: the unmodified client, each time in a process of its own, against a loopback Hub.

Also the two ways around the Hub, `LOCAL_KERNELS` and `get_local_kernel`, which must give the same mapping.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from helpers.hub_server import HubServer
from helpers.published import BUILD, FROM_HUB, REPO_ID, VERSION

# A real variant name that no machine able to run these tests can load.
FOREIGN_VARIANT = "torch-stable-abi211-metal-aarch64-darwin"

# Reports what loading raised and what it left behind, and exits with 3.
LOAD = """
import json, pathlib, sys
import kernels
from kernels import get_kernel, get_local_kernel, get_loaded_kernels
before = set(sys.modules)
try:
    lora_fused = {loader}
except Exception as error:
    left = [name for name in set(sys.modules) - before if "lora_fused" in name]
    left += [str(loaded) for loaded in get_loaded_kernels()]
    cls = type(error)
    print(json.dumps(dict(error=f"{{cls.__module__}}.{{cls.__name__}}", message=str(error), left=left)))
    sys.exit(3)
"""
REPORT_FILE = "print(json.dumps(dict(file=lora_fused.__file__, name=lora_fused.__name__)))\n"

# Three steps of the same job with PEFT alone and kernelized.
TRAIN = """
import dataclasses
import torch
from kernels import Mode, kernelize
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

device = "cuda" if torch.cuda.is_available() else "cpu"

def peft_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora).to(device)

def train(model):
    torch.manual_seed(1)
    tokens = torch.randint(0, 97, (3, 2, 17)).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for batch in tokens:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses

alone = train(peft_model())
lora_fused.register_peft_layers()
model = kernelize(peft_model(), mode=Mode.TRAINING, device=device)
rows = [{key: getattr(row, key) for key in ("module", "layer", "fused", "backend", "group", "reason")}
        for row in lora_fused.explain(model)]
print(json.dumps(dict(file=lora_fused.__file__, alone=alone, fused=train(model), rows=rows)))
"""
PROJECTIONS = 2 * 7  # decoder layers x adapted projections in each


def run(script, loader, endpoint, home, **env):
    """Run `script` after loading with the expression `loader`: (exit status, its JSON, stderr)."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_", "KERNELS_"))}
    # HF_HUB_DISABLE_TELEMETRY stays unset: with it kernels 0.17.2 sends an empty user agent
    # field, which httpx refuses as an illegal header.
    for name in ("LOCAL_KERNELS", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "TRANSFORMERS_OFFLINE"):
        clean.pop(name, None)
    clean.update(HF_ENDPOINT=endpoint, HF_HOME=str(home), HF_HUB_DISABLE_PROGRESS_BARS="1", NO_PROXY="127.0.0.1", **env)
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(loader=loader) + script],
        env=clean,
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = done.stdout.splitlines()
    assert lines, done.stderr
    return done.returncode, json.loads(lines[-1]), done.stderr


def assert_trained(status, report, stderr):
    """The job ran, every projection was fused, and its losses are PEFT's."""
    assert status == 0, stderr
    assert len(report["rows"]) == PROJECTIONS
    assert [row for row in report["rows"] if not row["fused"]] == []
    assert len(report["alone"]) == 3 and len(set(report["alone"])) == 3
    assert report["fused"] == pytest.approx(report["alone"], rel=0, abs=1e-5)


def assert_refused(result, error, *words):
    """Loading failed with `error`, whose message holds `words`, and left no module behind."""
    status, report, stderr = result
    assert status == 3, stderr
    assert report["error"] == error, report
    for word in words:
        assert word in report["message"], report
    assert report["left"] == []


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture(scope="module")
def refusing():
    """The address of a Hub that has gone away."""
    with HubServer(REPO_ID, BUILD) as hub:
        pass
    return hub.endpoint


@pytest.fixture(scope="module")
def from_hub(tmp_path_factory):
    """The training job with the kernel from the Hub: (hub, home, result)."""
    home = tmp_path_factory.mktemp("hub") / "home"
    with HubServer(REPO_ID, BUILD) as hub:
        yield hub, home, run(TRAIN, FROM_HUB, hub.endpoint, home)


def test_downloaded_kernel_trains_like_peft(from_hub):
    hub, home, result = from_hub
    assert_trained(*result)
    module = pathlib.Path(result[1]["file"])
    snapshots = home / "hub" / f"kernels--{REPO_ID.replace('/', '--')}" / "snapshots"
    assert module.is_relative_to(snapshots / hub.commit / "build")
    variant = f"build/{module.parent.name}/"
    assert hub.downloaded() == {path for path in hub.files if path.startswith(variant)}


def test_branch_can_be_named(home):
    """`revision="v1"` goes another way through the client than `version=1`."""
    with HubServer(REPO_ID, BUILD) as hub:
        loader = f"get_kernel({REPO_ID!r}, revision='v{VERSION}', trust_remote_code=True)"
        status, report, stderr = run(REPORT_FILE, loader, hub.endpoint, home)
    assert status == 0, stderr
    assert hub.commit in report["file"] and hub.downloaded()


@pytest.mark.parametrize(
    "loader, env",
    [
        (f"get_kernel({REPO_ID!r}, version={VERSION})", {"LOCAL_KERNELS": f"{REPO_ID}={BUILD}"}),
        (f"get_local_kernel(pathlib.Path({str(BUILD)!r}))", {}),
    ],
    ids=["LOCAL_KERNELS", "get_local_kernel"],
)
def test_local_build_maps_the_same(loader, env, refusing, home, from_hub):
    result = run(TRAIN, loader, refusing, home, **env)
    assert_trained(*result)
    assert pathlib.Path(result[1]["file"]).is_relative_to(BUILD)
    assert result[1]["rows"] == from_hub[2][1]["rows"]


def test_missing_variant(home):
    names = {path.name: FOREIGN_VARIANT for path in BUILD.iterdir() if path.is_dir()}
    with HubServer(REPO_ID, BUILD, rename=names) as hub:
        result = run(REPORT_FILE, FROM_HUB, hub.endpoint, home)
    assert_refused(
        result, "builtins.FileNotFoundError", "Cannot find a build variant for this system", REPO_ID, FOREIGN_VARIANT
    )
    assert hub.downloaded() == set()


@pytest.mark.parametrize(
    "how, error, words",
    [
        ("dropped", "httpx.RemoteProtocolError", ["without sending complete message body", "expected"]),
        ("short", "builtins.OSError", ["Consistency check failed", ".so"]),
    ],
)
def test_truncated_library(how, error, words, home):
    with HubServer(REPO_ID, BUILD, truncate=(".so", how)) as hub:
        assert_refused(run(REPORT_FILE, FROM_HUB, hub.endpoint, home), error, *words)
        hub.truncate = None
        status, report, stderr = run(REPORT_FILE, FROM_HUB, hub.endpoint, home)
    assert status == 0, stderr
    folder = pathlib.Path(report["file"]).parent
    for path in (BUILD / folder.name).rglob("*.so"):
        assert (folder / path.relative_to(BUILD / folder.name)).read_bytes() == path.read_bytes()


def test_refused_connection(refusing, home):
    assert_refused(run(REPORT_FILE, FROM_HUB, refusing, home), "httpx.ConnectError", "Connection refused")


def test_untrusted_publisher(home):
    """Without `trust_remote_code` nothing is downloaded from a publisher that the Hub doesn't vouch for."""
    with HubServer(REPO_ID, BUILD) as hub:
        result = run(REPORT_FILE, f"get_kernel({REPO_ID!r}, version={VERSION})", hub.endpoint, home)
    assert_refused(result, "builtins.ValueError", REPO_ID, "is not from a trusted publisher", "trust_remote_code")
    assert hub.downloaded() == set()
