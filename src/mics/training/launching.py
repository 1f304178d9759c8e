"""The ranks of a run: those of a launcher, or ranks of this machine that are started here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from mics.errors import CheckpointError, ConfigError
from mics.ranks.console import say
from mics.ranks.device import (
    default_device_type,
    expand_segments,
    num_devices,
    on_accelerator,
)
from mics.ranks.launcher import MOST_LOCAL_RANKS, Launch, full_world, more_ranks, read_launch
from mics.ranks.nodes_given import check_nodes_given, first_of_pods, without_srun
from mics.ranks.starting import leave_groups, run_local_ranks
from mics.training.config import TrainConfig
from mics.training.settings import check_settings, read_settings

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
        check_nodes_given()
        if words := without_srun():
            say(f"{words}: {ranks} rank(s) of this machine train. Write: srun mics train ...")
        if words := first_of_pods():
            say(words)
        return run_local_ranks(_work_here, ranks, default_device_type(), None, work, config)
    _say_idle(launch)
    code = work(config)
    leave_groups()
    return code


def _say_idle(launch: Launch) -> None:
    """Say that a node has more accelerators than the launcher has started ranks there."""
    devices = num_devices(default_device_type())
    if launch.rank == 0 and launch.knows_nodes and devices > launch.ranks_per_node:
        nodes = max(1, launch.world // launch.ranks_per_node)
        say(
            f"{launch.source} has started {launch.ranks_per_node} rank(s) on this node, which has "
            f"{devices} accelerators. For all of them write: {more_ranks(launch, nodes * devices)}"
        )


def train_as_worker(file: str, folder: str) -> None:
    """Train as one rank of a job whose process group somebody else has made, such as Ray.

    Args:
        file: configuration (TOML) of ``mics train``.
        folder: of the run, on storage that all ranks see.

    Raises:
        ConfigError: the configuration is not right, or there is no process group.
        MicsError: whatever ``mics train`` raises, or its last checkpoint was not written.
    """
    from mics.training.loop import train

    settings = read_settings(Path(file))
    settings = replace(settings, run=replace(settings.run, folder=Path(folder)))
    check_settings(settings)
    if not dist.is_initialized():
        raise ConfigError(
            "A worker trains in the process group of its launcher, and there is none.",
            write="mics train, which makes one",
        )
    if train(settings) != 0:
        raise CheckpointError("The last checkpoint could not be written.")


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
    if launch is None and wanted is not None and wanted > MOST_LOCAL_RANKS:
        raise ConfigError(
            f"parallel.ranks must be at most {MOST_LOCAL_RANKS} on one machine.",
            numbers=f"parallel.ranks = {wanted}.",
            write="torchrun or srun ... mics train, to start ranks on several machines",
        )
    if launch is not None:
        if wanted is not None and wanted not in (launch.world, full_world(launch.world)):
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
