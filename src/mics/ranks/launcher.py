"""What the launcher told this process: rank, world and the ranks of this node.

torchrun, Slurm and MPI each use variables of their own; this is the one place they are read.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from mics.errors import MicsError, TopologyError


@dataclass(frozen=True)
class Launch:
    """Where this process stands, and who said so."""

    source: str
    rank: int
    world: int
    local_rank: int
    ranks_per_node: int


_MPI = {
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


def read_launch(environment: Mapping[str, str] | None = None) -> Launch | None:
    """Read the launcher's variables; ``None`` when no launcher started this process.

    torchrun wins over MPI, MPI over Slurm: an inner launcher knows better than the allocation.

    Raises:
        TopologyError: a launcher is recognised but its variables are incomplete or nodes differ.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        return _torchrun(env)
    for source, names in _MPI.items():
        if names[0] in env and names[1] in env:
            rank, world, local_rank, local_world = (_integer(env, n, source) for n in names)
            return Launch(source, rank, world, local_rank, local_world)
    if "SLURM_PROCID" in env and "SLURM_NTASKS" in env:
        return _slurm(env)
    return None


def is_first_rank() -> bool:
    """Tell whether this process is rank 0 of its launcher, or has none."""
    try:
        launch = read_launch()
    except MicsError:  # variables that make no sense are every rank's to complain of
        return True
    return launch is None or launch.rank == 0


def export_torch_variables(launch: Launch) -> None:
    """Set the variables ``torch.distributed`` reads, where the launcher did not.

    Raises:
        TopologyError: the address of rank 0 is unknown.
    """
    os.environ.setdefault("RANK", str(launch.rank))
    os.environ.setdefault("WORLD_SIZE", str(launch.world))
    os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(launch.ranks_per_node))
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _master_address(launch)
    # One port per Slurm job, so that two jobs on one node do not meet.
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(29500 + job % 10000))


def listen_on_loopback() -> None:
    """Keep the backends' sockets off the network, unless the user has named an interface.

    For ranks that are all of this machine.
    """
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if names:
            os.environ.setdefault(variable, names[0])


def _torchrun(env: Mapping[str, str]) -> Launch:
    rank, world = _integer(env, "RANK", "torchrun"), _integer(env, "WORLD_SIZE", "torchrun")
    if "LOCAL_WORLD_SIZE" in env:
        local_world = _integer(env, "LOCAL_WORLD_SIZE", "torchrun")
    else:
        local_world = world
    local_rank = _integer(env, "LOCAL_RANK", "torchrun") if "LOCAL_RANK" in env else rank
    return Launch("torchrun", rank, world, local_rank, local_world)


def _slurm(env: Mapping[str, str]) -> Launch:
    layout = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "")
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", layout)
    if not counts:
        raise TopologyError(
            "Slurm does not say how many ranks each node has.",
            numbers=f"SLURM_TASKS_PER_NODE = {layout!r}.",
            write="srun --ntasks-per-node=<GPUs per node> ...",
        )
    if len(set(counts)) > 1:
        raise TopologyError(
            "Slurm gave the nodes different numbers of ranks; partition groups need equal nodes.",
            numbers=f"SLURM_TASKS_PER_NODE = {layout}.",
            write=f"srun --ntasks-per-node={min(map(int, counts))} ...",
        )
    return Launch(
        "Slurm",
        _integer(env, "SLURM_PROCID", "Slurm"),
        _integer(env, "SLURM_NTASKS", "Slurm"),
        _integer(env, "SLURM_LOCALID", "Slurm"),
        int(counts[0]),
    )


def _master_address(launch: Launch) -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if nodes:
        return first_host(nodes)
    if launch.ranks_per_node == launch.world:
        return "127.0.0.1"
    raise TopologyError(
        f"{launch.source} does not say where rank 0 listens.",
        numbers=f"{launch.world} ranks, {launch.ranks_per_node} per node, MASTER_ADDR is not set.",
        write="export MASTER_ADDR=<host of rank 0>",
    )


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: ``gpu[07-09,12],x`` is ``gpu07``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodelist.strip())
    if match is None:
        raise TopologyError(
            "Slurm's node list is empty.", write="export MASTER_ADDR=<host of rank 0>"
        )
    return match[1] + (match[2] or "") + match[3]


def _integer(env: Mapping[str, str], name: str, source: str) -> int:
    try:
        return int(env[name])
    except KeyError:
        raise TopologyError(
            f"{source} started this process but {name} is not set.", write=f"export {name}=..."
        ) from None
    except ValueError:
        raise TopologyError(f"{name} must be an integer, got {env[name]!r}.") from None
