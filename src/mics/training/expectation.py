"""What a run is expected to need: the partition when nobody names one, memory, a step's time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist

from mics.anatomy.anatomy import Anatomy
from mics.anatomy.flops import model_flops
from mics.anatomy.recipe import ON_GPUS, ON_HOSTS, Machine, Recipe
from mics.errors import PlanError
from mics.hardware.cluster import Cluster, Gpu, Link, Node
from mics.hardware.lookup import find_node
from mics.planning.figures import Figures, figures_of
from mics.planning.plan import Plan, search
from mics.planning.question import Question
from mics.planning.reasons import explained
from mics.planning.weighing import needed_by, simulate_recipe
from mics.quantities import GIB
from mics.ranks.console import say
from mics.ranks.device import on_accelerator
from mics.ranks.issuing import all_reduce
from mics.ranks.launcher import read_launch
from mics.sharding.partition import PartitionChoice, choose_partition, device_memory
from mics.traffic import Form
from mics.training import optimisation
from mics.training.batching import Batching
from mics.training.config import TrainConfig

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


def question_of(config: TrainConfig, batch: Batching, sequence: int) -> Question:
    """Ask the planner what a run, or a dry run of it, asks.

    Both forms are tried where the run will measure which is faster.

    Args:
        config: of the run.
        batch: sequences of a step.
        sequence: tokens of a sequence.
    """
    options = config.parallel
    forms: dict[str, tuple[Form, ...]] = {
        "auto": ("flat", "hierarchical"),
        "flat": ("flat",),
        "hierarchical": ("hierarchical",),
    }
    recipe = Recipe(
        1,
        micro_steps=batch.micro_steps,
        sequence=sequence,
        compute_bytes=compute_dtype(config).itemsize,
        optimizer=optimisation.MEMORY,
        stack="fused" if options.compile else "eager",
        # What "auto" may choose that takes most memory: errors are fed back.
        hop_two="fp8" if options.hop_two == "auto" else options.hop_two,
        hop_two_form=options.collectives,
        error_feedback=options.error_feedback,
        dealt_states=options.dealt_states,
    )
    return Question(
        recipe,
        micro_batches=(batch.micro_batch,),
        partitions=None if options.partition == "auto" else (options.partition,),
        checkpointing=(options.activation_checkpointing,),
        offload=_offload(config),
        forms=forms[options.collectives],
    )


def _offload(config: TrainConfig) -> tuple[bool, ...]:
    """Which offloads a run may have; both where the times of its nodes are known."""
    asked = config.parallel.activation_offload
    if asked != "auto":
        return (asked == "on",)
    return (False, True) if config.parallel.node is not None else (False,)


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype that a run computes in."""
    return torch.bfloat16 if config.parallel.dtype == "bf16" else torch.float32


