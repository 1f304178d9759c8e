"""How a step is run, and what is assumed of the machines that run it; integers, no torch.

Every part that weighs, times, plans, trains or forecasts a step takes the same ``Recipe``, so no
two of them can differ in what a step is. The verbs take their defaults from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mics.errors import PlanError
from mics.traffic import Form

MOST_RANKS = 1 << 27
MOST_MICRO_BATCH = 1 << 16
MOST_MICRO_STEPS = 1 << 20
MOST_BATCH = 1 << 32
MOST_SEQUENCE = 1 << 24
MOST_AHEAD = 1 << 10
MOST_FRAGMENTATION = 10.0
MOST_SIGMA = 10.0

LONGEST_BY_DEFAULT = 4096
"""Tokens of a sequence, at most, where nobody says how many: some models take very long ones."""

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
"""Which are tried where nobody names one."""

MOST = {
    "partition": MOST_RANKS,
    "partitions": MOST_RANKS,
    "micro_batch": MOST_MICRO_BATCH,
    "micro_batches": MOST_MICRO_BATCH,
    "micro_steps": MOST_BATCH,  # those of a global batch are more than anybody writes
    "global_batch": MOST_BATCH,
    "sequence": MOST_SEQUENCE,
    "prefetch": MOST_AHEAD,
    "fragmentation": MOST_FRAGMENTATION,
    "sigma": MOST_SIGMA,
}
"""The largest figure of each name: far above what anybody runs, and small enough to be weighed."""


@dataclass(frozen=True)
class Recipe:
    """How a step is run.

    Args:
        partition: p, how many ranks hold one replica together.
        micro_batch: how many sequences a rank takes in one micro-step.
        micro_steps: s, how many micro-steps make a step.
        checkpointing: whether every block's forward is computed again in backward.
        form: of hop 1 over several nodes, flat or hierarchical; "auto" is the faster.
        sequence: how many tokens a sequence has.
        compute_bytes: size of a number in a parameter that is gathered and computed with.
        reduce_bytes: size of a number in a gradient on the wire, in hop 1 and in hop 2.
        master_bytes: size of a number in a rank's shard of parameters and gradients.
        optimizer: one of ``anatomy.memory.OPTIMIZERS``.
        prefetch: how many blocks are gathered ahead.
        pipelined: whether a gather's stage between nodes runs beside the stage inside nodes of the
            gather before; on Gloo it always does.
        stack: which software runs it, one of ``hardware.stacks``.
        offload: whether what blocks save for backward is on the host until then.
        hop_two: bits of what mics' replicas exchange, see ``mics.shard``; ``None`` is
            ``reduce_bytes``.
        hop_two_form: of its all-reduces, where nodes have several replicas each; as ``form``.
        error_feedback: whether what fp8 and int8 round away is kept, in 4 bytes a value.
        dealt_states: whether each replica keeps the optimizer state of its share alone, as with
            ``mics.owned``. A step is timed as without: the bytes are the same.

    Raises:
        PlanError: a figure that cannot be.
    """

    partition: int
    micro_batch: int = 1
    micro_steps: int = 4
    checkpointing: bool = False
    form: Form | Literal["auto"] = "auto"
    sequence: int = 1
    compute_bytes: int = 2
    reduce_bytes: int = 4
    master_bytes: int = 4
    optimizer: str = "adamw-fused"
    prefetch: int = 1
    pipelined: bool = False
    stack: str = "eager"
    offload: bool = False
    hop_two: Literal["fp32", "bf16", "fp8", "int8"] | None = None
    hop_two_form: Form | Literal["auto"] = "auto"
    error_feedback: bool = True
    dealt_states: bool = False

    def __post_init__(self) -> None:
        check_whole(self, 1, "partition", "micro_batch", "micro_steps", "sequence")
        check_whole(self, 1, "compute_bytes", "reduce_bytes", "master_bytes")
        check_whole(self, 0, "prefetch")
        check_one_of(self, (False, True), "checkpointing", "pipelined", "offload")
        check_one_of(self, (False, True), "error_feedback", "dealt_states")
        if self.hop_two is not None:
            check_one_of(self, ("fp32", "bf16", "fp8", "int8"), "hop_two")
        check_one_of(self, ("auto", "flat", "hierarchical"), "form", "hop_two_form")

    def __str__(self) -> str:
        return f"p = {self.partition}, {self.setting}"

    @property
    def setting(self) -> str:
        """The micro-batch, what is computed again and what leaves: a way to run any partition."""
        extra = ", checkpointing" if self.checkpointing else ""
        extra += ", offload" if self.offload else ""
        return f"micro-batch {self.micro_batch}{extra}"

    @property
    def holds_back(self) -> bool:
        """Whether hop 2 keeps an error for each value of its blocks."""
        return self.hop_two in ("fp8", "int8") and self.error_feedback

    @property
    def may_sum_inside_nodes(self) -> bool:
        """Whether hop 2 may run in two stages, where nodes have several replicas each."""
        return self.hop_two_form != "flat" and self.hop_two not in ("fp8", "int8")

    def two_stages(self, gpus_per_node: int) -> bool:
        """Whether those of hop 1 may run in two stages: the group spans nodes of several GPUs."""
        return self.form != "flat" and self.partition > gpus_per_node > 1


@dataclass(frozen=True)
class Machine:
    """What is assumed of a machine whose ranks run a step, beside its GPUs and links.

    Args:
        runtime_gib: GiB of a GPU that are gone before the first tensor is made.
        communicator_gib: GiB of buffers for each group of ranks that a GPU is in.
        fragmentation: how many times what is alive the allocator asks for.
        reductions: how many buffers a unit has that is being reduced; two where ranks exchange.
        sigma: spread of a micro-step's time over GPUs, as a share of that time.

    Raises:
        PlanError: a figure that cannot be.
    """

    runtime_gib: float = 0.8
    communicator_gib: float = 0.35
    fragmentation: float = 1.05
    reductions: int = 1
    sigma: float = 0.02

    def __post_init__(self) -> None:
        check_number(self, 0, "runtime_gib", "communicator_gib", "sigma")
        check_number(self, 1, "fragmentation")
        check_whole(self, 1, "reductions")


def default_sequence(positions: int | None) -> int:
    """Choose the sequence of a plan, a dry run and a run for which nobody chooses one.

    Args:
        positions: of the model; ``None`` where it has no limit.
    """
    return min(positions or LONGEST_BY_DEFAULT, LONGEST_BY_DEFAULT)


def check_whole(record: object, least: int, *names: str) -> None:
    """Raise a PlanError unless these fields, or all items of those that are sequences, are counts.

    None may be above what ``MOST`` says of its name.

    Args:
        record: dataclass with the fields.
        least: the smallest count that is allowed.
        names: of the fields.
    """
    for name, value in _figures(record, names):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise PlanError(f"{name} must be a whole number, at least {least}, got {value!r}.")
        _check_most(name, value)


def check_number(record: object, least: float, *names: str) -> None:
    """Raise a PlanError unless these fields are numbers of at least so much, at most ``MOST``."""
    for name, value in _figures(record, names):
        if not isinstance(value, int | float) or isinstance(value, bool):
            in_range = False
        else:
            in_range = least <= value < math.inf
        if not in_range:
            raise PlanError(f"{name} must be a number, at least {least}, got {value!r}.")
        _check_most(name, value)


def _check_most(name: str, value: object) -> None:
    most = MOST.get(name, math.inf)
    if isinstance(value, int | float) and value > most:
        raise PlanError(f"{name} must be at most {most:,}, got {value!r}.")


def check_one_of(record: object, allowed: Sequence[object], *names: str) -> None:
    """Raise a PlanError unless these fields, or all their items, are among what is allowed."""
    kind = type(allowed[0])
    for name in names:
        if any(type(v) is not kind or v not in allowed for _, v in _figures(record, (name,))):
            among = " or ".join(map(str, allowed))
            raise PlanError(f"{name} must be {among}, got {getattr(record, name)!r}.")


def _figures(record: object, names: Sequence[str]) -> list[tuple[str, object]]:
    """Names and values; of a field that is a sequence, each of its items."""
    figures: list[tuple[str, object]] = []
    for name in names:
        given = getattr(record, name)
        several = isinstance(given, Sequence) and not isinstance(given, str)
        figures += [(name, value) for value in (given if several else [given])]
    return figures


ON_GPUS = Machine()
ON_HOSTS = Machine(runtime_gib=0.0, communicator_gib=0.0, reductions=2)
"""Ranks on CPUs: Gloo keeps no buffers for a group, and mics exchanges instead of reducing."""
