"""The ranks of a run: those of a launcher, or ranks of this machine that are started here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mics.errors import ConfigError
from mics.ranks.console import say
from mics.ranks.device import default_device_type, expand_segments, on_accelerator
from mics.ranks.launcher import Launch, allocated_tasks, more_ranks, read_launch
from mics.ranks.starting import MOST_RANKS, leave_groups, run_local_ranks
from mics.training.config import TrainConfig

Work = Callable[[TrainConfig], int]
"""What every rank does; returns the rank's exit code."""


def run_on_ranks(work: Work, config: TrainConfig) -> int:
    """Run ``work(config)`` on every rank of the job, or on ranks started here.

    Returns:
        What this rank of a launcher returned; of ranks started here the largest code, or 1 when one
        failed, which has then said why.

    Raises:
        ConfigError: the number of ranks contradicts the launcher, or there are no such devices.
        MicsError: this is a rank of a launcher, and the work raised it.
    """
    expand_segments(default_device_type())
    launch = read_launch()
    ranks = num_ranks(config, launch)
    if launch is None:
        if allocated_tasks() > 1:
            say(
                f"Slurm has allocated {allocated_tasks()} tasks, but srun has not started this "
                f"process: {ranks} rank(s) of this machine train. Write: srun mics train ..."
            )
        return run_local_ranks(_work_here, ranks, default_device_type(), None, work, config)
    code = work(config)
    leave_groups()
    return code


def _work_here(launch: Launch, work: Work, config: TrainConfig) -> int:
    return work(config)


def num_ranks(config: TrainConfig, launch: Launch | None) -> int:
    """How many ranks there are, or are to be started.

    Raises:
        ConfigError: more than there are accelerators, or other than the launcher's.
    """
    wanted = config.parallel.ranks
    if wanted is not None and wanted < 1:
        raise ConfigError(
            "parallel.ranks must be at least 1.",
            numbers=f"parallel.ranks = {wanted}.",
            write="--parallel.ranks 1, or leave it out",
        )
    if launch is None and wanted is not None and wanted > MOST_RANKS:
        raise ConfigError(
            f"parallel.ranks must be at most {MOST_RANKS} on one machine.",
            numbers=f"parallel.ranks = {wanted}.",
            write="torchrun or srun ... mics train, to start ranks on several machines",
        )
    if launch is not None:
        if wanted is not None and wanted != launch.world:
            raise ConfigError(
                f"parallel.ranks is for ranks started here, but {launch.source} has started some.",
                numbers=f"parallel.ranks = {wanted}, {launch.source} started {launch.world}.",
                write=f"{more_ranks(launch, wanted)}, and leave --parallel.ranks out",
            )
        return launch.world
    if not on_accelerator(default_device_type()):
        return wanted or 1
    devices = torch.accelerator.device_count()
    if wanted is not None and wanted > devices:
        raise ConfigError(
            "There are fewer accelerators than ranks.",
            numbers=f"parallel.ranks = {wanted}, {devices} accelerator(s).",
            write=f"--parallel.ranks {devices}",
        )
    return wanted or devices
