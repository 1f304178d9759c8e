"""The same training by different engines, each as its own users write it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.nn.parallel import DistributedDataParallel

from mics.communication.forms import Collectives
from mics.sharding.micro_steps import micro_steps
from mics.sharding.shard import shard

Name = Literal[
    "mics",
    "mics p=1",
    "fsdp2",
    "hsdp every micro-step",
    "hsdp deferred",
    "ddp",
    "computation",
    "zero2",
    "zero3",
    "hpz",
    "deepspeed mics",
]
"""The last four are DeepSpeed's and run in ``children.py``."""

NAMES: dict[Name, str] = {
    "mics": "mics: partition groups, two stages where they span nodes, hop 2 once a step",
    "mics p=1": "mics with a whole replica on every rank, what it chooses where that fits",
    "fsdp2": "FSDP2 full shard over all ranks",
    "hsdp every micro-step": "FSDP2 HSDP, an all-reduce over the replicas every micro-step",
    "hsdp deferred": "FSDP2 HSDP, the all-reduce on the last micro-step only",
    "ddp": "DDP, the all-reduce on the last micro-step only (no_sync)",
    "computation": "forward and backward of every micro-step and nothing else: a floor, no engine",
}


class Work(Protocol):
    """What an engine trains: the same weights and batches every time."""

    def model(self) -> Any:
        """A model on the CPU."""

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Its repeated blocks, in the order they run."""

    def batches(self, rank: int, step: int) -> list[Any]:
        """One per micro-step, of one rank."""

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        """The mean over one micro-batch."""


class Engine:
    """A model under one engine, and its optimizer step.

    Args:
        name: which engine.
        work: what it trains.
        partition: p, for those that have one.
        gpus_per_node: k.
        collectives: for mics.
        overlap: for mics.
    """

    def __init__(
        self,
        name: Name,
        work: Work,
        *,
        partition: int,
        gpus_per_node: int,
        collectives: Collectives = "auto",
        overlap: bool = True,
    ) -> None:
        self.name = name
        self._work = work
        self.model = _parallel(name, work, partition, gpus_per_node, collectives, overlap)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self._step = 0

    def step(self) -> float:
        """One optimizer step; returns the mean loss of all ranks and micro-steps."""
        batches = self._work.batches(dist.get_rank(), self._step)
        total = torch.zeros(())
        for batch, scale, context in self._micro_steps(batches):
            with context():
                loss = self._work.loss(self.model, batch)
                (loss * scale).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if self.name != "computation":
            self._optimizer.step()
        self._optimizer.zero_grad()
        self._step += 1
        dist.all_reduce(total)
        return float(total) / len(batches) / dist.get_world_size()

    def _micro_steps(self, batches: list[Any]) -> Iterator[tuple[Any, float, Callable[[], Any]]]:
        """Every micro-batch, what its loss is multiplied with, and the context it runs in."""
        none = contextlib.nullcontext
        if self.name in ("mics", "mics p=1"):
            for batch in micro_steps(self.model, batches, normalise="micro_steps"):
                yield batch, 1.0, none
            return
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            context: Callable[[], Any] = none
            if self.name == "hsdp deferred":
                self.model.set_requires_all_reduce(last)
            if self.name == "ddp" and not last:
                context = self.model.no_sync
            yield batch, 1.0 / len(batches), context


def _parallel(
    name: Name,
    work: Work,
    partition: int,
    gpus_per_node: int,
    collectives: Collectives,
    overlap: bool,
) -> Any:
    model = work.model()
    if name == "computation":
        return model
    if name == "ddp":
        return DistributedDataParallel(model)
    world = dist.get_world_size()
    if name in ("mics", "mics p=1"):
        return shard(
            model,
            partition=partition if name == "mics" else 1,
            gpus_per_node=gpus_per_node,
            blocks=work.blocks(model),
            mp_policy=MixedPrecisionPolicy(),
            collectives=collectives,
            overlap=overlap,
        )
    if name == "fsdp2":
        return _sharded(work, model, init_device_mesh("cpu", (world,)))
    shape, axes = (world // partition, partition), ("replicate", "shard")
    return _sharded(work, model, init_device_mesh("cpu", shape, mesh_dim_names=axes))


def _sharded(work: Work, model: nn.Module, mesh: DeviceMesh) -> Any:
    for block in work.blocks(model):
        torch_fully_shard(block, mesh=mesh)
    return torch_fully_shard(model, mesh=mesh)
