"""The questions the other way round: how much may it be, how little need it be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product

from mics.anatomy.anatomy import Anatomy
from mics.anatomy.recipe import MOST_MICRO_BATCH, Recipe
from mics.hardware.cluster import Cluster
from mics.planning.question import Question
from mics.planning.weighing import fits
from mics.topology import possible_partitions

MOST = 2048
"""Nodes, when the fewest are looked for."""
STEP = 128
"""Sequences are tried in multiples of it."""


@dataclass(frozen=True)
class Limits:
    """How far a recipe may be changed in one direction and still fits; ``None`` where it may not.

    Args:
        partition: the smallest.
        micro_batch: the largest.
        sequence: the longest.
        positions: of the model, which its sequences cannot exceed.
        nodes: the fewest on which anything that was asked for fits.
    """

    partition: int | None
    micro_batch: int | None
    sequence: int | None
    positions: int | None
    nodes: int | None

    def __str__(self) -> str:
        of_model = " (the model's positions)" if self.sequence == self.positions else ""
        return (
            f"Around it: partition down to {self.partition}, micro-batch up to {self.micro_batch}, "
            f"sequence up to {self.sequence}{of_model}; fewest nodes on which anything fits "
            f"{self.nodes}."
        )


def limits_around(anatomy: Anatomy, cluster: Cluster, question: Question, recipe: Recipe) -> Limits:
    """Find how far a recipe may be changed, one figure at a time."""
    return Limits(
        smallest_partition(anatomy, cluster, question, recipe),
        largest_micro_batch(anatomy, cluster, question, recipe),
        longest_sequence(anatomy, cluster, recipe, limit=anatomy.positions),
        anatomy.positions,
        fewest_nodes(anatomy, cluster, question),
    )


def with_partition(recipe: Recipe, partition: int, gpus_per_node: int) -> Recipe:
    """Change the partition; it gathers flat where it does not span nodes."""
    form = "flat" if partition <= gpus_per_node else recipe.form
    return replace(recipe, partition=partition, form=form)


def smallest_partition(
    anatomy: Anatomy, cluster: Cluster, question: Question, recipe: Recipe
) -> int | None:
    """Find the smallest p with which a recipe fits; ``None`` if none does."""
    k = cluster.node.gpus_per_node
    for p in _partitions(cluster, question):
        if fits(anatomy, cluster, with_partition(recipe, p, k)):
            return p
    return None


def largest_micro_batch(
    anatomy: Anatomy, cluster: Cluster, question: Question, recipe: Recipe
) -> int | None:
    """Find the largest micro-batch with which a recipe fits; ``None`` if not even 1 does.

    With a global batch it is one that divides it.
    """

    def fitting(micro_batch: int) -> bool:
        steps = question.micro_steps(cluster, micro_batch)
        tried = replace(recipe, micro_batch=micro_batch, micro_steps=steps)
        return fits(anatomy, cluster, tried)

    if question.global_batch is None:
        return _largest(fitting, MOST_MICRO_BATCH)
    of_each = min(question.global_batch // cluster.gpus, MOST_MICRO_BATCH)
    dividing = (b for b in range(of_each, 0, -1) if question.micro_steps(cluster, b))
    return next(filter(fitting, dividing), None)


def longest_sequence(
    anatomy: Anatomy, cluster: Cluster, recipe: Recipe, *, limit: int | None = None
) -> int | None:
    """Find the longest sequence with which a recipe fits; ``None`` if none does.

    It is a multiple of 128, or the limit, or the recipe's own.

    Args:
        anatomy: of the model.
        cluster: nodes.
        recipe: gives all but the sequence.
        limit: positions the model has.
    """

    def fitting(sequence: int) -> bool:
        return fits(anatomy, cluster, replace(recipe, sequence=sequence))

    if limit is not None and fitting(limit):
        return limit
    most = (limit or 1 << 20) // STEP
    steps = _largest(lambda steps: fitting(steps * STEP), most) if most else None
    sequences: list[int] = [] if steps is None else [steps * STEP]
    if fitting(recipe.sequence):
        sequences.append(recipe.sequence)
    return max(sequences, default=None)


def fewest_nodes(anatomy: Anatomy, cluster: Cluster, question: Question) -> int | None:
    """Find the fewest nodes on which anything that may be tried fits.

    ``None`` if not even 2,048 do, nor as many as there are.
    """
    counts: list[int] = [*range(1, min(MOST, cluster.node.most_nodes) + 1), cluster.nodes]
    for nodes in counts:
        tried = replace(cluster, nodes=nodes)
        if any(fits(anatomy, tried, recipe) for recipe in frugal_recipes(tried, question)):
            return nodes
    return None


def frugal_recipes(cluster: Cluster, question: Question) -> Iterable[Recipe]:
    """List those that need least memory, as a rule.

    Padding of odd shapes can make others need less.
    """
    partitions = _partitions(cluster, question)
    steps = {b: question.micro_steps(cluster, b) for b in question.micro_batches}
    batches = [b for b, s in steps.items() if s]
    if not partitions or not batches:
        return
    least = min(batches)
    # The smallest partition has fewest groups, which counts for models that fit anywhere.
    ends = dict.fromkeys((partitions[-1], partitions[0]))
    again, leave = sorted(question.checkpointing)[::-1], question.offloads(cluster)[::-1]
    for p, checkpointing, offload in product(ends, again, leave):
        yield replace(
            question.recipe,
            partition=p,
            micro_batch=least,
            micro_steps=steps[least],
            checkpointing=checkpointing,
            offload=offload,
            form="flat",
        )


def _partitions(cluster: Cluster, question: Question) -> list[int]:
    """List the legal partitions that may be tried, ascending."""
    legal = possible_partitions(cluster.nodes, cluster.node.gpus_per_node)
    return [p for p in legal if question.partitions is None or p in question.partitions]


def _largest(fitting: Callable[[int], bool], limit: int) -> int | None:
    """Find the largest number that fits, by doubling and halving: of what does not fit, no more."""
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
