"""A step of any engine: its units as computation and collectives, and the bytes they send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from mics import traffic
from mics.anatomy.anatomy import Anatomy, Parameter, Unit
from mics.anatomy.memory import OPTIMIZERS
from mics.hardware.cluster import Cluster
from mics.hardware.network import Stage, all_reduce_seconds, gather_stages
from mics.simulation.compute import Times
from mics.simulation.profiles import PROFILES, Engine
from mics.simulation.step import Schedule, Step, Work, simulate, straggling
from mics.traffic import Form


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
        pipelined: a gather's stage between nodes runs beside the stage inside nodes of the one
            before: what mics does on the CPU, and not on GPUs.
        optimizer: one of ``memory.OPTIMIZERS``.
        host: seconds of the host per message, where they are not the profile's.
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
    pipelined: bool = False
    optimizer: str = "adamw-fused"
    host: float | None = None


@dataclass(frozen=True)
class Simulated:
    """A step of one engine.

    Args:
        step: what came out.
        form: of the all-gather.
    """

    step: Step
    form: Form

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.step.seconds


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
    *blocks, root = build.works(times)
    shard = sum(u.trained() for u in (*anatomy.blocks, anatomy.root)) // group
    schedule = Schedule(
        micro_steps=run.micro_steps,
        gathers=(profile.sharded != "no",) * 2,
        prefetch=run.prefetch if profile.overlaps else 0,
        in_flight=1 if profile.overlaps else 0,
        sync=profile.sync,
        pipelined=run.pipelined,
        host=profile.host if run.host is None else run.host,
        messages=1 if profile.coalesced else build.messages,
        slows=run.slows,
        last=_optimizer_seconds(shard, cluster, run.optimizer),
        gathered_at_end=build.at_end(),
    )
    step = simulate(blocks, root, schedule, timeline=timeline)
    alone = 1 if profile.sync == "every" else run.micro_steps
    late = step.seconds * (straggling(run.sigma, group, cluster.gpus // group, alone) - 1)
    return Simulated(replace(step, seconds=step.seconds + late, late=late), form)


def inter_bytes(engine: Engine, anatomy: Anatomy, cluster: Cluster, run: Run) -> Fraction:
    """Bytes a node sends to others in a step; what ``traffic.py`` says, and the ledger counts."""
    return _Builder(engine, anatomy, cluster, run).inter_bytes()


def _optimizer_seconds(shard: int, cluster: Cluster, optimizer: str) -> float:
    """Its figures through the GPU's memory, once."""
    bandwidth = cluster.node.gpu.bandwidth
    moved = OPTIMIZERS[optimizer].moved_bytes * shard
    return 0.0 if bandwidth is None else moved / (0.9 * bandwidth)


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

    @property
    def messages(self) -> int:
        """Of the gather of the block with most parameters."""
        return max(len(self._gathered(unit)) for unit in self._anatomy.blocks)

    def works(self, times: Times) -> list[Work]:
        """Computation and collectives of every block, and of the root, which comes last."""
        root = (times.before, times.between + times.after)
        spent = [*zip(times.forward, times.backward, strict=True), root]
        units = [*self._anatomy.blocks, self._anatomy.root]
        works = [self._work(unit, *each) for unit, each in zip(units, spent, strict=True)]
        return self._in_buckets(units, works) if self.profile.bucket else works

    def at_end(self) -> tuple[Stage, ...]:
        """What is gathered once a step: what the optimizer changed and no later gather brings."""
        num_bytes = self._elements_at_end() * self._run.compute_bytes
        return gather_stages(self._cluster.node, self.group, num_bytes) if num_bytes else ()

    def inter_bytes(self) -> Fraction:
        """Bytes a node sends to others in a step: the sums of ``traffic.py``, for equal nodes.

        A ring over nodes leaves each node once, so a node sends what one rank of it does.
        """
        run, cluster, profile, n = self._run, self._cluster, self.profile, self.group
        k = cluster.node.gpus_per_node
        over = n // k if self.form == "hierarchical" else n
        leaves = Fraction(over - 1, over) if n > k else Fraction(0)
        blocks = [self._traffic(unit) for unit in self._anatomy.blocks]
        blocks.append(self._traffic(self._anatomy.root, gathers=1))
        hop_1 = sum(b.gathers * b.gather_bytes + b.reduces * b.reduce_bytes for b in blocks)
        replicas = cluster.gpus // n
        hop_2 = Fraction(0)
        if cluster.nodes > 1 and replicas > 1 and profile.sync != "never":
            syncs = run.micro_steps if profile.sync == "every" else 1
            shards = sum(block.sync_bytes for block in blocks if block.reduces)
            hop_2 = syncs * min(n, k) * 2 * shards * Fraction(replicas - 1, replicas)
        return run.micro_steps * hop_1 * leaves + hop_2 + self._bytes_at_end()

    def _bytes_at_end(self) -> Fraction:
        if self._cluster.nodes == 1:
            return Fraction(0)
        n = self.group
        return Fraction(self._elements_at_end() * self._run.compute_bytes * (n - 1), n)

    def _elements_at_end(self) -> int:
        """Of ZeRO-2 all parameters, of ZeRO-3 those that stay."""
        if self.profile.at_end:
            return self._anatomy.num_parameters
        units = (*self._anatomy.blocks, self._anatomy.root)
        return sum(unit.numel() - sum(q.numel for q in self._gathered(unit)) for unit in units)

    def _gathered(self, unit: Unit) -> list[Parameter]:
        return [q for q in unit.parameters if q.numel >= self.profile.stay]

    @property
    def _reduce_bytes(self) -> int:
        """Of a gradient on the wire in hop 1."""
        return self._run.compute_bytes if self.profile.lowers else self._run.reduce_bytes

    def _traffic(self, unit: Unit, gathers: int = 2) -> traffic.Block:
        run, n = self._run, self.group
        gathered = gathers if self.profile.sharded != "no" else 0
        return traffic.Block(
            gather_bytes=sum(q.padded(n) for q in self._gathered(unit)) * run.compute_bytes,
            reduce_bytes=unit.trained(n) * self._reduce_bytes,
            sync_bytes=unit.trained(n) // n * run.sync_bytes,
            gathers=gathered,
            reduces=1 if unit.trained() else 0,
        )

    def _work(self, unit: Unit, forward: float, backward: float) -> Work:
        like = self._known.get(id(unit))
        if like is None:
            like = self._known[id(unit)] = self._collectives(unit)
        return Work(forward, backward, like.gather, like.reduce, like.sync)

    def _collectives(self, unit: Unit) -> Work:
        profile, run, n = self.profile, self._run, self.group
        gather: tuple[Stage, ...] = ()
        if profile.sharded != "no":
            messages = [q.padded(n) * run.compute_bytes for q in self._gathered(unit)]
            gather = self._stages(messages, profile.coalesced)
        reduce: tuple[Stage, ...] = ()
        if profile.reduces and not profile.bucket:
            messages = [q.padded(n) * self._reduce_bytes for q in unit.parameters if q.trained]
            reduce = self._stages(messages, profile.coalesced)[::-1]
        return Work(0.0, 0.0, gather, reduce, self._sync(unit))

    def _in_buckets(self, units: Sequence[Unit], works: Sequence[Work]) -> list[Work]:
        """Gradients wait until a bucket is full; backward, from the last block to the root."""
        buckets: list[list[int]] = [[]]
        for number in [*range(len(units) - 2, -1, -1), len(units) - 1]:
            if buckets[-1] and self._trained(units, [*buckets[-1], number]) > self.profile.bucket:
                buckets.append([])
            buckets[-1].append(number)
        found = list(works)
        for numbers in buckets:
            num_bytes = self._trained(units, numbers) * self._reduce_bytes
            stages = self._stages([num_bytes], coalesced=True)[::-1] if num_bytes else ()
            found[numbers[-1]] = replace(found[numbers[-1]], reduce=stages)
        return found

    def _trained(self, units: Sequence[Unit], numbers: Sequence[int]) -> int:
        return sum(units[number].trained(self.group) for number in numbers)

    def _stages(self, messages: Sequence[int], coalesced: bool) -> tuple[Stage, ...]:
        """One message, or one after the other where they are not coalesced."""
        node, n = self._cluster.node, self.group
        if not messages:
            return ()
        if coalesced:
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
        if self.profile.sync == "never" or replicas == 1 or not unit.trained():
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
            each = [stage.seconds for stage in stages]
            return max(each) if run.pipelined else sum(each)

        return "hierarchical" if seconds("hierarchical") < seconds("flat") else "flat"
