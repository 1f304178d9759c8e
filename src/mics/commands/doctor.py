"""``mics doctor``: what the ranks of this job are, whether they agree, how fast their links are."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from mics.doctor.facts import (
    Problem,
    disagreements,
    gather_facts,
    missing_devices,
    unequal_nodes,
)
from mics.doctor.links import probe_links
from mics.doctor.report import Report, as_json, as_text, problems_as_text
from mics.errors import MicsError
from mics.ranks.device import default_device_type, num_devices
from mics.ranks.launcher import Launch, read_launch
from mics.ranks.mesh import device_of, init_mesh
from mics.ranks.starting import RanksMissing, choose_device_type, join, run_local_ranks
from mics.topology import Topology


@dataclass(frozen=True)
class Config:
    """Report versions, nodes, groups, link speeds, and any rank that disagrees with the others.

    Under torchrun, Slurm or MPI every rank takes part; otherwise ranks are started here.
    """

    ranks: int | None = None
    """Ranks to start here, where no launcher has: one per accelerator by default, or 1."""

    gpus_per_node: int | None = None
    """Ranks joined by the fast link; what the launcher says by default. Smaller simulates nodes."""

    partition: int | Literal["auto"] = "auto"
    """Ranks that together hold one replica of the model states; a whole node by default."""

    device: str = "auto"
    """"cpu", "cuda", ...; by default the accelerator, if every rank can have one."""

    timeout: float = 60.0
    """Seconds to wait for a rank that does not answer."""

    json: bool = False
    """Print one JSON document instead of text."""


def run(config: Config) -> int:
    """Examine the job this process belongs to, or ranks started here.

    Returns:
        0 when all is well, 1 when a problem was named, 2 when the options make no sense.
    """
    try:
        launch = read_launch()
    except MicsError as error:
        return _fail(error, config)
    nonsense = _nonsense(config, launch)
    if nonsense:
        if launch is None or launch.rank == 0:
            print(f"mics doctor: {nonsense}", file=sys.stderr)
        return 2
    if launch is not None:
        return record(_run_launched)(config, launch) or 0
    ranks = config.ranks or _default_ranks(config)
    device_type = choose_device_type(config.device, ranks)
    environment = dict(os.environ)
    return run_local_ranks(
        check, ranks, device_type, config.timeout, config, device_type, environment
    )


def check(launch: Launch, config: Config, device_type: str, environment: Mapping[str, str]) -> int:
    """Examine as one rank of an initialised job; rank 0 prints. Returns the exit code."""
    report = examine(launch, config, device_type, environment)
    if launch.rank == 0:
        _print(json.dumps(as_json(report)) if config.json else as_text(report))
    # A launcher ends all ranks when one leaves with an error: not before rank 0 has spoken.
    dist.barrier()
    return 0 if report.ok else 1


def examine(
    launch: Launch, config: Config, device_type: str, environment: Mapping[str, str]
) -> Report:
    """Compare all ranks; if they agree, set up the groups and measure the links.

    Collective over the world. Ranks that contradict each other are not measured: they would hang.

    Args:
        launch: where this rank stands.
        config: the options of this rank; other ranks may, wrongly, have others.
        device_type: what this rank communicates on.
        environment: the variables this rank was started with.

    Returns:
        The same report on every rank.
    """
    options = {
        "partition": str(config.partition),
        "gpus-per-node": str(config.gpus_per_node),
        "device": config.device,
    }
    facts = gather_facts(launch, device_type, options, environment)
    problems = disagreements(facts)
    unequal = unequal_nodes(facts) if config.gpus_per_node is None else None
    problems += [p for p in (unequal, missing_devices(facts)) if p is not None]
    if problems:
        return Report(facts, problems=problems)
    k = config.gpus_per_node or launch.ranks_per_node
    p = k if config.partition == "auto" else config.partition
    try:
        mesh = init_mesh(partition=p, gpus_per_node=k, device_type=device_type)
    except MicsError as error:  # every rank knows the same and raises the same
        return Report(facts, problems=[Problem(error)])
    topology = Topology.from_world(launch.world, k, p)
    return Report(facts, topology, probe_links(topology, device_of(mesh)))


def _run_launched(config: Config, launch: Launch) -> int:
    device_type = choose_device_type(config.device, launch.ranks_per_node)
    environment = dict(os.environ)
    try:
        join(launch, device_type, config.timeout)
    except RanksMissing as error:
        return _fail(error, config, error.ranks) if launch.rank == 0 else 1
    except MicsError as error:
        return _fail(error, config, [launch.rank], speaks=launch.rank == 0)
    code = check(launch, config, device_type, environment)
    dist.destroy_process_group()
    return code


def _fail(
    error: MicsError, config: Config, ranks: list[int] | None = None, *, speaks: bool = True
) -> int:
    """Report an error that left no ranks to examine; only who speaks may use standard output."""
    report = Report(problems=[Problem(error, ranks or [])])
    if config.json and speaks:
        _print(json.dumps(as_json(report)))
    else:
        print(problems_as_text(report.problems), file=sys.stderr)
    return 1


def _nonsense(config: Config, launch: Launch | None) -> str | None:
    if config.ranks is not None and launch is not None:
        return f"leave out --ranks: {launch.source} has started {launch.world} ranks already."
    for name in ("ranks", "gpus_per_node", "timeout"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            return f"--{name.replace('_', '-')} must be more than 0, got {value}."
    accelerator = default_device_type()
    if config.device not in ("auto", "cpu", accelerator):
        possible = " or ".join(dict.fromkeys(["cpu", accelerator]))
        return f"--device {config.device} is not on this machine; write --device {possible}."
    return None


def _default_ranks(config: Config) -> int:
    return max(1, num_devices(config.device))


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # ``mics doctor | head``: what is left must not raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
