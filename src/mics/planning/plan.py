"""Every way to run a model on a cluster, simulated; those that fit, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from mics.anatomy.anatomy import Anatomy
from mics.anatomy.flops import hardware_flops, model_flops, utilisation
from mics.anatomy.memory import Memory, Need, Setup, memory
from mics.errors import PlanError
from mics.hardware.cluster import Cluster
from mics.hardware.stacks import find_stack
from mics.planning.cost import dollars
from mics.planning.question import MICRO_STEPS, Question
from mics.simulation.compute import times
from mics.simulation.engines import Run, Simulated, inter_bytes, simulate_engine
from mics.simulation.profiles import Engine
from mics.topology import possible_partitions
from mics.traffic import Form

GIB = 2**30


@dataclass(frozen=True)
class Way:
    """One way to run the model, fitting or not."""

    partition: int
    micro_batch: int
    micro_steps: int
    checkpointing: bool
    form: Form = "flat"

    def __str__(self) -> str:
        return f"p = {self.partition}, {self.setting}"

    @property
    def setting(self) -> str:
        """All but the partition and how it gathers."""
        extra = ", checkpointing" if self.checkpointing else ""
        return f"micro-batch {self.micro_batch}{extra}"


@dataclass(frozen=True)
class Plan:
    """A way that fits, and what is predicted of it.

    Args:
        way: partition, micro-batch, micro-steps, checkpointing, form.
        cluster: it runs on.
        question: it answers.
        memory: the largest moments.
        needed: bytes with fragmentation.
        simulated: its step.
        model_flops: per GPU and step, see ``anatomy.flops``.
        hardware_flops: those and what checkpointing computes again.
        reason: why this one, a sentence.
    """

    way: Way
    cluster: Cluster
    question: Question
    memory: Memory = field(repr=False)
    needed: float
    simulated: Simulated = field(repr=False)
    model_flops: float
    hardware_flops: float
    anatomy: Anatomy = field(repr=False)
    reason: str = ""

    @property
    def need(self) -> Need:
        """The largest moment."""
        return self.memory.phases[self.memory.phase]

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.simulated.seconds

    @property
    def tokens(self) -> int:
        """Of a step, on all GPUs."""
        way = self.way
        sequences = way.micro_batch * way.micro_steps * self.cluster.gpus
        return sequences * self.question.sequence

    @property
    def tokens_per_second(self) -> float:
        """Of the cluster."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """FLOPs of the model over the peak's; what checkpointing recomputes does not count."""
        return utilisation(self.model_flops, self.seconds, self._peak)

    @property
    def hfu(self) -> float:
        """FLOPs of the hardware over the peak's; what checkpointing recomputes counts."""
        return utilisation(self.hardware_flops, self.seconds, self._peak)

    @property
    def _peak(self) -> float:
        return self.cluster.node.gpu.computing(self.question.compute_bytes).peak

    @property
    def dollars_per_billion_tokens(self) -> float | None:
        """With failures; ``None`` where the price is not known."""
        return dollars(self.cluster, self.seconds_of(1e9))

    def seconds_of(self, tokens: float) -> float:
        """Steps of so many tokens, without what failures lose."""
        return self.seconds * tokens / self.tokens

    @cached_property
    def inter_bytes(self) -> int:
        """Bytes a node sends to others in a step."""
        run = run_of(self.way, self.question)
        return int(inter_bytes("mics", self.anatomy, self.cluster, run))


@dataclass(frozen=True)
class Rejected:
    """A way that does not fit."""

    way: Way
    needed: float
    capacity: float

    @property
    def missing(self) -> float:
        """Bytes."""
        return self.needed - self.capacity


@dataclass(frozen=True)
class Search:
    """What came out: plans, the fastest first, and what did not fit."""

    plans: tuple[Plan, ...]
    rejected: tuple[Rejected, ...]


def best_of_partitions(plans: Sequence[Plan]) -> list[Plan]:
    """The first plan of every partition, smaller partitions first."""
    found: dict[int, Plan] = {}
    for plan in plans:
        found.setdefault(plan.way.partition, plan)
    return [found[p] for p in sorted(found)]


def search(anatomy: Anatomy, cluster: Cluster, question: Question) -> Search:
    """Try every way.

    Args:
        anatomy: of the model.
        cluster: nodes.
        question: what to try.

    Raises:
        PlanError: there is nothing to try: a partition that is not legal, or a global batch that no
            micro-batch divides.
    """
    plans: list[Plan] = []
    rejected: list[Rejected] = []
    for way in ways(cluster, question):
        need = memory_of(anatomy, cluster, question, way)
        needed = with_fragmentation(need, question)
        capacity = cluster.node.gpu.memory
        if needed > capacity:
            rejected.append(Rejected(way, needed, capacity))
            continue
        plans.append(_plan(anatomy, cluster, question, way, need, needed))
    plans.sort(key=lambda plan: -plan.tokens_per_second)
    return Search(tuple(plans), tuple(rejected))


