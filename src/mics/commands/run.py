"""``mics run``: ranks that begin again within seconds when one of them, or a node, is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mics.agent.frames import read_token
from mics.agent.membership import split_address
from mics.agent.running import run_agent
from mics.agent.settings import Settings
from mics.commands.dashes import parse_with_program
from mics.commands.numbers import check_numbers
from mics.errors import ConfigError
from mics.quantities import Within
from mics.ranks.console import progress
from mics.ranks.program import as_command

_DEGRADE_AFTER = 30.0


@dataclass(frozen=True)
class Config:
    """Run a program on every rank, and run it again when a rank or a node is lost.

    The program follows `--`: a Python script and its arguments, `-m module`, `mics <verb>`, or any
    program. Its ranks are told who they are in torchrun's variables, and MICS_JOB and
    MICS_GENERATION. One such agent runs on every node.
    """

    ranks_per_node: Annotated[int, Within(1, 128)]
    """Ranks on this node, as on all others."""

    nodes: str = ""
    """Addresses of all nodes' agents, host:port,host:port,...; left out for one node."""

    node_index: Annotated[int, Within(0, 9999)] = 0
    """Which of --nodes this one is; the first is 0."""

    listen: str = ""
    """Where this agent listens, address:port; by default as in --nodes."""

    interface: str = ""
    """Network interface that ranks use; by default the one that has the address."""

    token_file: Path | None = None
    """The job's secret, a file that only its owner may read; needed with --nodes."""

    job: str = ""
    """The job's id, MICS_JOB; one is made up if it is left out."""

    restarts: Annotated[int, Within(0, 1_000_000)] = 10
    """Restarts that are allowed within --window; more end the job."""

    window: Annotated[float, Within(1, 1e9)] = 3600.0
    """Seconds within which restarts are counted."""

    spare_wait: Annotated[float, Within(0, 1e9)] = 600.0
    """Seconds to wait for nodes that have not come, or that were lost; then the job ends."""

    min_nodes: Annotated[int, Within(0, 10_000)] = 0
    """Nodes with which the job goes on when others are lost; 0: it needs all of them."""

    degrade_after: Annotated[float, Within(0, 1e9)] = _DEGRADE_AFTER
    """Seconds to wait for lost nodes before going on with fewer; see --min-nodes."""

    grace: Annotated[float, Within(0, 1e6)] = 30.0
    """Seconds that ranks may take to save and end after SIGTERM or ctrl-C."""

    exit_grace: Annotated[float, Within(0, 1e9)] = 120.0
    """Seconds that others may still run when a rank has ended with exit code 0."""

    hang_seconds: Annotated[float, Within(0, 1e9)] = 10.0
    """Seconds that a rank may stand still, or five slow steps if that is more; 0: for ever."""

    command: tyro.conf.Positional[tuple[str, ...]] = ()
    """The program, after `--`."""


def parse(words: Sequence[str], **keywords: object) -> Config:
    """Options before `--`, the program as it stands after it."""
    config: Config = parse_with_program(Config, words, **keywords)
    return config


def run(config: Config) -> int:
    """Run the ranks of this node.

    Returns:
        0 when all ranks have ended with 0; what the rank that failed last returned, or 128 and its
        signal; 1 when nodes did not come; 2 when there is no program to run.

    Raises:
        MicsError: an option is not right, or this system cannot.
    """
    check_numbers(config)
    if not config.command:
        progress("mics run: no program; write it after `--`")
        return 2
    nodes = [node for node in config.nodes.split(",") if node]
    _check_nodes(config, nodes)
    _check_fewer(config, len(nodes))
    return run_agent(
        Settings(
            command=as_command(config.command),
            ranks_per_node=config.ranks_per_node,
            nodes=nodes,
            node_index=config.node_index,
            listen=config.listen,
            interface=config.interface,
            token=b"" if config.token_file is None else read_token(config.token_file),
            restarts=config.restarts,
            window=config.window,
            spare_wait=config.spare_wait,
            min_nodes=config.min_nodes,
            degrade_after=config.degrade_after,
            grace=config.grace,
            exit_grace=config.exit_grace,
            hang_seconds=config.hang_seconds,
            job=config.job,
        )
    )


def _check_nodes(config: Config, nodes: list[str]) -> None:
    for option, text in [*(("--nodes", node) for node in nodes), ("--listen", config.listen)]:
        try:
            if text:
                split_address(text)
        except ValueError:
            raise ConfigError(
                f"{option} has what is no address of one node with a port.",
                numbers=f"It is {text!r}.",
                write=f"{option} 10.0.0.1:29400",
            ) from None
    if not nodes:
        if config.node_index or config.listen or config.token_file is not None:
            raise ConfigError(
                "--node-index, --listen and --token-file are for several nodes.",
                write="--nodes host:port,host:port as well, or leave them out",
            )
        return
    if config.node_index >= len(nodes) or len(set(nodes)) < len(nodes):
        raise ConfigError(
            "--nodes must name every node once, and --node-index one of them.",
            numbers=f"{len(nodes)} nodes, {len(set(nodes))} addresses, --node-index "
            f"{config.node_index}.",
            write=f"--node-index 0 to {len(nodes) - 1}, and an address of its own for every node",
        )
    if config.token_file is None:
        raise ConfigError(
            "Agents of several nodes need a secret that they share.",
            numbers=f"--nodes names {len(nodes)}, and there is no --token-file.",
            write="(umask 077; head -c 32 /dev/urandom | base64 > token), a copy of it on every "
            "node, and --token-file token",
        )


def _check_fewer(config: Config, nodes: int) -> None:
    if config.min_nodes > nodes:
        raise ConfigError(
            "--min-nodes says with how many of the nodes in --nodes the job goes on.",
            numbers=f"--min-nodes {config.min_nodes}, and --nodes names {nodes}.",
            write=f"--min-nodes 1 to {nodes}" if nodes else "--nodes host:port,... as well",
        )
    if not config.min_nodes and config.degrade_after != _DEGRADE_AFTER:
        raise ConfigError(
            "--degrade-after is for jobs that go on with fewer nodes, as --min-nodes says.",
            write=f"--min-nodes {max(1, nodes - 1)} as well, or leave it out",
        )
    if config.min_nodes and config.degrade_after > config.spare_wait:
        raise ConfigError(
            "A job would end before it could go on with fewer nodes.",
            numbers=f"--spare-wait {config.spare_wait:g} s, --degrade-after "
            f"{config.degrade_after:g} s.",
            write=f"--degrade-after {config.spare_wait / 2:g}, or a longer --spare-wait",
        )