def cluster_of(
    config: TrainConfig, ranks: int, gpus_per_node: int, machine: Machine = ON_GPUS
) -> Cluster:
    """Describe where a run trains: the node it names with its own number of GPUs, or one unknown.

    Raises:
        PlanError: ``parallel.node`` names no node of the catalogue.
    """
    if config.parallel.node is not None:
        node = replace(find_node(config.parallel.node), gpus_per_node=gpus_per_node)
    else:
        gpu = Gpu("this device", float(GIB), 1.0, None)
        node = Node("here", gpu, gpus_per_node, _NOWHERE, _NOWHERE)
    return Cluster(replace(node, machine=machine), max(ranks // gpus_per_node, 1))


def recipes_of(question: Question, cluster: Cluster, partition: int, offload: bool) -> list[Recipe]:
    """List how a run may run with a partition: one recipe, or two if it measures the forms."""
    asked = replace(question, partitions=(partition,), offload=(False,))
    return [replace(recipe, offload=offload) for recipe in asked.recipes(cluster)]


def fastest(anatomy: Anatomy, cluster: Cluster, question: Question) -> Plan | None:
    """Find the best plan a run may follow, with its reason; ``None`` where none fits."""
    return next(iter(explained(search(anatomy, cluster, question))), None)


@dataclass(frozen=True)
class Choice:
    """How a run runs: its partition, or "auto", and whether its activations leave the device."""

    partition: int | Literal["auto"] | PartitionChoice
    offload: bool


@dataclass(frozen=True)
class Forecast:
    """The planner's view of a run, the same on every rank; ``forecast`` makes it.

    Args:
        anatomy: of the model.
        cluster: the run's.
        question: the run's.
        device: of the ranks.
        ranks_per_host: that share a host's memory.
        timed: a node was named, whose times are known.
        traced: the model runs without values.
    """

    anatomy: Anatomy
    cluster: Cluster
    question: Question
    device: torch.device
    ranks_per_host: int
    timed: bool
    traced: bool

    def choose(self, asked: int | Literal["auto"] = "auto") -> Choice:
        """Choose the smallest partition whose memory is there; the fastest, where times are known.

        Collective. Where nothing but a partition is asked for, that is taken.

        Args:
            asked: the partition that is asked for.

        Returns:
            Partition "auto" for a model that cannot be traced, which leaves it to ``mics.shard``.

        Raises:
            ShardError: none fits.
        """
        least = min(self.question.offload)
        decided = asked != "auto" and len(set(self.question.offload)) == 1
        if decided or not self.traced:
            return Choice(asked, least)
        memory = torch.tensor(device_memory(self.device, self.ranks_per_host), device=self.device)
        all_reduce(memory, dist.ReduceOp.MIN)
        if self.timed:
            node = self.cluster.node
            there = replace(node, gpu=replace(node.gpu, memory=float(memory)))
            best = fastest(self.anatomy, replace(self.cluster, node=there), self.question)
            if best is not None:
                if best.way.offload:
                    say("activations leave for the host, as the fastest plan that fits has it")
                chosen = PartitionChoice(best.way.partition, best.reason)
                return Choice(chosen if asked == "auto" else asked, best.way.offload)
        if asked != "auto":
            return Choice(asked, least)
        smallest = choose_partition(
            lambda p: self._needed(p, least),
            int(memory),
            nodes=self.cluster.nodes,
            gpus_per_node=self.cluster.node.gpus_per_node,
        )
        return Choice(smallest, least)

    def on(self, ranks: int, micro_steps: int) -> Forecast:
        """The same run while only so many ranks are there, each with so many micro-steps."""
        nodes = max(ranks // self.cluster.node.gpus_per_node, 1)
        recipe = replace(self.question.recipe, micro_steps=micro_steps)
        return replace(
            self,
            cluster=replace(self.cluster, nodes=nodes),
            question=replace(self.question, recipe=recipe),
        )

    def expect(self, partition: int, offload: bool) -> Expectation:
        """Predict memory, of the form that needs more, and time, of the faster form.

        The time is not known where activations leave over a link that nobody knows.
        """
        if not self.traced:
            return Expectation(None, None, None)
        seconds = None
        if self.timed and not (offload and self.cluster.node.host is None):
            seconds = min(
                simulate_recipe("mics", self.anatomy, self.cluster, recipe).seconds
                for recipe in recipes_of(self.question, self.cluster, partition, offload)
            )
        trace = self.anatomy.trace(self.question.micro_batches[0], self.question.recipe.sequence)
        return Expectation(self._needed(partition, offload), seconds, model_flops(trace))

    def planned(self, partition: int, offload: bool) -> Figures | None:
        """Say how a step is run and what it needs of a GPU, as a plan and a dry run do.

        Ranks on CPUs stand for GPUs here. ``None`` for a model that cannot be traced.
        """
        if not self.traced:
            return None
        on_gpus = replace(self.cluster, node=replace(self.cluster.node, machine=ON_GPUS))
        recipes = recipes_of(self.question, on_gpus, partition, offload)
        return figures_of(self.anatomy, on_gpus, recipes)

    def _needed(self, partition: int, offload: bool) -> int:
        leaves = offload and on_accelerator(self.device)  # else it leaves for the same memory
        recipes = recipes_of(self.question, self.cluster, partition, leaves)
        return round(max(needed_by(self.anatomy, self.cluster, recipe) for recipe in recipes))


def forecast(
    config: TrainConfig, anatomy: Anatomy, batch: Batching, sequence: int, device: torch.device
) -> Forecast:
    """Look at a run as the planner does.

    Args:
        config: of the run.
        anatomy: of the model, in the dtype that is computed in.
        batch: sequences of a step.
        sequence: tokens of a sequence.
        device: of the ranks.

    Raises:
        PlanError: ``parallel.node`` names no node of the catalogue.
    """
    launch = read_launch()
    per_host = launch.ranks_per_node if launch else batch.ranks
    machine = ON_GPUS if on_accelerator(device) else ON_HOSTS
    k = config.parallel.gpus_per_node or per_host
    return Forecast(
        anatomy,
        cluster_of(config, batch.ranks, k, machine),
        question_of(config, batch, sequence),
        device,
        per_host,
        timed=config.parallel.node is not None,
        traced=_runs_without_values(anatomy, batch.micro_batch, sequence),
    )


def _runs_without_values(anatomy: Anatomy, micro_batch: int, sequence: int) -> bool:
    """Try to trace the model; one whose path depends on values cannot be."""
    try:
        anatomy.trace(micro_batch, sequence)
    except PlanError as error:
        say(f"memory is not predicted: {error}")
        return False
    return True
