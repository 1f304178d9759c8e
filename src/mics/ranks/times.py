"""What a rank has measured of its steps, as numbers that can be sent, and where the ranks are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mics.topology import Ranks

Where = Literal["hop 1", "hop 2", "the end of the step"]
WHERE: tuple[Where, ...] = ("hop 1", "hop 2", "the end of the step")
"""What a rank has to come to in each step, in order."""

STEPS = 16
"""The most recent steps of a rank that are compared."""
MOST_PEERS = 4
"""Nodes that a rank says how fast it sent to: those it has sent most."""


@dataclass(frozen=True)
class Sent:
    """What a rank has sent from one address to another by TCP.

    Args:
        source: the address sent from, as a number.
        target: the address sent to, as a number.
        num_bytes: that were acknowledged.
        busy: seconds in which some were not yet.
    """

    source: int
    target: int
    num_bytes: float
    busy: float


@dataclass(frozen=True)
class RankTimes:
    """What one rank has measured, in seconds.

    Args:
        own: time of its own in each of the most recent steps, the latest last.
        step: median of a step's seconds.
        reached: medians of the time of its own that it took to come to each of ``WHERE`` from the
            one before; not a number on an accelerator, where the host's time says nothing.
        waited: medians of the seconds in which it waited in each of ``WHERE``.
        sent: to other nodes.
        fastest: seconds that the collectives of a step need in hop 1 and in hop 2, each taken as
            fast as it ever was; 0 where only the kernel can tell how fast links are.
    """

    own: tuple[float, ...]
    step: float
    reached: tuple[float, ...]
    waited: tuple[float, ...]
    sent: tuple[Sent, ...] = ()
    fastest: tuple[float, float] = (0.0, 0.0)

    @property
    def own_seconds(self) -> float:
        """Median of the time of its own in a step; not a number before the first."""
        return statistics.median(self.own) if self.own else math.nan

    def as_row(self) -> list[float]:
        """Write it as ``ROW`` numbers, to be sent."""
        own = self.own[-STEPS:]
        sent = [
            number
            for one in self.sent[:MOST_PEERS]
            for number in (one.source, one.target, one.num_bytes, one.busy)
        ]
        row = [float(len(own)), *own, *[0.0] * (STEPS - len(own)), self.step]
        row += [*self.reached, *self.waited, *self.fastest, *sent]
        return row + [0.0] * (ROW - len(row))


ROW = 1 + STEPS + 1 + 2 * len(WHERE) + 2 + 4 * MOST_PEERS
"""Numbers that a rank sends."""


def from_row(row: Sequence[float]) -> RankTimes:
    """Read what ``RankTimes.as_row`` has written."""
    steps, hops = int(row[0]), len(WHERE)
    rest = row[1 + STEPS :]
    behind = 1 + 2 * hops
    entries = [rest[i : i + 4] for i in range(behind + 2, len(rest), 4)]
    return RankTimes(
        own=tuple(row[1 : 1 + steps]),
        step=rest[0],
        reached=tuple(rest[1 : 1 + hops]),
        waited=tuple(rest[1 + hops : behind]),
        fastest=(rest[behind], rest[behind + 1]),
        sent=tuple(Sent(int(a), int(b), size, busy) for a, b, size, busy in entries if size > 0),
    )


@dataclass(frozen=True)
class Places:
    """Where the ranks are.

    Args:
        ranks: of the mesh, partition group by partition group.
        partition: ranks of a partition group.
        gpus_per_node: ranks joined by the fast link.
    """

    ranks: Ranks
    partition: int
    gpus_per_node: int

    def node_of(self, rank: int) -> int:
        """The node of a rank."""
        return rank // self.gpus_per_node

    @property
    def nodes(self) -> list[int]:
        """All nodes, ascending."""
        return sorted({self.node_of(rank) for rank in self.ranks})

    @property
    def partition_groups(self) -> list[Ranks]:
        """Ranks that together hold a replica."""
        size = self.partition
        return [self.ranks[i : i + size] for i in range(0, len(self.ranks), size)]

    @property
    def replication_groups(self) -> list[Ranks]:
        """Ranks that hold the same shard."""
        return [self.ranks[i :: self.partition] for i in range(self.partition)]

    def hop_between(self, a: int, b: int) -> Where:
        """The hop in which two nodes talk to each other: the first, if they share a replica."""
        spans = [{self.node_of(rank) for rank in group} for group in self.partition_groups]
        return "hop 1" if any({a, b} <= span for span in spans) else "hop 2"
