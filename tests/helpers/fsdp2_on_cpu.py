"""Runs examples/train.py as accelerate's configuration file says, on CPUs too, where accelerate takes DDP instead.
Writes what was sharded to sharded0.txt and sharded1.txt, since both processes print to one pipe. Started by `accelerate
launch`."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import accelerate.state as state
import torch.distributed.fsdp as fsdp
from accelerate.utils import DistributedType

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
own_init, own_shard, sharded = state.AcceleratorState.__init__, fsdp.fully_shard, []


def init(self, *args, fsdp_plugin=None, **options):
    """Of accelerate's state, which on GPUs does this itself."""
    own_init(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        assert os.environ["ACCELERATE_USE_FSDP"] == "true"
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def shard(module, **options):
    sharded.append(type(module).__name__)
    return own_shard(module, **options)


state.AcceleratorState.__init__, fsdp.fully_shard = init, shard
sys.path.insert(0, str(EXAMPLES))
try:
    runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
finally:
    Path(f"sharded{os.environ['RANK']}.txt").write_text(" ".join(sorted(sharded)))
