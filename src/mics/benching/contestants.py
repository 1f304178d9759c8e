"""The same training by different engines, each as its own users write it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.nn.parallel import DistributedDataParallel

from mics.benching.options import Name
from mics.communication.fewer_bits import HopTwoBits
from mics.communication.forms import Collectives
from mics.sharding.micro_steps import micro_steps
from mics.sharding.owned import owned
from mics.sharding.shard import shard


class Training(Protocol):
    """What all contestants train: the same weights and batches every time."""

    def model(self) -> Any:
        """A model on the CPU."""

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Its repeated blocks, in the order they run."""

    def batches(self, rank: int, step: int) -> list[Any]:
        """The batches of one rank, one per micro-step."""

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        """The mean over one micro-batch."""


@dataclass(frozen=True)
class Layout:
    """How ranks are to be used by the engines that can choose.

    Args:
        partition: ranks of a partition group, for mics and HSDP.
        gpus_per_node: ranks that are joined by the fast link.
        collectives: the form of mics' collectives.
        overlap: whether mics communicates beside computation.
    """

    partition: int
    gpus_per_node: int
    collectives: Collectives = "auto"
    overlap: bool = True


class Contestant:
    """A model under one engine, and its optimizer step.

    Args:
        name: which engine.
        training: what it trains.
        layout: how the ranks are used.
    """

    def __init__(self, name: Name, training: Training, layout: Layout) -> None:
        self.name = name
        self._training = training
        self._engine = _ENGINES[name]
        self.model = self._engine.parallel(training, layout)
        # One kernel for every engine, as in the trainer: what is compared is not the loop of an
        # optimizer over its tensors.
        stepped = self._engine.stepped(self.model)
        self._optimizer = torch.optim.AdamW(stepped, lr=1e-3, fused=True)
        self._step = 0

    def step(self) -> float:
        """One optimizer step; returns the mean loss of all ranks and micro-steps."""
        batches = self._training.batches(dist.get_rank(), self._step)
        total = torch.zeros(())
        for batch, scale, context in self._engine.micro_steps(self.model, batches):
            with context():
                loss = self._training.loss(self.model, batch)
                (loss * scale).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if self._engine.optimizes:
            self._optimizer.step()
        self._optimizer.zero_grad()
        self._step += 1
        dist.all_reduce(total)
        return float(total) / len(batches) / dist.get_world_size()

    def land(self) -> None:
        """See ``side_by_side.Stepping``."""
        self._engine.land(self.model)


# -- how a model is made parallel ------------------------------------------------------------------


def _alone(training: Training, layout: Layout) -> Any:
    return training.model()


def _ddp(training: Training, layout: Layout) -> Any:
    return DistributedDataParallel(training.model())


def _mics(
    training: Training,
    layout: Layout,
    *,
    partition: int | None = None,
    hop_two: HopTwoBits | None = None,
) -> Any:
    model = training.model()
    return shard(
        model,
        partition=partition or layout.partition,
        gpus_per_node=layout.gpus_per_node,
        blocks=training.blocks(model),
        mp_policy=MixedPrecisionPolicy(),
        collectives=layout.collectives,
        overlap=layout.overlap,
        hop_two=hop_two,
    )


def _fsdp2(training: Training, layout: Layout) -> Any:
    return _fully_sharded(training, init_device_mesh("cpu", (dist.get_world_size(),)))


def _hsdp(training: Training, layout: Layout) -> Any:
    shape = (dist.get_world_size() // layout.partition, layout.partition)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    return _fully_sharded(training, mesh)


def _fully_sharded(training: Training, mesh: DeviceMesh) -> Any:
    model = training.model()
    for block in training.blocks(model):
        torch_fully_shard(block, mesh=mesh)
    return torch_fully_shard(model, mesh=mesh)


# -- how its micro-steps are run -------------------------------------------------------------------

MicroSteps = Iterator[tuple[Any, float, Callable[[], Any]]]
"""Every micro-batch, what its loss is multiplied with, and the context it runs in."""


def _of_mics(model: Any, batches: list[Any]) -> MicroSteps:
    for batch in micro_steps(model, batches, normalise="micro_steps"):
        yield batch, 1.0, contextlib.nullcontext


def _of_a_loop(model: Any, batches: list[Any]) -> MicroSteps:
    for batch in batches:
        yield batch, 1.0 / len(batches), contextlib.nullcontext


def _with_the_all_reduce_last(model: Any, batches: list[Any]) -> MicroSteps:
    for index, batch in enumerate(batches):
        model.set_requires_all_reduce(index == len(batches) - 1)
        yield batch, 1.0 / len(batches), contextlib.nullcontext


def _with_no_sync(model: Any, batches: list[Any]) -> MicroSteps:
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        yield batch, 1.0 / len(batches), contextlib.nullcontext if last else model.no_sync


# -- the engines -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _InProcess:
    """One engine of this process.

    Args:
        parallel: makes the model parallel.
        micro_steps: runs the micro-steps of a step.
        optimizes: whether a step ends with the optimizer's.
        stepped: what of the model the optimizer steps.
        land: waits for what an optimizer's step has begun to send.
    """

    parallel: Callable[[Training, Layout], Any]
    micro_steps: Callable[[Any, list[Any]], MicroSteps]
    optimizes: bool = True
    stepped: Callable[[Any], Iterable[nn.Parameter]] = nn.Module.parameters
    land: Callable[[Any], object] = lambda model: None


_ENGINES: dict[Name, _InProcess] = {
    # Partition groups, hierarchical where they span nodes, hop 2 once a step.
    "mics": _InProcess(_mics, _of_mics),
    # A whole replica on every rank, what mics chooses where that fits.
    "mics p=1": _InProcess(partial(_mics, partition=1), _of_mics),
    # What replicas exchange in fewer bits, with error feedback where it has 8.
    "mics bf16": _InProcess(partial(_mics, hop_two="bf16"), _of_mics),
    "mics fp8": _InProcess(partial(_mics, hop_two="fp8"), _of_mics),
    "mics int8": _InProcess(partial(_mics, hop_two="int8"), _of_mics),
    # Optimizer states once in all replicas.
    "mics owned": _InProcess(_mics, _of_mics, stepped=owned, land=nn.Module.state_dict),
    "fsdp2": _InProcess(_fsdp2, _of_a_loop),
    "hsdp every micro-step": _InProcess(_hsdp, _of_a_loop),
    "hsdp deferred": _InProcess(_hsdp, _with_the_all_reduce_last),
    "ddp": _InProcess(_ddp, _with_no_sync),
    # Forward and backward of every micro-step and nothing else: a floor, no engine.
    "computation": _InProcess(_alone, _of_a_loop, optimizes=False),
}
