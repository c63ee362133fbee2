"""Two processes that train together, sharded or not, and what they do with a case."""

from __future__ import annotations

import faulthandler
import functools
import os
import pathlib
import socket
import traceback
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from kernels import get_local_kernel
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

WORLD, STEPS, LONGEST = 2, 3, 240
FLAT = "fsdp1, flat parameters"  # as PEFT's documentation sets it up: each matrix of an adapter is wrapped by itself


def wrapped(model, wrapper: str, bf16: bool):
    if wrapper == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if wrapper in ("fsdp1", FLAT):
        whole_layers = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=fsdp_auto_wrap_policy(model) if wrapper == FLAT else whole_layers,
            use_orig_params=wrapper != FLAT,
            mixed_precision=MixedPrecision(param_dtype=torch.bfloat16) if bf16 else None,
            device_id=torch.device("cpu"),
        )
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def trained(model, case, rank: int, fuse):
    """Losses of some steps; the model is kernelized by `fuse`, before it is wrapped, or what it is wrapped in after."""
    if case.before:
        fuse(model)
    outer = wrapped(model, case.wrapper, case.bf16)
    if not case.before:
        fuse(outer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(10 * step + rank)
        ids = torch.randint(0, 64, (2, 7))
        loss = outer(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def count_computations(lora_fused) -> dict:
    """How often each of the fused computations runs, from now on."""
    dispatch, counts = lora_fused.functional.dispatch, {}
    for name in ("compute_group", "compute_gated"):
        own = getattr(dispatch, name)

        def counted(*args, own=own, name=name, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return own(*args, **kwargs)

        setattr(dispatch, name, counted)
    return counts


def serve(rank: int, build: pathlib.Path, port: int, cases, compare):
    """A process of the pair: compares each case that it is sent and sends back what went wrong, or None."""
    faulthandler.enable()  # a signal that ends the process says where
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "LlamaDecoderLayer"  # of PEFT's policy
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    lora_fused = get_local_kernel(build)
    small_batch = lora_fused.peft.small_batch
    small_batch.SMALL_ROWS = small_batch.FEW_TRACED_ROWS = -1  # as conftest.py has it
    counts = count_computations(lora_fused)
    while (case := cases.recv()) is not None:
        try:
            compare(lora_fused, counts, case, rank)
            cases.send(None)
        except Exception:
            cases.send(traceback.format_exc())
    dist.destroy_process_group()


class Pair:
    """Two processes that train together; after a failure the next case has new ones, since one may wait for the
    other."""

    def __init__(self, build: pathlib.Path, compare):
        self.build, self.compare, self.running = build, compare, []

    def start(self):
        context = processes.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, self.build, port, theirs, self.compare), daemon=True)
            # The pair trains on the CPU. With a GPU in sight torch 2.11 ends a process with a segmentation fault when
            # PEFT merges an FSDP2 shard (`wait_tensor` of a gather by gloo).
            with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
                process.start()
            theirs.close()
            self.running.append((process, ours))

    def run(self, case):
        if not self.running:
            self.start()
        for _, cases in self.running:
            cases.send(case)
        for rank, (process, cases) in enumerate(self.running):
            try:
                error = cases.recv() if cases.poll(LONGEST) else f"no answer within {LONGEST} s"
            except EOFError:
                process.join(LONGEST)
                error = f"ended without an answer, exit code {process.exitcode}"
            if error is not None:
                self.stop(kill=True)
                pytest.fail(f"process {rank}: {error}", pytrace=False)

    def stop(self, kill=False):
        for process, cases in self.running:
            process.kill() if kill else cases.send(None)
        for process, _ in self.running:
            process.join(LONGEST)
        self.running = []
