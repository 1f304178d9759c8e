"""Where the ranks of a launcher meet: the address of rank 0, and its port."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re

from mics.errors import TopologyError
from mics.ranks.launcher import Launch

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}")


def export_torch_variables(launch: Launch) -> None:
    """Set the variables ``torch.distributed`` reads, where the launcher did not.

    Raises:
        TopologyError: the address of rank 0 is unknown or none, or its port is none.
    """
    os.environ.setdefault("RANK", str(launch.rank))
    os.environ.setdefault("WORLD_SIZE", str(launch.world))
    os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))
    if launch.knows_nodes:
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(launch.ranks_per_node))
    if not os.environ.get("MASTER_ADDR"):
        os.environ["MASTER_ADDR"] = _master_address(launch)
    _check_host(os.environ["MASTER_ADDR"])
    if not os.environ.get("MASTER_PORT"):
        # One port per Slurm job, so that two jobs on one node do not meet.
        job = os.environ.get("SLURM_JOB_ID", "")
        number = int(job) if job.isascii() and job.isdecimal() and len(job) < 20 else 0
        os.environ["MASTER_PORT"] = str(29500 + number % 10000)
    _check_port(os.environ["MASTER_PORT"])


def _check_host(text: str) -> None:
    is_address = False
    with contextlib.suppress(ValueError):
        is_address = bool(ipaddress.ip_address(text))
    if not is_address and _NAME.fullmatch(text) is None:
        raise TopologyError(
            "MASTER_ADDR is no host that rank 0 could be.",
            numbers=f"MASTER_ADDR = {text[:200]!r}; the port is MASTER_PORT's.",
            write="export MASTER_ADDR=<host name or address of rank 0>",
        )


def _check_port(text: str) -> None:
    if not text.isdecimal() or not 0 < int(text[:9]) < 2**16:
        raise TopologyError(
            "MASTER_PORT is no port that rank 0 could listen on.",
            numbers=f"MASTER_PORT = {text!r}; ports are 1 to 65535.",
            write="export MASTER_PORT=29500",
        )


def _master_address(launch: Launch) -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if nodes and not launch.one_node:
        return first_host(nodes)
    if launch.one_node:
        return "127.0.0.1"
    raise TopologyError(
        f"{launch.source} does not say where rank 0 listens.",
        numbers=f"{launch.world} ranks, "
        + (f"{launch.ranks_per_node} per node, " if launch.knows_nodes else "")
        + "MASTER_ADDR is not set.",
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
