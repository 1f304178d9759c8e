"""Every recipe for a model on a cluster, simulated; those that fit, the best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from mics.anatomy.anatomy import Anatomy
from mics.anatomy.flops import hardware_flops, model_flops, utilisation
from mics.anatomy.memory import Memory, Need, with_fragmentation
from mics.anatomy.recipe import Recipe
from mics.hardware.cluster import Cluster, host_of
from mics.planning.cost import dollars
from mics.planning.figures import Figures, figures_of
from mics.planning.host import HostNeed, fits_host, host_need, usable
from mics.planning.question import Question
from mics.planning.ranking import count_equal, error_on, in_order
from mics.planning.weighing import memory_on, simulate_recipe
from mics.quantities import GIB
from mics.simulation.engine_step import Simulated, inter_bytes


@dataclass(frozen=True)
class Plan:
    """A recipe that fits, and what is predicted of it.

    Args:
        way: the recipe, how a step is run.
        cluster: it runs on.
        question: it answers.
        memory: the largest moments of a GPU.
        needed: bytes of a GPU, with fragmentation.
        simulated: its step.
        model_flops: per GPU and step, see ``anatomy.flops``.
        host: what a node's own memory holds, where activations leave its GPUs.
        hardware_flops: those and what checkpointing computes again.
        reason: why this one, a sentence.
    """

    way: Recipe
    cluster: Cluster
    question: Question
    memory: Memory = field(repr=False)
    needed: float
    simulated: Simulated = field(repr=False)
    model_flops: float
    hardware_flops: float
    anatomy: Anatomy = field(repr=False)
    reason: str = ""
    host: HostNeed = field(default_factory=HostNeed)

    def __str__(self) -> str:
        memory = f"{self.needed / GIB:.1f} of {self.cluster.node.gpu.memory / GIB:.4g} GiB"
        return (
            f"{self.way} on {self.cluster}: {memory}, a step of {self.seconds:.3f} s, "
            f"{self.tokens_per_second:,.0f} tokens/s, MFU {self.mfu:.1%}"
            + (f"\n{self.reason}" if self.reason else "")
        )

    @property
    def figures(self) -> Figures:
        """The figures that a run of it has too."""
        return figures_of(self.anatomy, self.cluster, [self.way])

    @property
    def need(self) -> Need:
        """The largest moment."""
        return self.memory.phases[self.memory.phase]

    @property
    def seconds(self) -> float:
        """How long a step takes."""
        return self.simulated.seconds

    @property
    def sequences(self) -> int:
        """How many sequences a step takes in, on all GPUs: the global batch."""
        return self.way.micro_batch * self.way.micro_steps * self.cluster.gpus

    @property
    def tokens(self) -> int:
        """How many tokens a step takes in, on all GPUs."""
        return self.sequences * self.way.sequence

    @property
    def is_full_sharding(self) -> bool:
        """Whether one replica spans several GPUs, all of them: plain FSDP2, or ZeRO-3."""
        return self.way.partition == self.cluster.gpus > 1

    @property
    def tokens_per_second(self) -> float:
        """How many tokens the whole cluster takes in per second."""
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
        return self.cluster.node.gpu.computing(self.way.compute_bytes).peak

    @property
    def dollars_per_billion_tokens(self) -> float | None:
        """What a billion tokens cost, with failures; ``None`` where the price is not known."""
        return dollars(self.cluster, self.seconds_of(1e9))

    def seconds_of(self, tokens: float) -> float:
        """How long steps of so many tokens take, without what failures lose."""
        return self.seconds * tokens / self.tokens

    @cached_property
    def inter_bytes(self) -> int:
        """Bytes a node sends to others in a step."""
        return int(inter_bytes("mics", self.anatomy, self.cluster, self.way))


@dataclass(frozen=True)
class Rejected:
    """A recipe that does not fit, with the bytes it needs of a GPU and those there are.

    Where the GPU has enough and its host has not, they are the host's.
    """

    way: Recipe
    needed: float
    capacity: float
    on_host: bool = False

    @property
    def missing(self) -> float:
        """Bytes that a GPU, or a host, lacks."""
        return self.needed - self.capacity

    @property
    def lacking(self) -> str:
        """The same for people."""
        return f"{self.missing / GIB:.1f} GiB" + (" of the host's memory" if self.on_host else "")


@dataclass(frozen=True)
class Search:
    """The result of a search.

    Args:
        plans: that fit, the best first: as ``ranking.py`` orders them, all of the same work.
        rejected: what did not fit.
        left_out: micro-batches that do not divide the work of a step.
    """

    plans: tuple[Plan, ...]
    rejected: tuple[Rejected, ...]
    left_out: tuple[int, ...] = ()

    @property
    def equal(self) -> tuple[Plan, ...]:
        """The plans that are as fast as the fastest, within the model's error."""
        return equal_plans(self.plans)


