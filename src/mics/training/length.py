"""How long a run is, where it is told in epochs, and whether that is long enough to warm up."""

from __future__ import annotations

import math
from dataclasses import replace

from mics.errors import ConfigError
from mics.ranks.console import say
from mics.training.config import RunConfig, TrainConfig
from mics.training.progress import Progress
from mics.training.schedules import learning_rate


def in_steps(config: TrainConfig, sequences: int, global_batch: int) -> TrainConfig:
    """The options with the ``run.steps`` that ``run.epochs`` are.

    The last step is the one in which the last epoch is complete: its batch may go on into the next.

    Args:
        config: of the run.
        sequences: that there are to train on.
        global_batch: sequences of a step.

    Raises:
        ConfigError: both are given.
    """
    epochs = config.run.epochs
    if epochs is None:
        return config
    steps = max(1, _steps_to(epochs, Progress(), sequences, global_batch))
    if config.run.steps not in (RunConfig().steps, steps):
        raise ConfigError(
            "run.steps and run.epochs both say how long the run is.",
            numbers=f"{epochs:g} epoch(s) of {sequences:,} sequences are {steps:,} steps of "
            f"{global_batch}; run.steps = {config.run.steps}.",
            write=f"--run.steps {steps} without --run.epochs, or the other way round",
        )
    say(f"{epochs:g} epoch(s) of {sequences:,} sequences are {steps:,} steps of {global_batch}")
    return replace(config, run=replace(config.run, steps=steps, epochs=None))


def going_on(
    config: TrainConfig, epochs: float, at: Progress, sequences: int, global_batch: int
) -> TrainConfig:
    """The options of a run that goes on, whose steps so far may have been of another size or data.

    Args:
        config: what ``in_steps`` has returned.
        epochs: that were asked for.
        at: how far the run has come; its position is of the sequences that there are.
        sequences: that there are to train on.
        global_batch: sequences of a step from now on.
    """
    steps = at.step + _steps_to(epochs, at, sequences, global_batch)
    if at.step == 0 or steps == config.run.steps:
        return config
    say(
        f"the {at.step:,} steps so far have seen {at.position / sequences:.2f} epoch(s) of these "
        f"sequences: until it is {epochs:g} the run has {steps:,} steps"
    )
    return replace(config, run=replace(config.run, steps=steps))


def say_if_never_warm(config: TrainConfig) -> None:
    """Say so where the run ends before the learning rate has risen to its peak."""
    given, steps = config.optimizer, config.run.steps
    if given.warmup > steps:
        say(
            f"THE LEARNING RATE NEVER REACHES ITS PEAK: optimizer.warmup = {given.warmup:,}, and "
            f"the run has {steps:,} steps, the last with {learning_rate(given, steps, steps):.1e} "
            f"instead of {given.learning_rate:.1e}"
        )


def _steps_to(epochs: float, at: Progress, sequences: int, global_batch: int) -> int:
    """How many more steps there are until so many epochs are complete."""
    return max(0, math.ceil((epochs * sequences - at.position) / global_batch))
