"""What a plan is asked for, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mics.anatomy.memory import OPTIMIZERS
from mics.errors import PlanError
from mics.hardware.stacks import find_stack

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
MICRO_STEPS = 4


@dataclass(frozen=True)
class Question:
    """What is asked for.

    Args:
        sequence: tokens of one sequence.
        global_batch: sequences per step, from which the micro-steps follow.
        micro_steps: s, instead of a global batch; 4 by default.
        micro_batches: to try.
        partitions: to try; every legal one by default.
        checkpointing: to try.
        optimizer: see ``anatomy.memory.OPTIMIZERS``.
        compute_bytes: of a gathered parameter.
        reduce_bytes: of a gradient on the wire in hop 1.
        prefetch: blocks gathered ahead.
        reductions: see ``anatomy.memory.Setup``.
        stack: of software, see ``hardware.stacks``.
        fragmentation: what the allocator asks for over what is alive.
        runtime_gib: of a GPU that are gone before the first tensor is made.
        communicator_gib: buffers of each group of ranks.
        sigma: spread of a micro-step over GPUs, see ``simulation.step.straggling``.
        pipelined: see ``simulation.engines.Run``.

    Raises:
        PlanError: a figure that cannot be, or an unknown optimizer or software stack.
    """

    sequence: int
    global_batch: int | None = None
    micro_steps: int | None = None
    micro_batches: Sequence[int] = MICRO_BATCHES
    partitions: Sequence[int] | None = None
    checkpointing: Sequence[bool] = (False, True)
    optimizer: str = "adamw"
    compute_bytes: int = 2
    reduce_bytes: int = 4
    prefetch: int = 1
    reductions: int = 1
    stack: str = "eager"
    fragmentation: float = 1.05
    runtime_gib: float = 0.8
    communicator_gib: float = 0.35
    sigma: float = 0.02
    pipelined: bool = False

    def __post_init__(self) -> None:
        self._check_lists()
        self._check_figures()
        self._check_names()

    def _check_lists(self) -> None:
        for name in ("micro_batches", "partitions", "checkpointing"):
            several = getattr(self, name)
            if several is None:
                continue
            if not isinstance(several, Sequence):
                raise PlanError(f"{name} is what to try, got {several!r}.", write=f"[{several!r}]")
            if not several:
                raise PlanError(f"There is nothing to try: {name} is empty.")

    def _check_figures(self) -> None:
        for least, kind, names in _FIGURES:
            for name in names:
                given = getattr(self, name)
                for value in given if isinstance(given, Sequence) else [given]:
                    if value is not None and not _is_figure(value, kind, least):
                        raise PlanError(f"{name} must be {_SAID[kind]} {least}, got {value!r}.")
        if self.global_batch is not None and self.micro_steps is not None:
            raise PlanError(
                "micro_steps follow from global_batch; both were given.",
                numbers=f"global_batch {self.global_batch}, micro_steps {self.micro_steps}.",
                write="one of them",
            )

    def _check_names(self) -> None:
        for name, allowed in _CHOICES.items():
            given = getattr(self, name)
            if not all(
                type(value) is type(allowed[0]) and value in allowed
                for value in (given if isinstance(given, tuple | list) else [given])
            ):
                told = " or ".join(map(str, allowed))
                raise PlanError(f"{name} must be {told}, got {given!r}.")
        if not isinstance(self.optimizer, str) or self.optimizer not in OPTIMIZERS:
            raise PlanError(
                f"There is no optimizer {self.optimizer!r}.",
                numbers=f"Optimizers: {', '.join(OPTIMIZERS)}.",
            )
        find_stack(self.stack)


_FIGURES: tuple[tuple[int, type, tuple[str, ...]], ...] = (
    (1, int, ("sequence", "global_batch", "micro_steps", "micro_batches", "partitions")),
    (1, int, ("compute_bytes", "reduce_bytes", "reductions")),
    (0, int, ("prefetch",)),
    (1, float, ("fragmentation",)),
    (0, float, ("runtime_gib", "communicator_gib", "sigma")),
)
_CHOICES: dict[str, tuple[object, ...]] = {
    "checkpointing": (False, True),
    "pipelined": (False, True),
    "compute_bytes": (2, 4),
    "reduce_bytes": (2, 4),
}
_SAID = {int: "a whole number, at least", float: "a number, at least"}


def _is_figure(value: object, kind: type, least: int) -> bool:
    number = isinstance(value, int | kind) and not isinstance(value, bool)
    return number and isinstance(value, int | float) and least <= value < math.inf
