"""Who holds which shard and who talks to whom, in pure integers.

World ranks are numbered node by node: rank r is GPU ``r % k`` of node ``r // k``.
Partition group g is ``[g p, (g + 1) p)``; replication group j is ``{j, j + p, j + 2p, ...}``
(MiCS section 3.2; the layout of an FSDP2 mesh of shape ``(replicate, shard)``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mics.errors import TopologyError

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """A cluster of equal nodes and the partition size that splits it into groups.

    Args:
        nodes: number of nodes.
        gpus_per_node: ranks joined by the fast link (k).
        partition: ranks that together hold one replica of the model states (p).
            Either p divides k, or p is a multiple of k; always p divides the world.

    Raises:
        TopologyError: a size is not a positive integer, or p does not fit.
    """

    nodes: int
    gpus_per_node: int
    partition: int

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "partition"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TopologyError(
                    f"{name} must be an integer, got {value!r} ({type(value).__name__})."
                )
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise TopologyError(f"{name} must be at least 1, got {getattr(self, name)}.")
        possible = possible_partitions(self.nodes, self.gpus_per_node)
        if self.partition in possible:
            return
        raise TopologyError(
            f"partition = {self.partition} {_why_impossible(self)}.",
            numbers=f"Partition sizes possible with {self.nodes} node(s) x {self.gpus_per_node} "
            f"GPU(s): {' '.join(map(str, possible))}.",
            write=f"partition={_nearest(possible, self.partition)}",
        )

    @classmethod
    def from_world(cls, world: int, gpus_per_node: int, partition: int) -> Topology:
        """Build a topology from the number of ranks.

        Raises:
            TopologyError: ``gpus_per_node`` does not divide ``world``, or p does not fit.
        """
        if gpus_per_node < 1 or world % gpus_per_node != 0:
            divisors = [k for k in range(1, world + 1) if world % k == 0]
            raise TopologyError(
                f"gpus_per_node = {gpus_per_node} does not divide the world of {world} rank(s): "
                "nodes must be equal.",
                numbers=f"Node sizes possible here: {' '.join(map(str, divisors))}.",
                write=f"gpus_per_node={_nearest(divisors, gpus_per_node)}",
            )
        return cls(world // gpus_per_node, gpus_per_node, partition)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node

    @property
    def replicas(self) -> int:
        """R = world / p, the size of a replication group."""
        return self.world // self.partition

    @property
    def nodes_per_partition(self) -> int:
        """N = p / k when the partition group spans nodes, else 1."""
        return max(1, self.partition // self.gpus_per_node)

    @property
    def spans_nodes(self) -> bool:
        """Whether a partition group needs the slow link."""
        return self.partition > self.gpus_per_node

    def node_of(self, rank: int) -> int:
        """The node that holds ``rank``."""
        return rank // self.gpus_per_node

    def partition_groups(self) -> list[Ranks]:
        """All partition groups, in rank order."""
        p = self.partition
        return [tuple(range(g * p, (g + 1) * p)) for g in range(self.replicas)]

    def replication_groups(self) -> list[Ranks]:
        """All replication groups; group j holds shard j."""
        return [tuple(range(j, self.world, self.partition)) for j in range(self.partition)]

    def partition_group_of(self, rank: int) -> Ranks:
        """The partition group of ``rank``."""
        return self.partition_groups()[rank // self.partition]

    def replication_group_of(self, rank: int) -> Ranks:
        """The replication group of ``rank``."""
        return self.replication_groups()[rank % self.partition]

    def intra_groups(self) -> list[Ranks]:
        """Groups of the intra stage: the ranks of one node within one partition group."""
        return [rows for g in self.partition_groups() for rows in nodes_of(g, self.gpus_per_node)]

    def inter_groups(self) -> list[Ranks]:
        """Groups of the inter stage: equal local ranks across the nodes of a partition group.

        Groups of one rank (p <= k) are left out: there is no inter stage.
        """
        if not self.spans_nodes:
            return []
        return [
            column
            for g in self.partition_groups()
            for column in zip(*nodes_of(g, self.gpus_per_node), strict=True)
        ]


def possible_partitions(nodes: int, gpus_per_node: int) -> list[int]:
    """Every partition size that splits the cluster evenly, ascending."""
    inside = [p for p in range(1, gpus_per_node + 1) if gpus_per_node % p == 0]
    across = [n * gpus_per_node for n in range(2, nodes + 1) if nodes % n == 0]
    return inside + across


def nodes_of(ranks: Sequence[int], gpus_per_node: int) -> list[Ranks]:
    """Split an ascending group of world ranks into its nodes.

    Returns:
        One tuple per node, in order. The group is *even* when all have the same length.
    """
    rows: dict[int, list[int]] = {}
    for rank in ranks:
        rows.setdefault(rank // gpus_per_node, []).append(rank)
    return [tuple(row) for row in rows.values()]


def has_two_stages(ranks: Sequence[int], gpus_per_node: int) -> bool:
    """Whether a collective over ``ranks`` can be split into an inter and an intra stage.

    It needs several nodes, several ranks on each, and the same number on each.
    """
    rows = nodes_of(ranks, gpus_per_node)
    return len(rows) > 1 and len(rows[0]) > 1 and len({len(row) for row in rows}) == 1


def _why_impossible(topology: Topology) -> str:
    p, k, world = topology.partition, topology.gpus_per_node, topology.world
    if p <= 0:
        return "must be at least 1"
    if p > world:
        return f"is larger than the world of {world} rank(s)"
    if world % p != 0:
        return f"does not divide the world size {world}"
    if p < k:
        return f"does not divide gpus_per_node = {k}, so a partition group would straddle nodes"
    return f"is not a multiple of gpus_per_node = {k}, so a partition group would split a node"


def _nearest(possible: Sequence[int], value: int) -> int:
    return min(possible, key=lambda p: (abs(p - value), p))
