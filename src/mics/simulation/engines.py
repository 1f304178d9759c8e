"""The engines that a step is simulated for, and what each sends when."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from mics import traffic
from mics.simulation.anatomy import Anatomy, Unit
from mics.simulation.compute import Times
from mics.simulation.hardware import Cluster
from mics.simulation.network import Stage, all_reduce_seconds, gather_stages
from mics.simulation.step import Schedule, Step, Sync, Work, simulate, straggling
from mics.topology import Topology
from mics.traffic import Form

Engine = Literal[
    "mics",
    "fsdp2",
    "hsdp every micro-step",
    "hsdp deferred",
    "ddp",
    "zero2",
    "zero3",
    "zero2 0.5.6",
    "zero3 0.5.6",
]


@dataclass(frozen=True)
class Profile:
    """How an engine runs a step.

    Args:
        about: one line.
        sharded: parameters are split over the partition ("partition"), all ranks ("world") or not.
        reduces: gradients are reduce-scattered every micro-step, over the same ranks.
        sync: hop 2.
        coalesced: a unit's parameters travel as one message.
        overlaps: hop 1 runs beside computation.
        host: seconds of the host per message, which hold up the GPU.
        two_stages: hierarchical collectives where a group spans nodes.
        at_end: parameters are gathered after the optimizer step.
    """

    about: str
    sharded: Literal["partition", "world", "no"]
    reduces: bool = True
    sync: Sync = "last"
    coalesced: bool = True
    overlaps: bool = True
    host: float = 0.0
    two_stages: bool = False
    at_end: bool = False


PROFILES: dict[Engine, Profile] = {
    "mics": Profile(
        "partition groups, the faster of flat and two stages, hop 2 once a step",
        "partition",
        two_stages=True,
    ),
    "fsdp2": Profile("FSDP2 full shard over all ranks", "world", sync="never"),
    "hsdp every micro-step": Profile(
        "FSDP2 HSDP, an all-reduce over the replicas every micro-step", "partition", sync="every"
    ),
    "hsdp deferred": Profile("FSDP2 HSDP, hop 2 once a step", "partition"),
    "ddp": Profile("DDP with no_sync, a whole replica on every rank", "no", reduces=False),
    "zero2": Profile(
        "DeepSpeed ZeRO-2: gradients reduced over all ranks every micro-step",
        "no",
        at_end=True,
        sync="never",
    ),
    "zero3": Profile("DeepSpeed ZeRO-3 of today", "world", sync="never"),
    "zero2 0.5.6": Profile(
        "DeepSpeed ZeRO-2 of 2021: nothing overlaps, messages in buckets",
        "no",
        at_end=True,
        sync="never",
        overlaps=False,
        host=0.3e-3,
    ),
    "zero3 0.5.6": Profile(
        "DeepSpeed ZeRO-3 of 2021: a message per parameter, nothing overlaps, each costs the host",
        "world",
        sync="never",
        coalesced=False,
        overlaps=False,
        host=0.3e-3,
    ),
}


@dataclass(frozen=True)
class Run:
    """What is common to all engines.

    Args:
        micro_steps: s.
        partition: p, of those that have one.
        compute_bytes: of a parameter on the wire.
        reduce_bytes: of a gradient on the wire in hop 1.
        sync_bytes: of a gradient on the wire in hop 2.
        slows: see ``Schedule``.
        sigma: see ``straggling``.
        prefetch: blocks gathered ahead, where the engine gathers ahead.
        form: "auto" takes the faster, for engines with two stages.
    """

    micro_steps: int
    partition: int
    compute_bytes: int = 2
    reduce_bytes: int = 4
    sync_bytes: int = 4
    slows: float = 0.02
    sigma: float = 0.0
    prefetch: int = 1
    form: Form | Literal["auto"] = "auto"


@dataclass(frozen=True)
class Simulated:
    """A step of one engine.

    Args:
        seconds: with stragglers.
        step: without.
        form: of the all-gather.
    """

    seconds: float
    step: Step
    form: Form


def simulate_engine(
    engine: Engine,
    anatomy: Anatomy,
    times: Times,
    cluster: Cluster,
    run: Run,
    *,
    timeline: bool = False,
) -> Simulated:
    """Simulate one step.

    Args:
        engine: which.
        anatomy: sizes of the model's units.
        times: of computation, on the cluster's GPU.
        cluster: nodes and links.
        run: micro-steps, partition and bytes.
        timeline: keep every span.
    """
    build = _Builder(engine, anatomy, cluster, run)
    profile, form, group = build.profile, build.form, build.group
    blocks = [
        build.work(unit, forward, backward)
        for unit, forward, backward in zip(
            anatomy.blocks, times.forward, times.backward, strict=True
        )
    ]
    root = build.work(anatomy.root, times.before, times.between + times.after)
    shard = sum(u.trained() for u in (*anatomy.blocks, anatomy.root)) // group
    schedule = Schedule(
        micro_steps=run.micro_steps,
        gathers=(profile.sharded != "no",) * 2,
        prefetch=run.prefetch if profile.overlaps else 0,
        in_flight=1 if profile.overlaps else 0,
        sync=profile.sync,
        pipelined=profile.two_stages,
        host=profile.host,
        messages=1 if profile.coalesced else _messages(anatomy),
        slows=run.slows,
        last=_optimizer_seconds(shard, cluster),
        gathered_at_end=build.at_end(),
    )
    step = simulate(blocks, root, schedule, timeline=timeline)
    late = straggling(run.sigma, group, cluster.gpus // group, run.micro_steps)
    return Simulated(step.seconds * late, step, form)


def inter_bytes(engine: Engine, anatomy: Anatomy, cluster: Cluster, run: Run) -> Fraction:
    """Bytes a node sends to others in a step; what ``traffic.py`` says, and the ledger counts."""
    return _Builder(engine, anatomy, cluster, run).inter_bytes()


def _messages(anatomy: Anatomy) -> int:
    return max(len(unit.parameters) for unit in anatomy.blocks)


def _optimizer_seconds(shard: int, cluster: Cluster) -> float:
    """AdamW on fp32: reads four numbers a parameter and writes three, at the memory's rate."""
    bandwidth = cluster.node.gpu.bandwidth
    return 0.0 if bandwidth is None else 28 * shard / (0.9 * bandwidth)


