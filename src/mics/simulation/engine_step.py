"""A step of any engine: its units as computation and collectives, and the bytes they send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from mics import traffic
from mics.anatomy.anatomy import Anatomy
from mics.anatomy.memory import OPTIMIZERS
from mics.anatomy.offloaded import leaving
from mics.anatomy.recipe import Recipe
from mics.anatomy.sizes import Parameter, UnitSize
from mics.communication.averaging import Sent
from mics.communication.blocks_of_values import coded_where_fewer
from mics.communication.joined import joined
from mics.hardware.cluster import Cluster, host_of
from mics.hardware.network import Stage, all_reduce_seconds, all_reduce_stages, gather_stages
from mics.simulation.compute import Times
from mics.simulation.profiles import PROFILES, EngineName
from mics.simulation.schedule import Schedule, UnitSeconds
from mics.simulation.step import Step, simulate, straggling
from mics.traffic import Form

SLOWS = 0.02
"""Share that computation on a GPU takes longer beside communication, which uses some of it."""


@dataclass(frozen=True)
class Simulated:
    """A step of one engine.

    Args:
        step: what it took.
        form: of its all-gathers.
    """

    step: Step
    form: Form

    @property
    def seconds(self) -> float:
        """How long the step takes."""
        return self.step.seconds


def simulate_engine(
    engine: EngineName,
    anatomy: Anatomy,
    times: Times,
    cluster: Cluster,
    recipe: Recipe,
    *,
    host: float | None = None,
    timeline: bool = False,
) -> Simulated:
    """Simulate one step.

    mics on nodes that talk through Gloo runs in the order it has there; other engines are simulated
    as they run on GPUs, whatever the node.

    Args:
        engine: which one.
        anatomy: sizes of the model's units, and a trace where activations leave.
        times: of computation, on the cluster's GPU.
        cluster: nodes and links.
        recipe: how the step is run.
        host: seconds of the host per message, where they are not the engine's.
        timeline: keep every span.
    """
    build = _Builder(engine, anatomy, cluster, recipe)
    profile, group, gloo = build.profile, build.group, build.on_gloo
    *blocks, root = build.units(times)
    if recipe.offload:
        copies = _copies(anatomy, cluster, recipe)
        blocks = [replace(b, copy=seconds) for b, seconds in zip(blocks, copies, strict=True)]
    shard = sum(u.trained() for u in (*anatomy.blocks, anatomy.root)) // group
    schedule = Schedule(
        micro_steps=recipe.micro_steps,
        gathers=profile.sharded != "no",
        prefetch=recipe.prefetch if profile.overlaps else 0,
        in_flight=1 if profile.overlaps else 0,
        sync=profile.sync,
        pipelined=recipe.pipelined or gloo,
        host=profile.host if host is None else host,
        messages=1 if profile.coalesced else build.messages,
        slows=0.0 if gloo else SLOWS,
        last=_optimizer_seconds(shard, cluster, recipe.optimizer),
        gathered_at_end=build.at_end(),
        gloo=gloo,
    )
    step = simulate(blocks, root, schedule, timeline=timeline)
    alone = 1 if profile.sync == "every" else recipe.micro_steps
    spread = straggling(cluster.node.machine.sigma, group, cluster.gpus // group, alone)
    late = step.seconds * (spread - 1)
    return Simulated(replace(step, seconds=step.seconds + late, late=late), build.form)


def inter_bytes(engine: EngineName, anatomy: Anatomy, cluster: Cluster, recipe: Recipe) -> Fraction:
    """Count the bytes a node sends to others in a step, as ``traffic.py`` and the ledger do."""
    return _Builder(engine, anatomy, cluster, recipe).inter_bytes()


def _copies(anatomy: Anatomy, cluster: Cluster, recipe: Recipe) -> list[float]:
    """Work out how long each block's copy takes, one way."""
    rate = host_of(cluster).bandwidth
    trace = anatomy.trace(recipe.micro_batch, recipe.sequence)
    return [num_bytes / rate for num_bytes in leaving(trace, recipe.checkpointing)]


def _optimizer_seconds(shard: int, cluster: Cluster, optimizer: str) -> float:
    """Work out how long the optimizer's figures take through the GPU's memory, once."""
    bandwidth = cluster.node.gpu.bandwidth
    moved = OPTIMIZERS[optimizer].moved_bytes * shard
    return 0.0 if bandwidth is None else moved / (0.9 * bandwidth)


