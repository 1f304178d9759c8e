"""The five figures in which a plan, a dry run and a run must agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mics.anatomy.anatomy import Anatomy
from mics.anatomy.recipe import Recipe
from mics.hardware.cluster import Cluster
from mics.planning.weighing import needed_by
from mics.quantities import size


@dataclass(frozen=True)
class Figures:
    """How a step is run, and what it needs of a GPU.

    Args:
        partition: p.
        micro_batch: sequences of a rank and micro-step.
        micro_steps: of a step.
        sequence: tokens of a sequence.
        memory_bytes: of a GPU: its runtime, the buffers of its groups and fragmentation included.
    """

    partition: int
    micro_batch: int
    micro_steps: int
    sequence: int
    memory_bytes: int

    def __str__(self) -> str:
        return (
            f"p = {self.partition}, micro-batch {self.micro_batch}, micro-steps "
            f"{self.micro_steps}, sequence {self.sequence}, {size(self.memory_bytes)} of a GPU"
        )


def figures_of(anatomy: Anatomy, cluster: Cluster, recipes: Sequence[Recipe]) -> Figures:
    """Work out the figures of a step.

    Args:
        anatomy: of the model.
        cluster: it runs on.
        recipes: one, or several that differ in the form of their collectives, where a run measures
            which is faster: then memory is that of the form that needs more.
    """
    first = recipes[0]
    memory = max(needed_by(anatomy, cluster, recipe) for recipe in recipes)
    return Figures(
        first.partition, first.micro_batch, first.micro_steps, first.sequence, round(memory)
    )
