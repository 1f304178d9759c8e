"""The batch triangle: global batch = micro-batch x micro-steps x ranks."""

from __future__ import annotations

from dataclasses import dataclass

from mics.errors import ConfigError
from mics.training.config import BatchConfig

_LONGEST_BY_DEFAULT = 1024
_MICRO_BATCH = 8  # where nothing says otherwise; the paper's


@dataclass(frozen=True)
class Batching:
    """The triangle, solved. ``global_batch == micro_batch * micro_steps * ranks``."""

    global_batch: int
    micro_batch: int
    micro_steps: int
    ranks: int

    def __str__(self) -> str:
        return (
            f"{self.global_batch} sequences = {self.micro_batch} x {self.micro_steps} "
            f"micro-step(s) x {self.ranks} rank(s)"
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
    """Tokens per sequence: ``data.sequence``, or where that is 0 what the model has positions for.

    1024 at most, unless more are asked for: some models have no limit, or a very high one.
    """
    return asked or min(positions or _LONGEST_BY_DEFAULT, _LONGEST_BY_DEFAULT)


def _check_divides(whole: int, ranks: int, per_rank: int, name: str, value: int) -> None:
    if per_rank % value:
        near = max(1, round(per_rank / value)) * value * ranks
        raise ConfigError(
            f"{name} does not divide a rank's part of global_batch.",
            numbers=f"global_batch = {whole} over {ranks} rank(s) is {per_rank} each, "
            f"{name} = {value}.",
            write=f"--batch.global-batch {near}, or a {name} that divides {per_rank}",
        )
