"""How long a run is, where it is told in epochs."""

from __future__ import annotations

import math
from dataclasses import replace

from mics.errors import ConfigError
from mics.ranks.console import say
from mics.training.config import RunConfig, TrainConfig


def in_steps(config: TrainConfig, sequences: int, global_batch: int) -> TrainConfig:
    """The options with ``run.steps`` in place of ``run.epochs``.

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
    steps = max(1, math.ceil(epochs * sequences / global_batch))
    if config.run.steps not in (RunConfig().steps, steps):
        raise ConfigError(
            "run.steps and run.epochs both say how long the run is.",
            numbers=f"{epochs:g} epoch(s) of {sequences:,} sequences are {steps:,} steps of "
            f"{global_batch}; run.steps = {config.run.steps}.",
            write=f"--run.steps {steps} without --run.epochs, or the other way round",
        )
    say(f"{epochs:g} epoch(s) of {sequences:,} sequences are {steps:,} steps of {global_batch}")
    return replace(config, run=replace(config.run, steps=steps, epochs=None))
