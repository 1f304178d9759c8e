"""The questions the other way round: how much may it be, how little need it be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from mics.errors import PlanError
from mics.planning.plan import (
    GIB,
    Question,
    Search,
    Way,
    needed_by,
)
from mics.simulation.anatomy import Anatomy
from mics.simulation.hardware import Cluster
from mics.topology import possible_partitions

_MOST_NODES = 2048


def fits(anatomy: Anatomy, cluster: Cluster, question: Question, way: Way) -> bool:
    """Whether a way's memory is there."""
    return needed_by(anatomy, cluster, question, way) <= cluster.node.gpu.memory


def smallest_partition(
    anatomy: Anatomy, cluster: Cluster, question: Question, micro_batch: int, checkpointing: bool
) -> int | None:
    """The smallest p that fits; ``None`` if none does."""
    for p in possible_partitions(cluster.nodes, cluster.node.gpus_per_node):
        if fits(anatomy, cluster, question, _way(p, micro_batch, checkpointing, question)):
            return p
    return None


def largest_micro_batch(
    anatomy: Anatomy, cluster: Cluster, question: Question, partition: int, checkpointing: bool
) -> int | None:
    """The largest micro-batch that fits; ``None`` if not even 1 does."""

    def fitting(micro_batch: int) -> bool:
        way = _way(partition, micro_batch, checkpointing, question)
        return fits(anatomy, cluster, question, way)

    return _largest(fitting, 1 << 16)


def longest_sequence(
    anatomy: Anatomy,
    cluster: Cluster,
    question: Question,
    partition: int,
    micro_batch: int,
    checkpointing: bool,
    *,
    step: int = 128,
    limit: int | None = None,
) -> int | None:
    """The longest sequence that fits, a multiple of ``step``; ``None`` if none does.

    Args:
        limit: positions the model has.
    """

    def fitting(steps: int) -> bool:
        asked = replace(question, sequence=steps * step)
        return fits(anatomy, cluster, asked, _way(partition, micro_batch, checkpointing, asked))

    most = (limit or 1 << 20) // step
    found = _largest(fitting, most) if most else None
    return None if found is None else found * step


def fewest_nodes(anatomy: Anatomy, cluster: Cluster, question: Question) -> int | None:
    """The fewest nodes on which anything fits; ``None`` if not even 2,048 do."""

    def fitting(nodes: int) -> bool:
        tried = replace(cluster, nodes=nodes)
        frugal = _way(tried.gpus, min(question.micro_batches), True, question)
        return fits(anatomy, tried, question, frugal)

    nodes = 1
    while nodes <= _MOST_NODES:
        if fitting(nodes):
            break
        nodes *= 2
    else:
        return None
    low = nodes // 2
    while nodes - low > 1:
        middle = (low + nodes) // 2
        if fitting(middle):
            nodes = middle
        else:
            low = middle
    return nodes


def check_any(anatomy: Anatomy, cluster: Cluster, question: Question, search: Search) -> None:
    """Raise when nothing fits, with what is nearest.

    Raises:
        PlanError: no plan; names what is missing, what each change saves, and the fewest nodes.
    """
    if search.plans:
        return
    nearest = min(search.rejected, key=lambda one: one.needed)
    saved = [
        f"{text} saves {(nearest.needed - needed) / GIB:.1f}"
        for text, needed in _changes(anatomy, cluster, question, nearest.way)
        if needed < nearest.needed
    ]
    nodes = fewest_nodes(anatomy, cluster, question)
    raise PlanError(
        f"Nothing fits: {nearest.way} on {cluster} needs {nearest.missing / GIB:.1f} GiB more.",
        numbers=f"It needs {nearest.needed / GIB:.1f} of {nearest.capacity / GIB:.1f} GiB"
        + (f"; {', '.join(saved)}." if saved else "."),
        write=_instead(cluster, nodes),
    )


def _instead(cluster: Cluster, nodes: int | None) -> str:
    if nodes is None:
        return "a smaller model, a shorter --sequence or a GPU with more memory"
    if nodes <= cluster.nodes:
        return "checkpointing, a smaller micro-batch or a larger partition"
    return f"--nodes {nodes}, the fewest on which it fits"


def _changes(
    anatomy: Anatomy, cluster: Cluster, question: Question, way: Way
) -> Iterator[tuple[str, float]]:
    larger = [
        p
        for p in possible_partitions(cluster.nodes, cluster.node.gpus_per_node)
        if p > way.partition
    ]
    changed = []
    if larger:
        changed.append((f"p {larger[0]}", replace(way, partition=larger[0])))
    if way.micro_batch > 1:
        half = way.micro_batch // 2
        changed.append((f"micro-batch {half}", replace(way, micro_batch=half)))
    if not way.checkpointing:
        changed.append(("checkpointing", replace(way, checkpointing=True)))
    for text, other in changed:
        yield text, needed_by(anatomy, cluster, question, other)
    half = question.sequence // 2
    shorter = replace(question, sequence=half)
    yield f"sequence {half}", needed_by(anatomy, cluster, shorter, way)
    if question.optimizer == "adamw":
        fused = replace(question, optimizer="adamw-fused")
        yield "a fused optimizer", needed_by(anatomy, cluster, fused, way)


def _way(partition: int, micro_batch: int, checkpointing: bool, question: Question) -> Way:
    return Way(partition, micro_batch, question.micro_steps, checkpointing)


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