class _Builder:
    """Turns a model's units into seconds and bytes of one engine."""

    def __init__(
        self, engine: EngineName, anatomy: Anatomy, cluster: Cluster, recipe: Recipe
    ) -> None:
        self.profile, self._engine = PROFILES[engine], engine
        self.on_gloo = engine == "mics" and cluster.node.gloo
        self._anatomy, self._cluster, self._recipe = anatomy, cluster, recipe
        world = cluster.gpus
        if self.profile.sharded == "no":  # gradients and optimizer states are, or nothing is
            self.group = world if self.profile.at_end else 1
        else:
            self.group = world if self.profile.sharded == "world" else recipe.partition
        self._seconds: dict[int, UnitSeconds] = {}  # equal units are one object
        self.form: Form = self._choose()
        self._form_between: Form = self._choose_between_replicas()

    @property
    def messages(self) -> int:
        """How many messages the gather of the block with most parameters is."""
        return max(len(self._gathered(unit)) for unit in self._anatomy.blocks)

    def units(self, times: Times) -> list[UnitSeconds]:
        """Time computation and collectives of every block, and of the root, which comes last."""
        root = (times.before, times.between + times.after)
        computed = [*zip(times.forward, times.backward, strict=True), root]
        units = [*self._anatomy.blocks, self._anatomy.root]
        seconds = [self._timed(unit, *each) for unit, each in zip(units, computed, strict=True)]
        if self.profile.joins and self._recipe.hop_two not in ("fp8", "int8"):
            return self._in_messages(units, seconds)
        return self._in_buckets(units, seconds) if self.profile.bucket else seconds

    def at_end(self) -> tuple[Stage, ...]:
        """Time what is gathered once a step: what was changed and no later gather brings."""
        num_bytes = self._elements_at_end() * self._recipe.compute_bytes
        return gather_stages(self._cluster.node, self.group, num_bytes) if num_bytes else ()

    def inter_bytes(self) -> Fraction:
        """Count the bytes a node sends to others in a step: the sums of ``traffic.py``.

        A ring over nodes leaves each node once, so a node sends what one rank of it does. All nodes
        are equal.
        """
        recipe, cluster, profile, n = self._recipe, self._cluster, self.profile, self.group
        k = cluster.node.gpus_per_node
        over = n // k if self.form == "hierarchical" else n
        leaves = Fraction(over - 1, over) if n > k else Fraction(0)
        blocks = [self._traffic(unit) for unit in self._anatomy.blocks]
        blocks.append(self._traffic(self._anatomy.root, gathers=1))
        sends = 2 if self._reduces_whole else 1
        hop_1 = sum(b.gathers * b.gather_bytes + sends * b.reduces * b.reduce_bytes for b in blocks)
        replicas = cluster.gpus // n
        hop_2 = Fraction(0)
        if cluster.nodes > 1 and replicas > 1 and profile.sync != "never":
            syncs = recipe.micro_steps if profile.sync == "every" else 1
            rings = sum(2 * b.sync_bytes + b.coded_bytes for b in blocks if b.reduces)
            over = replicas if self._form_between == "flat" else cluster.nodes
            hop_2 = syncs * min(n, k) * rings * Fraction(over - 1, over)
            coded = sum(block.coded_bytes for block in blocks if block.reduces)
            outside = replicas - max(k // n, 1)  # to which every rank sends what it exchanges
            hop_2 += k * coded * Fraction(outside, replicas)
        return recipe.micro_steps * hop_1 * leaves + hop_2 + self._bytes_at_end()

    def _bytes_at_end(self) -> Fraction:
        if self._cluster.nodes == 1:
            return Fraction(0)
        n = self.group
        return Fraction(self._elements_at_end() * self._recipe.compute_bytes * (n - 1), n)

    def _elements_at_end(self) -> int:
        """Count what is gathered after the step: ZeRO-2 gathers all, ZeRO-3 those that stay."""
        if self.profile.at_end:
            return self._anatomy.num_parameters
        units = (*self._anatomy.blocks, self._anatomy.root)
        return sum(unit.numel() - sum(q.numel for q in self._gathered(unit)) for unit in units)

    @property
    def _reduces_whole(self) -> bool:
        """Whether a reduce-scatter sends as an all-reduce does: Gloo's does over nodes, flat."""
        between_nodes = self.group > self._cluster.node.gpus_per_node
        return self.on_gloo and between_nodes and self.form == "flat"

    def _gathered(self, unit: UnitSize) -> list[Parameter]:
        return [q for q in unit.parameters if q.numel >= self.profile.stay]

    @property
    def _reduce_bytes(self) -> int:
        """Bytes of a gradient on the wire, in hop 1 and in hop 2."""
        recipe = self._recipe
        return recipe.compute_bytes if self.profile.lowers else recipe.reduce_bytes

    def _traffic(self, unit: UnitSize, gathers: int = 2) -> traffic.Block:
        n = self.group
        gathered = gathers if self.profile.sharded != "no" else 0
        return traffic.Block(
            gather_bytes=sum(q.padded(n) for q in self._gathered(unit))
            * self._recipe.compute_bytes,
            reduce_bytes=unit.trained(n) * self._reduce_bytes,
            sync_bytes=self._sent(unit).exact,
            gathers=gathered,
            reduces=1 if unit.trained() else 0,
            coded_bytes=self._sent(unit).coded,
        )

    def _sent(self, unit: UnitSize) -> Sent:
        """Count what replicas send each other of a unit; fewer bits are mics' alone."""
        n, asked = self.group, self._recipe.hop_two if self._engine == "mics" else None
        shard, itemsize = unit.trained(n) // n, self._reduce_bytes
        if asked in ("fp32", "bf16"):
            return Sent(shard * {"fp32": 4, "bf16": 2}[asked])
        values, replicas = unit.matrices(n) // n, self._cluster.gpus // n
        coded = coded_where_fewer(values, replicas, itemsize) if asked else 0
        return Sent((shard - values if coded else shard) * itemsize, coded)

    def _timed(self, unit: UnitSize, forward: float, backward: float) -> UnitSeconds:
        like = self._seconds.get(id(unit))
        if like is None:
            like = self._seconds[id(unit)] = self._collectives(unit)
        return UnitSeconds(forward, backward, like.gather, like.reduce, like.sync)

    def _collectives(self, unit: UnitSize) -> UnitSeconds:
        profile, n = self.profile, self.group
        gather: tuple[Stage, ...] = ()
        if profile.sharded != "no":
            messages = [q.padded(n) * self._recipe.compute_bytes for q in self._gathered(unit)]
            gather = self._stages(messages, profile.coalesced)
        reduce: tuple[Stage, ...] = ()
        if profile.reduces and not profile.bucket:
            messages = [q.padded(n) * self._reduce_bytes for q in unit.parameters if q.trained]
            reduce = self._stages(messages, profile.coalesced)[::-1]
            if self._reduces_whole and messages:
                reduce = (self._all_reduced(sum(messages)),)
        return UnitSeconds(0.0, 0.0, gather, reduce, self._sync(unit))

    def _all_reduced(self, num_bytes: int) -> Stage:
        node, n = self._cluster.node, self.group
        seconds = all_reduce_seconds(node, n, n // node.gpus_per_node, num_bytes)
        return Stage("inter", seconds)

    def _in_buckets(
        self, units: Sequence[UnitSize], seconds: Sequence[UnitSeconds]
    ) -> list[UnitSeconds]:
        """Let gradients wait until a bucket is full, from the last block to the root."""
        buckets: list[list[int]] = [[]]
        for number in _backwards(units):
            if buckets[-1] and self._trained(units, [*buckets[-1], number]) > self.profile.bucket:
                buckets.append([])
            buckets[-1].append(number)
        bucketed = list(seconds)
        for numbers in buckets:
            num_bytes = self._trained(units, numbers) * self._reduce_bytes
            stages = self._stages([num_bytes], coalesced=True)[::-1] if num_bytes else ()
            bucketed[numbers[-1]] = replace(bucketed[numbers[-1]], reduce=stages)
        return bucketed

    def _in_messages(
        self, units: Sequence[UnitSize], seconds: Sequence[UnitSeconds]
    ) -> list[UnitSeconds]:
        """Let hop 2 of small units wait for the last one of their message."""
        order = [number for number in _backwards(units) if seconds[number].sync]
        sizes = [self._sent(units[number]).exact for number in order]
        together = list(seconds)
        for message in joined(sizes, ["alike"] * len(sizes)):
            *before, last = message
            for i in before:
                together[order[i]] = replace(together[order[i]], sync=())
            if before:
                stages = self._synced(Sent(sum(sizes[i] for i in message)))
                together[order[last]] = replace(together[order[last]], sync=stages)
        return together

    def _trained(self, units: Sequence[UnitSize], numbers: Sequence[int]) -> int:
        return sum(units[number].trained(self.group) for number in numbers)

    def _stages(self, messages: Sequence[int], coalesced: bool) -> tuple[Stage, ...]:
        """Time one message, or one after the other where they are not coalesced."""
        if not messages:
            return ()
        if coalesced:
            return self._gather(sum(messages), self.form)
        each = [self._gather(num_bytes, self.form) for num_bytes in messages]
        return tuple(
            Stage(parts[0].link, sum(part.seconds for part in parts))
            for parts in zip(*each, strict=True)
        )

    def _gather(self, num_bytes: int, form: Form) -> tuple[Stage, ...]:
        """Time the stages of one message, as long as they take in a step."""
        return self._in_step(gather_stages(self._cluster.node, self.group, num_bytes, form))

    def _in_step(self, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        """Time some stages as long as they take beside computation."""
        node = self._cluster.node
        if node.inside == 1.0:
            return stages
        slower = {"intra": node.inside, "inter": 1.0}
        return tuple(Stage(stage.link, stage.seconds * slower[stage.link]) for stage in stages)

    def _sync(self, unit: UnitSize) -> tuple[Stage, ...]:
        replicas = self._cluster.gpus // self.group
        if self.profile.sync == "never" or replicas == 1 or not unit.trained():
            return ()
        return self._synced(self._sent(unit))

    def _synced(self, sent: Sent) -> tuple[Stage, ...]:
        """Time one message of hop 2."""
        if not sent.coded:
            return self._between_replicas(sent.exact, self._form_between)
        # An exchange and a gather are the two halves of an all-reduce.
        parts = [self._between_replicas(num_bytes, "flat") for num_bytes in sent if num_bytes]
        return (Stage(parts[0][0].link, sum(stage.seconds for (stage,) in parts)),)

    def _between_replicas(self, num_bytes: int, form: Form) -> tuple[Stage, ...]:
        """Time an all-reduce of one form over the replicas."""
        cluster, n = self._cluster, self.group
        k, replicas = cluster.node.gpus_per_node, cluster.gpus // n
        nodes = replicas if n >= k else cluster.nodes
        stages = all_reduce_stages(cluster.node, replicas, nodes, num_bytes, min(n, k), form)
        return stages if len(stages) == 1 else self._in_step(stages)

    def _choose_between_replicas(self) -> Form:
        """Choose the faster form of hop 2 for the largest block; flat where there is one stage."""
        recipe, cluster = self._recipe, self._cluster
        alone = cluster.nodes == 1 or self.group >= cluster.node.gpus_per_node
        if not self.profile.two_stages or alone or not recipe.may_sum_inside_nodes:
            return "flat"
        if recipe.hop_two_form != "auto":
            return recipe.hop_two_form
        largest = max(self._sent(unit).exact for unit in self._anatomy.blocks)

        def seconds(form: Form) -> float:
            return sum(stage.seconds for stage in self._between_replicas(largest, form))

        return "hierarchical" if seconds("hierarchical") < seconds("flat") else "flat"

    def _choose(self) -> Form:
        """Choose the faster form for the largest block; flat where there is one stage."""
        recipe, node = self._recipe, self._cluster.node
        if not self.profile.two_stages or self.group <= node.gpus_per_node:
            return "flat"
        if recipe.form != "auto":
            return recipe.form
        largest = max(unit.numel(self.group) for unit in self._anatomy.blocks)

        def seconds(form: Form) -> float:
            stages = self._gather(largest * recipe.compute_bytes, form)
            each = [stage.seconds for stage in stages]
            return max(each) if recipe.pipelined or self.on_gloo else sum(each)

        return "hierarchical" if seconds("hierarchical") < seconds("flat") else "flat"


def _backwards(units: Sequence[UnitSize]) -> list[int]:
    """Numbers of units as a backward pass ends them: from the last block to the first, the root."""
    return [*range(len(units) - 2, -1, -1), len(units) - 1]
