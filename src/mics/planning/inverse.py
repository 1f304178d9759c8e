"""The questions the other way round: how much may it be, how little need it be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product

from mics.anatomy.anatomy import Anatomy
from mics.hardware.cluster import Cluster
from mics.planning.plan import Way, micro_steps_of, needed_by
from mics.planning.question import Question
from mics.topology import possible_partitions
from mics.traffic import Form

MOST = 2048
"""Nodes, when the fewest are looked for."""
STEP = 128
"""Sequences are tried in multiples of it."""


def fits(anatomy: Anatomy, cluster: Cluster, question: Question, way: Way) -> bool:
    """Whether a way's memory is there."""
    return needed_by(anatomy, cluster, question, way) <= cluster.node.gpu.memory


def with_partition(way: Way, partition: int, gpus_per_node: int) -> Way:
    """The same with another partition, flat where that does not span nodes."""
    form: Form = "flat" if partition <= gpus_per_node else way.form
    return replace(way, partition=partition, form=form)


def smallest_partition(
    anatomy: Anatomy, cluster: Cluster, question: Question, way: Way
) -> int | None:
    """The smallest p with which a way fits; ``None`` if none does."""
    k = cluster.node.gpus_per_node
    for p in _partitions(cluster, question):
        if fits(anatomy, cluster, question, with_partition(way, p, k)):
            return p
    return None


def largest_micro_batch(
    anatomy: Anatomy, cluster: Cluster, question: Question, way: Way
) -> int | None:
    """The largest micro-batch with which a way fits; ``None`` if not even 1 does.

    With a global batch it is one that divides it.
    """

    def fitting(micro_batch: int) -> bool:
        steps = micro_steps_of(cluster, question, micro_batch)
        tried = replace(way, micro_batch=micro_batch, micro_steps=steps)
        return fits(anatomy, cluster, question, tried)

    if question.global_batch is None:
        return _largest(fitting, 1 << 16)
    of_each = question.global_batch // cluster.gpus
    dividing = (b for b in range(of_each, 0, -1) if micro_steps_of(cluster, question, b))
    return next(filter(fitting, dividing), None)


def longest_sequence(
    anatomy: Anatomy, cluster: Cluster, question: Question, way: Way, *, limit: int | None = None
) -> int | None:
    """The longest sequence with which a way fits; ``None`` if none does.

    A multiple of 128, or the limit, or what is asked for.

    Args:
        anatomy: of the model.
        cluster: nodes.
        question: gives all but the sequence.
        way: is kept.
        limit: positions the model has.
    """

    def fitting(sequence: int) -> bool:
        return fits(anatomy, cluster, replace(question, sequence=sequence), way)

    if limit is not None and fitting(limit):
        return limit
    most = (limit or 1 << 20) // STEP
    steps = _largest(lambda steps: fitting(steps * STEP), most) if most else None
    found: list[int] = [] if steps is None else [steps * STEP]
    if fitting(question.sequence):
        found.append(question.sequence)
    return max(found, default=None)


def fewest_nodes(anatomy: Anatomy, cluster: Cluster, question: Question) -> int | None:
    """The fewest nodes on which anything that may be tried fits.

    ``None`` if not even 2,048 do, nor as many as there are.
    """
    counts: list[int] = [*range(1, min(MOST, cluster.node.most_nodes) + 1), cluster.nodes]
    for nodes in counts:
        tried = replace(cluster, nodes=nodes)
        if any(fits(anatomy, tried, question, way) for way in frugal_ways(tried, question)):
            return nodes
    return None


def frugal_ways(cluster: Cluster, question: Question) -> Iterable[Way]:
    """Those that need least memory, as a rule: padding of odd shapes can make others need less."""
    partitions = _partitions(cluster, question)
    steps = {b: micro_steps_of(cluster, question, b) for b in question.micro_batches}
    batches = [b for b, s in steps.items() if s]
    if not partitions or not batches:
        return
    least = min(batches)
    # The smallest partition has fewest groups, which counts for models that fit anywhere.
    ends = dict.fromkeys((partitions[-1], partitions[0]))
    for p, checkpointing in product(ends, sorted(question.checkpointing, reverse=True)):
        yield Way(p, least, steps[least], checkpointing)


def _partitions(cluster: Cluster, question: Question) -> list[int]:
    """Legal ones that may be tried, ascending."""
    legal = possible_partitions(cluster.nodes, cluster.node.gpus_per_node)
    return [p for p in legal if question.partitions is None or p in question.partitions]


def _largest(fitting: Callable[[int], bool], limit: int) -> int | None:
    """The largest number that fits, by doubling and halving: what does not fit, more does not."""
    if not fitting(1):
        return None
    low = 1
    while low < limit and fitting(min(low * 2, limit)):
        low = min(low * 2, limit)
    high = min(low * 2, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fitting(middle):
            low = middle
        else:
            high = middle
    return low
