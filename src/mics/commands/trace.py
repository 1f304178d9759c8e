"""``mics trace``: some steps of a training script, recorded on all ranks into one file."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from mics.commands.dashes import parse_before_file
from mics.commands.numbers import check_numbers
from mics.errors import ConfigError, TraceError
from mics.quantities import Within
from mics.ranks.console import progress
from mics.ranks.launcher import MOST_RANKS, Launch, more_ranks, read_launch

_CONFIGURATION = ".toml"
_NO_HANG = 0.0  # the first rank writes for a while, and is no rank that hangs


@dataclass(frozen=True)
class Config:
    """Record some steps of a training that uses mics, and end it.

    What is trained follows the options: a script and its arguments, or a configuration of `mics
    train` and its options. Under torchrun, Slurm or MPI this is one rank of the job; otherwise
    ranks are started here. Rank 0 writes one file for https://ui.perfetto.dev with all ranks, and
    says in words what was computed, what was waited for, and for whom.
    """

    ranks: Annotated[int | None, Within(1, MOST_RANKS)] = None
    """Ranks to start here, where no launcher has: one per accelerator by default, or 1."""

    gpus_per_node: Annotated[int | None, Within(1, MOST_RANKS)] = None
    """Ranks of those that stand for one node; all of them by default."""

    steps: Annotated[int, Within(1, 1000)] = 3
    """Optimizer steps that are recorded."""

    skip: Annotated[int, Within(1, 1_000_000)] = 3
    """Steps before them; in the last of these the profiler runs already."""

    out: Path = Path("trace.json.gz")
    """The file, .json or .json.gz; it is overwritten."""

    command: tyro.conf.Positional[tuple[str, ...]] = ()
    """The script and its arguments, or the configuration and its options."""


def parse(words: Sequence[str], **keywords: object) -> Config:
    """Options before the script or the configuration, its own behind it."""
    config: Config = parse_before_file(Config, words, (".py", _CONFIGURATION), **keywords)
    return config


def run(config: Config) -> int:
    """Trace this rank of a job, or ranks that are started here.

    Returns:
        0; 2 when there is nothing to trace; what the rank that failed returned.

    Raises:
        MicsError: an option is not right, or the training fails or ends too early.
    """
    check_numbers(config)
    if not config.command:
        progress("mics trace: no script; write it behind the options: mics trace train.py")
        return 2
    if not Path(config.command[0]).is_file():
        raise TraceError(
            f"There is no script or configuration {config.command[0]}.",
            write="mics trace [options] <script.py or job.toml>",
        )
    launch = read_launch()
    from mics.lab.tracing.file import check_file

    if launch is None or launch.rank == 0:  # who writes it; other nodes need not have the folder
        check_file(config.out)
    config = _as_the_trainer_says(config)
    return _start_ranks(config) if launch is None else _trace_here(config, launch)


def _is_trainer(config: Config) -> bool:
    return config.command[0].endswith(_CONFIGURATION)


def _as_the_trainer_says(config: Config) -> Config:
    """Take ranks and nodes from a trainer's configuration, where the options do not say them.

    Raises:
        ConfigError: both say them, and differ.
    """
    if not _is_trainer(config):
        return config
    from mics.commands.options.train import parse as parse_train

    parallel = parse_train(config.command).options.parallel
    for name in ("ranks", "gpus_per_node"):
        own, told = getattr(config, name), getattr(parallel, name)
        option = f"--{name.replace('_', '-')}"
        if own is not None and told is not None and own != told:
            raise ConfigError(
                f"{option} and the configuration differ.",
                numbers=f"{option} {own}, parallel.{name} = {told}.",
                write=f"--parallel.{name.replace('_', '-')} {own} behind the configuration",
            )
    return replace(
        config,
        ranks=config.ranks or parallel.ranks,
        gpus_per_node=config.gpus_per_node or parallel.gpus_per_node,
    )


def _start_ranks(config: Config) -> int:
    """Run the same command on ranks of this machine."""
    from mics.agent.running import run_agent
    from mics.agent.settings import Settings
    from mics.ranks.device import default_device_type, num_devices, on_accelerator

    device = default_device_type()
    ranks = config.ranks or (num_devices(device) if on_accelerator(device) else 1)
    per_node = config.gpus_per_node or ranks
    if ranks % per_node:
        raise ConfigError(
            "--gpus-per-node must divide --ranks.",
            numbers=f"--ranks {ranks}, --gpus-per-node {per_node}.",
            write=f"--ranks {ranks + -ranks % per_node}",
        )
    words = ["--gpus-per-node", str(per_node), "--steps", str(config.steps)]
    words += ["--skip", str(config.skip), "--out", str(config.out), "--", *config.command]
    command = [sys.executable, "-m", "mics", "trace", *words]
    return run_agent(Settings(command, ranks, [], restarts=0, grace=5.0, hang_seconds=_NO_HANG))


def _trace_here(config: Config, launch: Launch) -> int:
    if config.ranks is not None and config.ranks != launch.world:
        raise ConfigError(
            f"--ranks is for ranks started here, but {launch.source} has started some.",
            numbers=f"--ranks {config.ranks}, {launch.source} started {launch.world}.",
            write=f"{more_ranks(launch, config.ranks)}, and leave --ranks out",
        )
    from mics.lab.tracing.scripts import trace_program
    from mics.lab.tracing.tracing import Options

    program = _trainer if _is_trainer(config) else _script
    return trace_program(program(config, launch), Options(config.out, config.steps, config.skip))


def _stand_for_nodes(config: Config, launch: Launch) -> None:
    """Say in torchrun's variables how many ranks stand for a node, where all are of this one."""
    from mics.ranks.device import default_device_type, on_accelerator

    per_node = config.gpus_per_node
    if per_node is None or per_node == launch.ranks_per_node:
        return
    if not launch.one_node:
        raise ConfigError(
            "--gpus-per-node is for ranks of one machine that stand for several.",
            numbers=f"{launch.source} has started {launch.world} ranks, "
            f"{launch.ranks_per_node} on each node.",
            write="nothing: the launcher says how many ranks a node has",
        )
    if on_accelerator(default_device_type()):
        raise ConfigError(
            "Ranks that stand for nodes are told to be the first ones there, and scripts would "
            "give several of them one accelerator.",
            numbers=f"--gpus-per-node {per_node}, {launch.ranks_per_node} ranks on this machine.",
            write="gpus_per_node= in mics.init_mesh or mics.shard, and leave --gpus-per-node out",
        )
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    os.environ["LOCAL_RANK"] = str(launch.rank % per_node)


def _script(config: Config, launch: Launch) -> Callable[[], object]:
    from mics.agent.script import run_as_main

    _stand_for_nodes(config, launch)
    return lambda: run_as_main(config.command)


def _trainer(config: Config, launch: Launch) -> Callable[[], object]:
    """The trainer, in a folder of its own that is gone afterwards; the run's is left alone."""
    from mics.commands.options.train import parse as parse_train
    from mics.training.loop import train
    from mics.training.settings import check_settings

    given = parse_train(config.command).options
    folder = config.out.with_name(f"{config.out.name}.run")
    if launch.rank == 0 and folder.exists():
        raise TraceError(
            f"{folder} is where the traced run would keep its files, and it exists.",
            write="another --out, or without that folder",
        )
    steps = max(given.run.steps, config.skip + config.steps + 1)
    options = replace(
        given,
        run=replace(given.run, folder=folder, steps=steps, resume="never"),
        parallel=replace(given.parallel, gpus_per_node=config.gpus_per_node),
        checkpoint=replace(given.checkpoint, every=0),
        evaluation=replace(given.evaluation, every=0),
    )
    check_settings(options)

    def program() -> int:
        try:
            return train(options)
        finally:
            if launch.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)

    return program
