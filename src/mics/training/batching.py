"""The batch triangle: global batch = micro-batch x micro-steps x ranks.

[Note: ranks that are away]
A step is what it is with all ranks of the job. Where some of them are away, its micro-batches are
dealt to the others, one each in turn, so some ranks may have none left in the last micro-step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mics.anatomy.recipe import default_sequence
from mics.errors import ConfigError
from mics.ranks.console import say
from mics.training.config import BatchConfig

_MICRO_BATCH = 8  # where nothing says otherwise; the paper's


@dataclass(frozen=True)
class Batching:
    """The triangle, solved. ``global_batch == micro_batch * micro_steps * ranks``.

    Args:
        global_batch: sequences of a step.
        micro_batch: sequences of a micro-batch.
        micro_steps: of the full job.
        ranks: of the full job.
    """

    global_batch: int
    micro_batch: int
    micro_steps: int
    ranks: int

    def __str__(self) -> str:
        return (
            f"{self.global_batch} sequences = {self.micro_batch} x {self.micro_steps} "
            f"micro-step(s) x {self.ranks} rank(s)"
        )

    @property
    def micro_batches(self) -> int:
        """How many a step has, over all ranks."""
        return self.micro_steps * self.ranks

    def dealt(self, rank: int, ranks: int) -> list[int | None]:
        """The micro-batches of a rank, by their number in the step; ``None`` counts nothing.

        See [Note: ranks that are away].

        Args:
            rank: one of ``ranks``.
            ranks: that there are now.
        """
        turns = -(-self.micro_batches // ranks)
        numbers = [turn * ranks + rank for turn in range(turns)]
        return [number if number < self.micro_batches else None for number in numbers]

    def on(self, ranks: int) -> str:
        """What is to be known of a step on so many ranks; empty for the full job."""
        if ranks == self.ranks:
            return ""
        turns, rest = divmod(self.micro_batches, ranks)
        idle = f", {ranks - rest} ranks are idle in the last one" if rest else ""
        return (
            f"{ranks} of {self.ranks} ranks: the same samples per step, in {turns + bool(rest)} "
            f"micro-step(s) instead of {self.micro_steps}{idle}; results equal the full run's to "
            "rounding, not to the bit, and dropout draws other numbers"
        )

    def kept(self) -> dict[str, int]:
        """What a run that goes on has to know of it."""
        return {"sequences": self.global_batch, "full_world": self.ranks}

    def say_if_another(self, before: Mapping[str, Any]) -> None:
        """Say so where the run went on with other steps than those so far.

        Args:
            before: has what ``kept`` returned then, and more; states from before it was kept have
                none.
        """
        sequences, ranks = before.get("sequences"), before.get("full_world")
        if sequences is None or sequences == self.global_batch:
            return
        say(
            f"STEPS HAVE ANOTHER SIZE: those so far were of {sequences} sequences, on {ranks} "
            f"rank(s) in full; from now on {self}. Where ranks are away, MICS_FULL_WORLD={ranks} "
            "keeps the steps as they were"
        )


def solve(config: BatchConfig, ranks: int) -> Batching:
    """Fill in what is not given.

    Any two give the third. One alone goes with a micro-batch of 8 and one micro-step, or as near
    as divides.

    Raises:
        ConfigError: a number below 1, or numbers that contradict; says which would work.
    """
    given = {
        "global_batch": config.global_batch,
        "micro_batch": config.micro_batch,
        "micro_steps": config.micro_steps,
    }
    for name, value in given.items():
        if value is not None and value < 1:
            raise ConfigError(
                f"batch.{name} must be at least 1.",
                numbers=f"batch.{name} = {value}.",
                write=f"--batch.{name} 1, or leave it out",
            )
    whole, micro, steps = given.values()
    if whole is None:
        micro, steps = micro or _MICRO_BATCH, steps or 1
        return Batching(micro * steps * ranks, micro, steps, ranks)
    if micro is not None and steps is not None and micro * steps * ranks != whole:
        raise ConfigError(
            "global_batch, micro_batch and micro_steps contradict each other.",
            numbers=f"{micro} x {steps} micro-step(s) x {ranks} rank(s) = {micro * steps * ranks}, "
            f"global_batch = {whole}.",
            write="two of the three",
        )
    per_rank, rest = divmod(whole, ranks)
    if rest or per_rank == 0:
        near = max(1, round(whole / ranks)) * ranks
        raise ConfigError(
            "global_batch cannot be shared out evenly over the ranks.",
            numbers=f"global_batch = {whole}, {ranks} ranks.",
            write=f"--batch.global-batch {near}",
        )
    if micro is None:
        steps = steps or -(-per_rank // _MICRO_BATCH)
        if config.micro_steps is None:
            while per_rank % steps:
                steps += 1
        _check_divides(whole, ranks, per_rank, "micro_steps", steps)
        return Batching(whole, per_rank // steps, steps, ranks)
    _check_divides(whole, ranks, per_rank, "micro_batch", micro)
    return Batching(whole, micro, per_rank // micro, ranks)


def sequence_length(asked: int, positions: int | None) -> int:
    """Tokens per sequence: ``data.sequence``, or where that is 0 the one that a plan has too."""
    return asked or default_sequence(positions)


def _check_divides(whole: int, ranks: int, per_rank: int, name: str, value: int) -> None:
    if per_rank % value:
        near = max(1, round(per_rank / value)) * value * ranks
        raise ConfigError(
            f"{name} does not divide a rank's part of global_batch.",
            numbers=f"global_batch = {whole} over {ranks} rank(s) is {per_rank} each, "
            f"{name} = {value}.",
            write=f"--batch.global-batch {near}, or a {name} that divides {per_rank}",
        )
