"""What a plan is asked for, checked: a recipe, and what to try in its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from mics.anatomy.memory import OPTIMIZERS
from mics.anatomy.recipe import MICRO_BATCHES, Recipe, check_one_of, check_whole
from mics.errors import PlanError
from mics.hardware.cluster import Cluster, host_of
from mics.hardware.stacks import find_stack
from mics.topology import possible_partitions
from mics.traffic import Form


@dataclass(frozen=True)
class Question:
    """What is asked of the planner: which recipes are tried.

    Args:
        recipe: what all of them have in common; the lists below take the place of its partition,
            micro-batch, checkpointing, form and offload.
        global_batch: sequences per step, from which the micro-steps follow.
        micro_batches: to try.
        partitions: to try; every legal one by default.
        checkpointing: to try.
        forms: to try where a partition group spans nodes.
        offload: to try where the link to the host is known; that activations leave is a way of its
            own only where they do not fit.

    Raises:
        PlanError: a figure that cannot be, or an unknown optimizer or software stack.
    """

    recipe: Recipe
    global_batch: int | None = None
    micro_batches: Sequence[int] = MICRO_BATCHES
    partitions: Sequence[int] | None = None
    checkpointing: Sequence[bool] = (False, True)
    forms: Sequence[Form] = ("flat", "hierarchical")
    offload: Sequence[bool] = (False, True)

    def __post_init__(self) -> None:
        given = [name for name in _LISTS if getattr(self, name) is not None]
        for name in given:
            several = getattr(self, name)
            if not isinstance(several, Sequence):
                raise PlanError(f"{name} is what to try, got {several!r}.", write=f"[{several!r}]")
            if not several:
                raise PlanError(f"There is nothing to try: {name} is empty.")
        if self.global_batch is not None:
            check_whole(self, 1, "global_batch")
        check_whole(self, 1, *(name for name in given if name in _COUNTS))
        check_one_of(self, (False, True), "checkpointing", "offload")
        check_one_of(self, ("flat", "hierarchical"), "forms")
        self._check_recipe()

    def _check_recipe(self) -> None:
        """Check the names and dtypes that a recipe leaves to who uses it."""
        check_one_of(self.recipe, (2, 4), "compute_bytes", "reduce_bytes")
        optimizer = self.recipe.optimizer
        if not isinstance(optimizer, str) or optimizer not in OPTIMIZERS:
            raise PlanError(
                f"There is no optimizer {optimizer!r}.",
                numbers=f"Optimizers: {', '.join(OPTIMIZERS)}.",
            )
        find_stack(self.recipe.stack)

    def recipes(self, cluster: Cluster) -> Iterator[Recipe]:
        """List every legal recipe, those of smaller partitions first.

        Raises:
            PlanError: there is none: a partition that is not legal, or a global batch that no
                micro-batch divides.
        """
        partitions = self._legal_partitions(cluster)
        steps = {b: self.micro_steps(cluster, b) for b in self.micro_batches}
        if not any(steps.values()):
            raise PlanError(
                f"No micro-batch divides a global batch of {self.global_batch} sequences.",
                numbers=f"{cluster.gpus} GPUs; tried {' '.join(map(str, self.micro_batches))}.",
                write=f"--global-batch {self._nearest_batch(cluster)}",
            )
        for p in partitions:
            for micro_batch, micro_steps in steps.items():
                if not micro_steps:
                    continue
                for checkpointing in dict.fromkeys(self.checkpointing):
                    for form, offload in product(
                        forms_of(p, cluster.node.gpus_per_node, self.forms), self.offloads(cluster)
                    ):
                        yield replace(
                            self.recipe,
                            partition=p,
                            micro_batch=micro_batch,
                            micro_steps=micro_steps,
                            checkpointing=checkpointing,
                            form=form,
                            offload=offload,
                        )

    def offloads(self, cluster: Cluster) -> list[bool]:
        """Which of the offloads that are asked for can be planned, what stays first.

        Raises:
            PlanError: nothing but that activations leave is asked for, over a link nobody knows.
        """
        if False not in self.offload:
            host_of(cluster)
        known = cluster.node.host is not None
        return sorted({offload for offload in self.offload if known or not offload})

    def micro_steps(self, cluster: Cluster, micro_batch: int) -> int:
        """Count the micro-steps that go with a micro-batch; 0 where the global batch has none."""
        if self.global_batch is None:
            return self.recipe.micro_steps
        steps, rest = divmod(self.global_batch, cluster.gpus * micro_batch)
        return 0 if rest else steps

    def _legal_partitions(self, cluster: Cluster) -> list[int]:
        legal = possible_partitions(cluster.nodes, cluster.node.gpus_per_node)
        partitions = list(dict.fromkeys(self.partitions or legal))
        for p in partitions:
            if p not in legal:
                raise PlanError(
                    f"partition {p} is not possible with {cluster}.",
                    numbers=f"Possible: {' '.join(map(str, legal))}.",
                )
        return partitions

    def _nearest_batch(self, cluster: Cluster) -> int:
        least = cluster.gpus * min(self.micro_batches)
        return max(1, round((self.global_batch or 0) / least)) * least


_LISTS = ("micro_batches", "partitions", "checkpointing", "forms", "offload")
_COUNTS = ("micro_batches", "partitions")


def forms_of(partition: int, gpus_per_node: int, forms: Sequence[Form]) -> Sequence[Form]:
    """List the forms that a partition's collectives may have: flat alone on one node."""
    return forms if partition > gpus_per_node > 1 else ("flat",)
