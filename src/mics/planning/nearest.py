"""When nothing fits: what is missing, what each change saves, and which are enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mics.anatomy.anatomy import Anatomy
from mics.errors import PlanError
from mics.hardware.cluster import Cluster
from mics.planning.inverse import (
    fewest_nodes,
    fits,
    frugal_ways,
    longest_sequence,
    with_partition,
)
from mics.planning.plan import GIB, Search, Way, micro_steps_of, needed_by
from mics.planning.question import Question
from mics.topology import possible_partitions


@dataclass(frozen=True)
class _Change:
    """Something to do differently, and the bytes it would need then."""

    text: str
    needed: float


Tried = Iterator[tuple[str, Question, Way]]


def check_any(anatomy: Anatomy, cluster: Cluster, question: Question, search: Search) -> None:
    """Raise when nothing fits, with what is nearest.

    Raises:
        PlanError: no plan; names what is missing, what each change saves, and what is enough.
    """
    if search.plans:
        return
    nearest = min(search.rejected, key=lambda one: one.needed)
    changes = [
        change
        for change in _changes(anatomy, cluster, question, nearest.way)
        if change.needed < nearest.needed
    ]
    saved = [f"{c.text} saves {(nearest.needed - c.needed) / GIB:.1f}" for c in changes]
    raise PlanError(
        f"Nothing fits: {nearest.way} on {cluster} needs {nearest.missing / GIB:.1f} GiB more.",
        numbers=f"It needs {nearest.needed / GIB:.1f} of {nearest.capacity / GIB:.1f} GiB"
        + (f"; {', '.join(saved)}." if saved else "."),
        write=_instead(anatomy, cluster, question, changes),
    )


def _instead(
    anatomy: Anatomy, cluster: Cluster, question: Question, changes: Sequence[_Change]
) -> str:
    """What is enough: one change, several, more nodes, or else."""
    capacity, k = cluster.node.gpu.memory, cluster.node.gpus_per_node
    enough = [change.text for change in changes if change.needed <= capacity]
    if enough:
        return " or ".join(enough) + (", each is enough" if len(enough) > 1 else "")
    free = replace(
        question, micro_batches=(1,), checkpointing=(True,), partitions=None, global_batch=None
    )
    for asked in (question, free):
        nodes = fewest_nodes(anatomy, cluster, asked)
        if nodes is not None:
            return _on(anatomy, replace(cluster, nodes=nodes), asked, question)
    ways = [Way(p, 1, 1, True) for p in possible_partitions(cluster.nodes, k)]
    needs = [needed_by(anatomy, cluster, free, way) for way in ways]
    needed, way = min(zip(needs, ways, strict=True), key=lambda pair: pair[0])
    sequence = longest_sequence(anatomy, cluster, free, way, limit=question.sequence)
    if sequence is not None:
        return f"sequence {sequence} with {way}"
    return f"a smaller model, or GPUs with {needed / GIB:.1f} GiB ({way})"


def _on(anatomy: Anatomy, cluster: Cluster, asked: Question, question: Question) -> str:
    """Something that fits on so many nodes, in full."""
    way = next(w for w in frugal_ways(cluster, asked) if fits(anatomy, cluster, asked, w))
    text = f"nodes {cluster.nodes} with {way}"
    if question.global_batch is not None and asked.global_batch is None:
        text += f", global batch a multiple of {cluster.gpus * way.micro_batch}"
    return text


def _changes(anatomy: Anatomy, cluster: Cluster, question: Question, way: Way) -> Iterator[_Change]:
    """Each as small as is enough, or as large as it can be."""
    capacity = cluster.node.gpu.memory

    def first_enough(tried: Tried) -> _Change | None:
        change = None
        for text, asked, other in tried:
            change = _Change(text, needed_by(anatomy, cluster, asked, other))
            if change.needed <= capacity:
                break
        return change

    for kind in (_partitions, _micro_batches, _checkpointing, _sequences, _optimizers):
        found = first_enough(kind(cluster, question, way))
        if found is not None:
            yield found


def _partitions(cluster: Cluster, question: Question, way: Way) -> Tried:
    k = cluster.node.gpus_per_node
    for p in possible_partitions(cluster.nodes, k):
        if p > way.partition:
            yield f"partition {p}", question, with_partition(way, p, k)


def _micro_batches(cluster: Cluster, question: Question, way: Way) -> Tried:
    batch = way.micro_batch // 2
    while batch:
        steps = micro_steps_of(cluster, question, batch)
        if steps:
            other = replace(way, micro_batch=batch, micro_steps=steps)
            yield f"micro-batch {batch}", question, other
        batch //= 2


def _checkpointing(cluster: Cluster, question: Question, way: Way) -> Tried:
    if not way.checkpointing:
        yield "checkpointing", question, replace(way, checkpointing=True)


def _sequences(cluster: Cluster, question: Question, way: Way) -> Tried:
    sequence = question.sequence // 2
    while sequence >= 128:
        yield f"sequence {sequence}", replace(question, sequence=sequence), way
        sequence //= 2


def _optimizers(cluster: Cluster, question: Question, way: Way) -> Tried:
    if question.optimizer == "adamw":
        yield "optimizer adamw-fused", replace(question, optimizer="adamw-fused"), way