class _Builder:
    """Turns units into work."""

    def __init__(self, engine: Engine, anatomy: Anatomy, cluster: Cluster, run: Run) -> None:
        self.profile = PROFILES[engine]
        self._anatomy, self._cluster, self._run = anatomy, cluster, run
        world = cluster.gpus
        if self.profile.sharded == "no":  # gradients and optimizer states are, or nothing is
            self.group = world if self.profile.at_end else 1
        else:
            self.group = world if self.profile.sharded == "world" else run.partition
        self._known: dict[int, Work] = {}  # equal units are one object
        self.form: Form = self._choose()

    def work(self, unit: Unit, forward: float, backward: float) -> Work:
        """A unit's computation and collectives."""
        like = self._known.get(id(unit))
        if like is None:
            like = self._known[id(unit)] = self._collectives(unit)
        return Work(forward, backward, like.gather, like.reduce, like.sync)

    def at_end(self) -> tuple[Stage, ...]:
        """Of ZeRO-2: all parameters, once a step."""
        if not self.profile.at_end:
            return ()
        num_bytes = self._anatomy.num_parameters * self._run.compute_bytes
        return gather_stages(self._cluster.node, self.group, num_bytes)

    def inter_bytes(self) -> Fraction:
        """Bytes a node sends to others in a step (``traffic.py``)."""
        run, cluster, profile = self._run, self._cluster, self.profile
        blocks = [self._traffic(unit) for unit in self._anatomy.blocks]
        blocks.append(self._traffic(self._anatomy.root, gathers=1))
        k = cluster.node.gpus_per_node
        topology = Topology(cluster.nodes, k, self.group)
        return (
            traffic.node_inter_bytes(
                [
                    traffic.mics(
                        topology,
                        blocks,
                        run.micro_steps,
                        all_gather=self.form,
                        reduce_scatter=self.form,
                        hop_2_every_micro_step=profile.sync == "every",
                        rank=rank,
                    )
                    for rank in range(k)
                ]
            )
            + self._bytes_at_end()
        )

    def _bytes_at_end(self) -> Fraction:
        if not self.profile.at_end or self._cluster.nodes == 1:
            return Fraction(0)
        n = self.group
        return Fraction(self._anatomy.num_parameters * self._run.compute_bytes * (n - 1), n)

    def _traffic(self, unit: Unit, gathers: int = 2) -> traffic.Block:
        run, n = self._run, self.group
        gathered = gathers if self.profile.sharded != "no" else 0
        return traffic.Block(
            gather_bytes=unit.numel(n) * run.compute_bytes,
            reduce_bytes=unit.trained(n) * run.reduce_bytes,
            sync_bytes=unit.trained(n) // n * run.sync_bytes,
            gathers=gathered,
            reduces=1 if unit.trained() else 0,
        )

    def _collectives(self, unit: Unit) -> Work:
        profile, run, n = self.profile, self._run, self.group
        gather: tuple[Stage, ...] = ()
        if profile.sharded != "no":
            gather = self._stages([q.padded(n) * run.compute_bytes for q in unit.parameters])
        reduce: tuple[Stage, ...] = ()
        if profile.reduces:
            trained = [q for q in unit.parameters if q.trained]
            reduce = self._stages([q.padded(n) * run.reduce_bytes for q in trained])[::-1]
        return Work(0.0, 0.0, gather, reduce, self._sync(unit))

    def _stages(self, messages: list[int]) -> tuple[Stage, ...]:
        """One message, or one after the other where they are not coalesced."""
        node, n = self._cluster.node, self.group
        if self.profile.coalesced:
            return gather_stages(node, n, sum(messages), self.form)
        each = [gather_stages(node, n, num_bytes, self.form) for num_bytes in messages]
        return tuple(
            Stage(parts[0].link, sum(part.seconds for part in parts))
            for parts in zip(*each, strict=True)
        )

    def _sync(self, unit: Unit) -> tuple[Stage, ...]:
        cluster, n = self._cluster, self.group
        k = cluster.node.gpus_per_node
        replicas = cluster.gpus // n
        if self.profile.sync == "never" or replicas == 1:
            return ()
        nodes = replicas if n >= k else cluster.nodes
        num_bytes = unit.trained(n) // n * self._run.sync_bytes
        seconds = all_reduce_seconds(cluster.node, replicas, nodes, num_bytes, sharing=min(n, k))
        return (Stage("inter" if nodes > 1 else "intra", seconds),)

    def _choose(self) -> Form:
        """The faster form for the largest block; flat where there is one stage."""
        run, node = self._run, self._cluster.node
        if not self.profile.two_stages or self.group <= node.gpus_per_node:
            return "flat"
        if run.form != "auto":
            return run.form
        largest = max(unit.numel(self.group) for unit in self._anatomy.blocks)

        def seconds(form: Form) -> float:
            stages = gather_stages(node, self.group, largest * run.compute_bytes, form)
            return max(stage.seconds for stage in stages)  # stages run beside each other

        return "hierarchical" if seconds("hierarchical") < seconds("flat") else "flat"
