"""When nothing fits: what is missing, what each change saves, and which are enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from mics.anatomy.anatomy import Anatomy
from mics.anatomy.recipe import Recipe
from mics.errors import PlanError
from mics.hardware.cluster import Cluster
from mics.planning.host import FOR_SYSTEM
from mics.planning.inverse import (
    fewest_nodes,
    frugal_recipes,
    longest_sequence,
    with_partition,
)
from mics.planning.plan import Rejected, Search
from mics.planning.question import Question
from mics.planning.weighing import fits, needed_by
from mics.quantities import GIB
from mics.topology import possible_partitions


@dataclass(frozen=True)
class _Change:
    """Something to do differently, and the bytes it would need then."""

    text: str
    needed: float


Tried = Iterator[tuple[str, Recipe]]
"""What to write, and the recipe it makes."""


def check_any(anatomy: Anatomy, cluster: Cluster, question: Question, search: Search) -> None:
    """Raise when nothing fits, with what is nearest.

    Raises:
        PlanError: no plan; names what is missing, what each change saves, and what is enough.
    """
    if search.plans:
        return
    of_gpus = [one for one in search.rejected if not one.on_host]
    if not of_gpus:
        _refuse_host(min(search.rejected, key=lambda one: one.needed), cluster)
    nearest = min(of_gpus, key=lambda one: one.needed)
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


def _refuse_host(nearest: Rejected, cluster: Cluster) -> NoReturn:
    raise PlanError(
        f"Nothing fits: {nearest.way} on {cluster} needs {nearest.missing / GIB:.1f} GiB more of "
        "a node's own memory.",
        numbers=f"Activations, a checkpoint's snapshot and {cluster.node.gpus_per_node} processes "
        f"need {nearest.needed / GIB:.1f} GiB; {nearest.capacity / GIB:.1f} are there, beside the "
        f"{FOR_SYSTEM:.0%} of the system.",
        write="checkpointing, or a smaller micro-batch",
    )


def _instead(
    anatomy: Anatomy, cluster: Cluster, question: Question, changes: Sequence[_Change]
) -> str:
    """Say what is enough: one change, several, more nodes, or else."""
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
    least = replace(question.recipe, micro_batch=1, micro_steps=1, checkpointing=True, form="flat")
    recipes = [replace(least, partition=p) for p in possible_partitions(cluster.nodes, k)]
    needs = [needed_by(anatomy, cluster, recipe) for recipe in recipes]
    needed, recipe = min(zip(needs, recipes, strict=True), key=lambda pair: pair[0])
    sequence = longest_sequence(anatomy, cluster, recipe, limit=recipe.sequence)
    if sequence is not None:
        return f"sequence {sequence} with {recipe}"
    return f"a smaller model, or GPUs with {needed / GIB:.1f} GiB ({recipe})"


def _on(anatomy: Anatomy, cluster: Cluster, asked: Question, question: Question) -> str:
    """Name something that fits on so many nodes, in full."""
    recipe = next(r for r in frugal_recipes(cluster, asked) if fits(anatomy, cluster, r))
    text = f"nodes {cluster.nodes} with {recipe}"
    if question.global_batch is not None and asked.global_batch is None:
        text += f", global batch a multiple of {cluster.gpus * recipe.micro_batch}"
    return text


def _changes(
    anatomy: Anatomy, cluster: Cluster, question: Question, recipe: Recipe
) -> Iterator[_Change]:
    """Try every kind of change, each as small as is enough, or as large as it can be."""
    capacity = cluster.node.gpu.memory

    def first_enough(tried: Tried) -> _Change | None:
        change = None
        for text, other in tried:
            change = _Change(text, needed_by(anatomy, cluster, other))
            if change.needed <= capacity:
                break
        return change

    for kind in (_partitions, _micro_batches, _checkpointing, _offload, _sequences, _optimizers):
        change = first_enough(kind(cluster, question, recipe))
        if change is not None:
            yield change


def _partitions(cluster: Cluster, question: Question, recipe: Recipe) -> Tried:
    k = cluster.node.gpus_per_node
    for p in possible_partitions(cluster.nodes, k):
        if p > recipe.partition:
            yield f"partition {p}", with_partition(recipe, p, k)


def _micro_batches(cluster: Cluster, question: Question, recipe: Recipe) -> Tried:
    batch = recipe.micro_batch // 2
    while batch:
        steps = question.micro_steps(cluster, batch)
        if steps:
            yield f"micro-batch {batch}", replace(recipe, micro_batch=batch, micro_steps=steps)
        batch //= 2


def _checkpointing(cluster: Cluster, question: Question, recipe: Recipe) -> Tried:
    if not recipe.checkpointing:
        yield "checkpointing", replace(recipe, checkpointing=True)


def _offload(cluster: Cluster, question: Question, recipe: Recipe) -> Tried:
    if not recipe.offload and cluster.node.host is not None:
        yield "offload", replace(recipe, offload=True)


def _sequences(cluster: Cluster, question: Question, recipe: Recipe) -> Tried:
    sequence = recipe.sequence // 2
    while sequence >= 128:
        yield f"sequence {sequence}", replace(recipe, sequence=sequence)
        sequence //= 2


def _optimizers(cluster: Cluster, question: Question, recipe: Recipe) -> Tried:
    if recipe.optimizer == "adamw":
        yield "optimizer adamw-fused", replace(recipe, optimizer="adamw-fused")
