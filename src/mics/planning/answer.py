"""The answer to a question: plans, what they cost, their limits, and their caveats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import overload

from mics.anatomy.anatomy import Anatomy
from mics.anatomy.memory import NOT_MODELLED
from mics.anatomy.offloaded import leaving
from mics.hardware.cluster import Cluster, Gpu, Node, extrapolated
from mics.hardware.stacks import find_stack
from mics.planning.cost import Price, Reliability, price_of
from mics.planning.inverse import Limits, limits_around
from mics.planning.nearest import check_any
from mics.planning.plan import Plan, Rejected, equal_plans, search
from mics.planning.question import Question
from mics.planning.ranking import TOP, error_on
from mics.planning.reasons import explained
from mics.planning.table import plan_table
from mics.quantities import GIB, dtype_name
from mics.ranks.columns import fitted
from mics.topology import possible_partitions


@dataclass(frozen=True, repr=False)
class Plans(Sequence[Plan]):
    """Every plan that fits, the best first; ``print(plans)`` is what ``mics plan`` prints.

    All do the same work in a step. Those that are as fast as the fastest, within the model's error,
    come first, the smallest partition ahead; the others follow by time.

    Args:
        plans: with their reasons.
        rejected: recipes that do not fit.
        left_out: micro-batches that do not divide a step's work.
        anatomy: of the model.
        cluster: they run on.
        question: they answer.
    """

    plans: tuple[Plan, ...]
    rejected: tuple[Rejected, ...] = field(repr=False)
    anatomy: Anatomy = field(repr=False)
    cluster: Cluster
    question: Question
    left_out: tuple[int, ...] = ()

    @overload
    def __getitem__(self, index: int) -> Plan: ...
    @overload
    def __getitem__(self, index: slice) -> list[Plan]: ...
    def __getitem__(self, index: int | slice) -> Plan | list[Plan]:
        return list(self.plans[index]) if isinstance(index, slice) else self.plans[index]

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[Plan]:
        return iter(self.plans)

    def __str__(self) -> str:
        return fitted("\n".join([self.report(), *self.caveats()]))

    def __repr__(self) -> str:
        best = f"the best: {self.best.way}" if self.plans else "none fits"
        return f"<{len(self)} plans of {self.anatomy.name} on {self.cluster}, {best}>"

    @property
    def best(self) -> Plan:
        """The plan to take: of the equally fast ones that with the smallest partition."""
        return self.plans[0]

    def price(self, tokens: float | None = None) -> Price:
        """Price a step of the best plan, a billion tokens, and a run of ``tokens``."""
        return price_of(self.cluster, self.best.seconds, self.best.tokens, tokens)

    @cached_property
    def limits(self) -> Limits:
        """How far the best plan's recipe may be changed and still fits."""
        return limits_around(self.anatomy, self.cluster, self.question, self.best.way)

    def report(self, *, top: int = TOP, tokens: float | None = None) -> str:
        """Write model, cluster and a table; why the best is best, its price and its limits.

        Args:
            top: lines of the table.
            tokens: of a whole run, to be priced too.
        """
        stack = find_stack(self.question.recipe.stack)
        tried = len(self.plans) + len(self.rejected)
        return "\n".join(
            [
                f"{self.anatomy.name}: {self.anatomy.num_parameters:,} parameters, "
                f"sequence {self.question.recipe.sequence}",
                str(self.cluster),
                f"software stack {stack.name}: {stack.calibrated}",
                self._work(),
                "",
                *plan_table(self.plans[:top]),
                *self._notes(top),
                "",
                f"{len(self.plans)} of {tried} ways fit. Best: {self.best.reason}.",
                *self.on_host,
                str(self.price(tokens)),
                str(self.limits),
                *self._dealing(),
                "",
            ]
        )

    @property
    def on_host(self) -> list[str]:
        """Say what the best plan needs of the hosts' memory, where activations leave the GPUs."""
        best, host = self.best, self.cluster.node.host
        if not best.way.offload or host is None:
            return []
        each = leaving(
            self.anatomy.trace(best.way.micro_batch, best.way.sequence), best.way.checkpointing
        )
        waits = best.simulated.step.exposed[3] / best.seconds
        return [
            f"Activations leave: {sum(each) / GIB:.1f} GiB a GPU and micro-step each way, at "
            f"{host.bandwidth / 1e9:.1f} GB/s; {waits:.1%} of the step waits for the copies.",
            f"Of its own memory {best.host.text(host.memory)}.",
        ]

    @cached_property
    def dealt(self) -> Plan | None:
        """The best plan whose partition stays inside a node because optimizer states are dealt.

        ``None`` where the best one of these does so anyhow, nothing fits so, or it is slower.
        """
        recipe, k = self.question.recipe, self.cluster.node.gpus_per_node
        if recipe.dealt_states or recipe.hop_two is not None or self.best.way.partition <= k:
            return None
        legal = possible_partitions(self.cluster.nodes, k)
        inside = [p for p in self.question.partitions or legal if p <= k]
        if not inside:
            return None
        asked = replace(
            self.question,
            recipe=replace(recipe, dealt_states=True),
            partitions=inside,
            global_batch=self.best.sequences,
        )
        found = search(self.anatomy, self.cluster, asked).plans
        return found[0] if found and found[0].seconds < self.best.seconds else None

    def _dealing(self) -> list[str]:
        """Recommend that optimizer states are dealt, where a partition stays inside a node so."""
        if self.dealt is None:
            return []
        return [
            f"With optimizer states dealt to the replicas (--dealt-states, mics.owned): "
            f"{self.dealt.way}, inside a node, is {self.best.seconds / self.dealt.seconds:.2f} "
            f"times as fast, {self.dealt.seconds:.3f} s a step."
        ]

    def _work(self) -> str:
        """Say what every row does in a step."""
        text = f"every row: a step of {self.best.sequences:,} sequences"
        if self.question.global_batch is None:
            steps, micro_batch = self.question.recipe.micro_steps, self._anchor
            several = "s" if steps > 1 else ""
            text += f", {steps} micro-step{several} of micro-batch {micro_batch} on each GPU"
        if self.left_out:
            text += f"; micro-batch {' '.join(map(str, self.left_out))} does not divide it"
        return text

    @property
    def _anchor(self) -> int:
        """The micro-batch whose micro-steps are those of the question."""
        return self.best.sequences // self.cluster.gpus // self.question.recipe.micro_steps

    def _notes(self, top: int) -> list[str]:
        """Say which rows are equal, and which are plain full sharding."""
        notes, equal = [], len(equal_plans(self.plans))
        if equal > 1:
            error = error_on(self.cluster.node)
            notes.append(
                f"The first {equal} are equally fast: within {error:.1%}, the error of a predicted "
                "step. The smallest partition comes first."
            )
        if any(plan.is_full_sharding for plan in self.plans[:top]):
            notes.append(
                f"p = {self.cluster.gpus} is plain full sharding (FSDP2, ZeRO-3): one replica, no "
                "hop 2."
            )
        return notes

    def _hooked(self) -> str:
        """Say what is assumed of parameters that are gathered in bits of their own choice."""
        if not self.anatomy.hooked:
            return ""
        return (
            f"Assumed: {self.anatomy.hooked:,} parameters, which say themselves what is gathered "
            f"of them, as {dtype_name(self.anatomy.dtype)}, in memory and on the links."
        )

    def caveats(self, swept: Sequence[Plan] = ()) -> list[str]:
        """Say what a reader must know of the figures.

        Args:
            swept: plans of other numbers of nodes that are shown beside these.
        """
        largest = max(
            (self.cluster, *(plan.cluster for plan in swept)), key=lambda cluster: cluster.nodes
        )
        node, gpu = largest.node, largest.node.gpu
        machine = node.machine
        lines = [
            f"GPU: {gpu.source}." if gpu.source else "",
            "" if gpu.bf16 else f"{gpu.name} multiplies 16 bits in fp16 only; mics train has bf16.",
            _given(gpu),
            f"Assumed: {machine.runtime_gib} GiB a GPU for its runtime, {machine.communicator_gib} "
            f"GiB for each group it is in, {machine.fragmentation - 1:.0%} for fragmentation; "
            f"{Reliability()}.",
            self._hooked(),
            f"Not modelled: {NOT_MODELLED}.",
            _links(node),
            extrapolated(node, largest.nodes),
        ]
        return [line for line in lines if line]


def _links(node: Node) -> str:
    """Say what is reckoned with, in bytes and in bits: the two are easily confused."""
    between = node.inter.bandwidth / 1e9
    outside = f"{between:g} GB/s ({8 * between:g} Gbit/s)" if between else "n/a"
    return (
        f"Links of {node.name}: a ring inside a node carries {node.intra.bandwidth / 1e9:g} GB/s, "
        f"a node sends others {outside}."
    )


def _given(gpu: Gpu) -> str:
    """Say how much of its memory a GPU's driver gives, where that is not what it is sold with."""
    if gpu.sold is None:
        return ""
    return (
        f"Memory: the driver gives {gpu.memory / GIB:.2f} of the {gpu.sold / GIB:g} GiB of "
        f"{gpu.name}; plans use no more."
    )


def answer(anatomy: Anatomy, cluster: Cluster, question: Question) -> Plans:
    """Try every recipe that is asked for, and explain those that fit.

    Raises:
        PlanError: nothing fits, or there is nothing to try.
    """
    result = search(anatomy, cluster, question)
    check_any(anatomy, cluster, question, result)
    return Plans(explained(result), result.rejected, anatomy, cluster, question, result.left_out)
