"""Examine a job: compare facts of every rank, then, if they agree, make groups and time links."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from mics.commands.examining.facts import (
    Problem,
    disagreements,
    gather_facts,
    missing_devices,
    unequal_nodes,
)
from mics.commands.examining.links import probe_links
from mics.commands.examining.options import Config
from mics.commands.examining.report import Report, as_json, as_text
from mics.errors import CheckError, MicsError
from mics.ranks.console import show
from mics.ranks.device import default_device_type, num_devices
from mics.ranks.joining import RanksMissing, backend_on, join, make_world
from mics.ranks.launcher import Launch, read_launch
from mics.ranks.mesh import device_of, init_mesh
from mics.ranks.starting import choose_device_type, run_local_ranks
from mics.topology import Topology


def examine_here(config: Config) -> int:
    """Examine ranks that are started here. Returns the exit code."""
    ranks = config.ranks or max(1, num_devices(config.device))
    device_type = choose_device_type(config.device, ranks)
    environment = dict(os.environ)
    return run_local_ranks(
        check, ranks, device_type, config.timeout, config, device_type, environment
    )


def examine_launched(config: Config, launch: Launch) -> int:
    """Examine a launcher's job as one of its ranks. Returns the exit code.

    Raises:
        MicsError: this rank cannot reach the others.
        RanksMissing: some ranks did not come; rank 0 raises it for all.
    """
    return record(_as_rank_of_launcher)(config, launch) or 0


def examine_worker() -> None:
    """Examine a job whose process group somebody else has made, such as Ray, as one of its ranks.

    Raises:
        CheckError: a problem was named.
    """
    launch = read_launch()
    if launch is None:
        raise CheckError("This worker was not told its rank.", write="RANK and WORLD_SIZE")
    if check(launch, Config(), default_device_type(), dict(os.environ)) != 0:
        raise CheckError("The ranks of this job are not right; rank 0 has said why.")


def _as_rank_of_launcher(config: Config, launch: Launch) -> int:
    device_type = choose_device_type(config.device, launch.ranks_per_node)
    environment = dict(os.environ)
    try:
        store = join(launch, device_type, config.timeout)
    except RanksMissing:
        if launch.rank == 0:
            raise
        return 1
    make_world(store, launch, backend_on(device_type), config.timeout)
    code = check(launch, config, device_type, environment)
    dist.destroy_process_group()
    return code


def check(launch: Launch, config: Config, device_type: str, environment: Mapping[str, str]) -> int:
    """Examine as one rank of an initialised job; rank 0 shows it. Returns the exit code."""
    report = examine(launch, config, device_type, environment)
    if launch.rank == 0:
        show(json.dumps(as_json(report)) if config.json else as_text(report))
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