def equal_plans(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """Pick of ranked plans those that are as fast as the fastest, within the model's error."""
    if not plans:
        return ()
    return tuple(plans[: count_equal(map(_cost, plans), error_on(plans[0].cluster.node))])


def best_of_partitions(plans: Sequence[Plan]) -> list[Plan]:
    """Pick the first plan of every partition, smaller partitions first."""
    best: dict[int, Plan] = {}
    for plan in plans:
        best.setdefault(plan.way.partition, plan)
    return [best[p] for p in sorted(best)]


def search(anatomy: Anatomy, cluster: Cluster, question: Question) -> Search:
    """Try every recipe; where nobody says how much work a step is, let all do the same.

    A step of more sequences hides more of hop 2, so recipes are compared on one global batch. If
    none was asked for it is the one of the recipe that takes least time per sequence: its
    micro-batch with the micro-steps of the question. The others take as many micro-steps as that
    needs.

    Args:
        anatomy: of the model.
        cluster: nodes.
        question: what to try.

    Raises:
        PlanError: there is nothing to try: a partition that is not legal, or a global batch that no
            micro-batch divides.
    """
    plans, rejected = _tried(anatomy, cluster, question)
    if plans and len({plan.sequences for plan in plans}) > 1:
        fastest = min(plans, key=_cost)
        question = replace(question, global_batch=fastest.sequences)
        plans, rejected = _tried(anatomy, cluster, question)
    tried = dict.fromkeys(question.micro_batches)
    left_out = tuple(b for b in tried if not question.micro_steps(cluster, b))
    ordered = in_order(plans, _cost, lambda plan: plan.way.partition, error_on(cluster.node))
    return Search(tuple(ordered), tuple(rejected), left_out)


def _tried(
    anatomy: Anatomy, cluster: Cluster, question: Question
) -> tuple[list[Plan], list[Rejected]]:
    """Weigh and simulate every recipe of a question."""
    plans: list[Plan] = []
    rejected: list[Rejected] = []
    staying: set[Recipe] = set()  # what fits without: to let activations leave only takes longer
    for recipe in question.recipes(cluster):
        if recipe.offload and replace(recipe, offload=False) in staying:
            continue
        need = memory_on(anatomy, cluster, recipe)
        needed, capacity = with_fragmentation(need, cluster.node.machine), cluster.node.gpu.memory
        if needed > capacity:
            rejected.append(Rejected(recipe, needed, capacity))
            continue
        on_host = host_need(anatomy, cluster, recipe, need)
        if not fits_host(cluster, on_host):
            memory = usable(host_of(cluster).memory or 0.0)
            rejected.append(Rejected(recipe, on_host.total, memory, on_host=True))
            continue
        staying.add(recipe)
        trace = anatomy.trace(recipe.micro_batch, recipe.sequence)
        computed = hardware_flops(trace, checkpointing=recipe.checkpointing)
        plans.append(
            Plan(
                way=recipe,
                cluster=cluster,
                question=question,
                memory=need,
                needed=needed,
                simulated=simulate_recipe("mics", anatomy, cluster, recipe),
                model_flops=float(recipe.micro_steps * model_flops(trace)),
                hardware_flops=float(recipe.micro_steps * computed),
                anatomy=anatomy,
                host=on_host,
            )
        )
    return plans, rejected


def _cost(plan: Plan) -> float:
    """Seconds per token."""
    return plan.seconds / plan.tokens


def with_reason(plan: Plan, reason: str) -> Plan:
    """Copy a plan with its reason."""
    return replace(plan, reason=reason)
