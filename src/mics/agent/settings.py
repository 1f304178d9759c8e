"""What an agent was asked to do."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from mics.version import __version__


@dataclass(frozen=True)
class Settings:
    """How one agent of a job runs its ranks; times are in seconds.

    Args:
        command: of every rank, as it is executed.
        ranks_per_node: that this node has, as all others do.
        nodes: the addresses of the agents of all nodes, as ``host:port``; empty for one node only.
        node_index: which of them this one is.
        listen: where this agent listens, if not at its address in ``nodes``.
        interface: that ranks use, if not the one that has the address.
        token: that all agents of the job know.
        restarts: that are allowed within ``window``.
        window: see there.
        spare_wait: how long nodes that are missing are waited for.
        min_nodes: that the job may go on with when others are lost; 0 for all.
        degrade_after: how long it waits for others before it does.
        grace: how long ranks may take to end when they are asked to.
        exit_grace: how long other ranks may go on when one has ended with 0.
        hang_seconds: that a rank may stand still at least; 0 for ever.
        job: its id; one is made up if it is empty.
    """

    command: list[str]
    ranks_per_node: int
    nodes: list[str]
    node_index: int = 0
    listen: str = ""
    interface: str = ""
    token: bytes = b""
    restarts: int = 10
    window: float = 3600.0
    spare_wait: float = 600.0
    min_nodes: int = 0
    degrade_after: float = 30.0
    grace: float = 30.0
    exit_grace: float = 120.0
    hang_seconds: float = 10.0
    job: str = ""

    @property
    def num_nodes(self) -> int:
        """All nodes of the job."""
        return max(1, len(self.nodes))

    @property
    def least_nodes(self) -> int:
        """Nodes without which the job cannot go on."""
        return self.min_nodes or self.num_nodes

    @property
    def world(self) -> int:
        """All ranks of the job."""
        return self.num_nodes * self.ranks_per_node

    @property
    def terms(self) -> dict[str, str]:
        """What all agents of the job must have been told alike, by its name for people."""
        words = "\0".join(self.command[1:]).encode()
        return {
            "version": __version__,
            "--ranks-per-node": str(self.ranks_per_node),
            "--min-nodes": str(self.least_nodes),
            "--degrade-after": f"{self.degrade_after:g}",
            "program or arguments": hashlib.sha256(words).hexdigest()[:12],
        }