def ways(cluster: Cluster, question: Question) -> Iterator[Way]:
    """Every legal one, smaller partitions first."""
    k = cluster.node.gpus_per_node
    legal = possible_partitions(cluster.nodes, k)
    partitions = list(dict.fromkeys(question.partitions or legal))
    for p in partitions:
        if p not in legal:
            raise PlanError(
                f"partition {p} is not possible with {cluster}.",
                numbers=f"Possible: {' '.join(map(str, legal))}.",
            )
    steps = {b: micro_steps_of(cluster, question, b) for b in question.micro_batches}
    if not any(steps.values()):
        raise PlanError(
            f"No micro-batch divides a global batch of {question.global_batch} sequences.",
            numbers=f"{cluster.gpus} GPUs; tried {' '.join(map(str, question.micro_batches))}.",
            write=f"--global-batch {_nearest_batch(cluster, question)}",
        )
    for p in partitions:
        forms: tuple[Form, ...] = ("flat", "hierarchical") if p > k > 1 else ("flat",)
        for micro_batch, micro_steps in steps.items():
            if not micro_steps:
                continue
            for checkpointing in dict.fromkeys(question.checkpointing):
                for form in forms:
                    yield Way(p, micro_batch, micro_steps, checkpointing, form)


def micro_steps_of(cluster: Cluster, question: Question, micro_batch: int) -> int:
    """s with a micro-batch; 0 where the global batch cannot be cut that way."""
    if question.global_batch is None:
        return question.micro_steps or MICRO_STEPS
    steps, rest = divmod(question.global_batch, cluster.gpus * micro_batch)
    return 0 if rest else steps


def _nearest_batch(cluster: Cluster, question: Question) -> int:
    least = cluster.gpus * min(question.micro_batches)
    return max(1, round((question.global_batch or 0) / least)) * least


def memory_of(anatomy: Anatomy, cluster: Cluster, question: Question, way: Way) -> Memory:
    """What a way needs."""
    k = cluster.node.gpus_per_node
    groups = 1 + (way.partition > 1) + (way.partition < cluster.gpus)
    two_stages = way.form == "hierarchical" and way.partition > k > 1
    if two_stages:
        groups += 2
    setup = Setup(
        way.partition,
        way.checkpointing,
        question.optimizer,
        compute_bytes=question.compute_bytes,
        reduce_bytes=question.reduce_bytes,
        prefetch=question.prefetch,
        reductions=question.reductions,
        micro_steps=way.micro_steps,
        staged=k if two_stages else 0,
        communicators=groups,
        communicator_bytes=round(question.communicator_gib * GIB),
        runtime_bytes=round(question.runtime_gib * GIB),
    )
    return memory(anatomy, anatomy.trace(way.micro_batch, question.sequence), setup)


def with_fragmentation(need: Memory, question: Question) -> float:
    """Bytes the allocator asks for."""
    fixed = need.phases[need.phase].communicators
    return (need.peak - fixed) * question.fragmentation + fixed


def needed_by(anatomy: Anatomy, cluster: Cluster, question: Question, way: Way) -> float:
    """Bytes a way needs of a GPU, with fragmentation."""
    return with_fragmentation(memory_of(anatomy, cluster, question, way), question)


def run_of(way: Way, question: Question) -> Run:
    """As the simulator wants it."""
    return Run(
        way.micro_steps,
        way.partition,
        compute_bytes=question.compute_bytes,
        reduce_bytes=question.reduce_bytes,
        sigma=question.sigma,
        prefetch=question.prefetch,
        form=way.form,
        pipelined=question.pipelined,
        optimizer=question.optimizer,
    )


def simulate_way(
    engine: Engine,
    anatomy: Anatomy,
    cluster: Cluster,
    question: Question,
    way: Way,
    *,
    timeline: bool = False,
) -> Simulated:
    """A step of an engine, run as a way says."""
    made = times(
        anatomy.trace(way.micro_batch, question.sequence),
        cluster.node.gpu.computing(question.compute_bytes),
        stack=find_stack(question.stack).factor,
        checkpointing=way.checkpointing,
    )
    run = run_of(way, question)
    return simulate_engine(engine, anatomy, made, cluster, run, timeline=timeline)


def _plan(
    anatomy: Anatomy,
    cluster: Cluster,
    question: Question,
    way: Way,
    need: Memory,
    needed: float,
) -> Plan:
    trace = anatomy.trace(way.micro_batch, question.sequence)
    computed = hardware_flops(trace, checkpointing=way.checkpointing)
    return Plan(
        way=way,
        cluster=cluster,
        question=question,
        memory=need,
        needed=needed,
        simulated=simulate_way("mics", anatomy, cluster, question, way),
        model_flops=float(way.micro_steps * model_flops(trace)),
        hardware_flops=float(way.micro_steps * computed),
        anatomy=anatomy,
    )


def with_reason(plan: Plan, reason: str) -> Plan:
    """The same plan, explained."""
    return replace(plan, reason=reason)
