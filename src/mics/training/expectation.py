"""What a run is expected to need: the partition when nobody names one, memory, a step's time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from mics.anatomy.anatomy import Anatomy
from mics.anatomy.flops import model_flops
from mics.errors import PlanError
from mics.hardware.cluster import Cluster, Gpu, Link, Node
from mics.hardware.lookup import find_node
from mics.planning.plan import GIB, Plan, Search, Way, needed_by, search, simulate_way, with_reason
from mics.planning.question import Question
from mics.planning.reasons import explain
from mics.planning.subject import subject
from mics.ranks.console import say
from mics.ranks.device import on_accelerator
from mics.ranks.launcher import read_launch
from mics.sharding.partition import PartitionChoice, choose_partition, device_memory
from mics.traffic import Form
from mics.training import optimisation
from mics.training.config import TrainConfig

Collectives = Literal["auto", "flat", "hierarchical"]

_NOWHERE = Link(1.0, 0.0)


@dataclass(frozen=True)
class Expectation:
    """Predictions for the chosen partition.

    Args:
        memory_bytes: of a rank, at most; ``None`` for a model that cannot be traced.
        step_seconds: ``None`` then too, and where no node was named that it could be predicted for.
        model_flops: of a rank and micro-step (``anatomy.flops``); ``None`` for a model that cannot
            be traced.
    """

    memory_bytes: int | None
    step_seconds: float | None
    model_flops: int | None


def forms_of(partition: int, k: int, collectives: Collectives) -> tuple[Form, ...]:
    """Forms that a run's gathers may have: both, where it measures which is faster."""
    if partition <= k or k == 1:
        return ("flat",)
    return ("flat", "hierarchical") if collectives == "auto" else (collectives,)


def fastest(
    anatomy: Anatomy, cluster: Cluster, question: Question, collectives: Collectives
) -> Plan | None:
    """The best plan of those a run may follow, with its reason; ``None`` where none fits.

    Args:
        anatomy: of the model.
        cluster: the run's.
        question: its micro-batch, micro-steps and checkpointing.
        collectives: its option.
    """
    found, k = search(anatomy, cluster, question), cluster.node.gpus_per_node
    possible = [p for p in found.plans if p.way.form in forms_of(p.way.partition, k, collectives)]
    if not possible:
        return None
    reason = explain(possible[0], Search(tuple(possible), found.rejected))
    return with_reason(possible[0], reason)


class Forecast:
    """The planner's view of a run. Says the same on every rank.

    Args:
        config: of the run.
        shape: of the model.
        micro_batch: sequences of a rank and micro-step.
        micro_steps: of a step.
        sequence: tokens of a sequence.
        device: of the ranks.

    Raises:
        PlanError: ``parallel.node`` names no node of the catalogue.
    """

    def __init__(
        self,
        config: TrainConfig,
        shape: PretrainedConfig,
        *,
        micro_batch: int,
        micro_steps: int,
        sequence: int,
        device: torch.device,
    ) -> None:
        world = dist.get_world_size()
        launch = read_launch()
        per_host = launch.ranks_per_node if launch else world
        self._k = config.parallel.gpus_per_node or per_host
        self._per_host, self._device, self._named = per_host, device, config.parallel.node
        self._collectives = config.parallel.collectives
        self._checkpointing = config.parallel.activation_checkpointing
        self._micro_batch, self._micro_steps = micro_batch, micro_steps
        self._bytes = 2 if config.parallel.dtype == "bf16" else 4
        dtype = torch.bfloat16 if self._bytes == 2 else torch.float32
        self._anatomy: Anatomy = subject(shape, dtype=dtype)
        on_gpu = on_accelerator(device)
        self._question = Question(
            sequence,
            micro_steps=micro_steps,
            optimizer=optimisation.MEMORY,
            compute_bytes=self._bytes,
            reductions=1 if on_gpu else 2,
            runtime_gib=0.8 if on_gpu else 0.0,
            communicator_gib=0.35 if on_gpu else 0.0,
            stack="fused" if config.parallel.compile else "eager",
        )
        self._nodes = max(world // self._k, 1)
        self._node = self._described()
        self._traced = self._try_trace()

    def choose(self) -> PartitionChoice | Literal["auto"]:
        """The smallest partition whose memory is there; the fastest, where times are known.

        Collective.

        Returns:
            "auto" for a model that cannot be traced, which leaves the choice to ``mics.shard``.

        Raises:
            ShardError: none fits.
        """
        if not self._traced:
            return "auto"
        memory = torch.tensor(device_memory(self._device, self._per_host), device=self._device)
        dist.all_reduce(memory, dist.ReduceOp.MIN)
        fastest = self._fastest(int(memory)) if self._named is not None else None
        return fastest or choose_partition(
            self._need(), int(memory), nodes=self._nodes, gpus_per_node=self._k
        )

    def expect(self, partition: int) -> Expectation:
        """Memory and time with a partition."""
        if not self._traced:
            return Expectation(None, None, None)
        seconds = None
        if self._named is not None:
            seconds = min(map(self._seconds, self._ways(partition)))
        trace = self._anatomy.trace(self._micro_batch, self._question.sequence)
        return Expectation(self._need()(partition), seconds, model_flops(trace))

    def _fastest(self, memory: int) -> PartitionChoice | None:
        """The best plan on the nodes that were named, with the memory that is there."""
        node = replace(self._node, gpu=replace(self._node.gpu, memory=float(memory)))
        where = Cluster(node, self._nodes)
        question = replace(
            self._question,
            micro_batches=(self._micro_batch,),
            checkpointing=(self._checkpointing,),
        )
        best = fastest(self._anatomy, where, question, self._collectives)
        return None if best is None else PartitionChoice(best.way.partition, best.reason)

    def _try_trace(self) -> bool:
        """Whether the model runs without values; one whose path depends on them does not."""
        try:
            self._anatomy.trace(self._micro_batch, self._question.sequence)
        except PlanError as error:
            say(f"memory is not predicted: {error}")
            return False
        return True

    def _need(self) -> Callable[[int], int]:
        def need(partition: int) -> int:
            where, asked = self._cluster(), self._question
            ways = self._ways(partition)
            return round(max(needed_by(self._anatomy, where, asked, way) for way in ways))

        return need

    def _seconds(self, way: Way) -> float:
        return simulate_way("mics", self._anatomy, self._cluster(), self._question, way).seconds

    def _ways(self, partition: int) -> list[Way]:
        """One, or two where the run will measure which form of its collectives is faster."""
        rest = (self._micro_batch, self._micro_steps, self._checkpointing)
        forms = forms_of(partition, self._k, self._collectives)
        return [Way(partition, *rest, form) for form in forms]

    def _cluster(self) -> Cluster:
        return Cluster(self._node, self._nodes)

    def _described(self) -> Node:
        """What ``parallel.node`` names, with as many GPUs as a node of this run has."""
        if self._named is not None:
            return replace(find_node(self._named), gpus_per_node=self._k)
        gpu = Gpu("this device", float(GIB), 1.0, None)
        return Node("here", gpu, self._k, _NOWHERE, _NOWHERE)
