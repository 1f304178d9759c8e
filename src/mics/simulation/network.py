"""How long a collective takes, from latency and bandwidth per link.

n ranks on N nodes, S bytes of the gathered (or reduced) message, M of a unit:

==================  =============================================================================
all-gather, reduce-scatter
  inside a node     fixed + (n - 1) latency + S (n - 1) / n / B
  flat, over nodes  fixed + (N - 1) inter latency + (n - N) intra latency + S (n - 1) / n / B(N)
  two stages        inter: fixed + (N - 1) inter latency + S (N - 1) / N / B(N), where the node's
                    ranks share its link; intra: as inside a node
all-reduce
  over nodes        fixed + 2 ceil(log2 N) latency + 2 S (n - 1) / n / B(N), times the groups that
                    share a node's link; the ring's latency where no tree was measured
==================  =============================================================================

B(N) = B (N / 2) ** -falls. A ring passes every node's link once, so a node sends what one rank does
(``traffic.py``). The slower of link and memory copy is the link. Sources: nccl-tests for bus
bandwidth; the form linear in n is the ring of NCCL, the logarithm its trees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mics.simulation.hardware import Node
from mics.traffic import Form

On = Literal["intra", "inter"]


@dataclass(frozen=True)
class Stage:
    """Part of a collective: the link it is on, and how long."""

    link: On
    seconds: float


def gather_stages(
    node: Node, ranks: int, num_bytes: float, form: Form = "flat"
) -> tuple[Stage, ...]:
    """Stages of an all-gather over consecutive ranks; a reduce-scatter runs them in reverse.

    Args:
        node: of the cluster.
        ranks: p, or the world.
        num_bytes: of the gathered message.
        form: flat or hierarchical, over several nodes.
    """
    k = node.gpus_per_node
    if ranks == 1:
        return ()
    if ranks <= k:
        return (Stage("intra", _ring(node, ranks, num_bytes)),)
    over = ranks // k
    if form == "hierarchical" and k > 1:
        link = node.inter
        inter = (
            link.fixed + (over - 1) * link.latency + num_bytes * (over - 1) / over / link.over(over)
        )
        return (Stage("inter", inter), Stage("intra", _ring(node, k, num_bytes)))
    return (Stage("inter", _flat(node, ranks, over, num_bytes)),)


def all_reduce_seconds(node: Node, ranks: int, nodes: int, num_bytes: float, sharing: int) -> float:
    """Of an all-reduce between replicas.

    Args:
        node: of the cluster.
        ranks: of the group.
        nodes: it spans.
        num_bytes: of each rank's message.
        sharing: groups that run on the same nodes at once.
    """
    if ranks == 1:
        return 0.0
    moved = 2 * num_bytes * (ranks - 1) / ranks
    if nodes == 1:
        link = node.intra
        return link.fixed + 2 * (ranks - 1) * link.latency + moved / link.bandwidth
    tree = node.all_reduce
    if tree is not None:
        levels = 2 * math.log2(nodes)
        return tree.fixed + levels * tree.latency + sharing * moved / tree.over(nodes)
    link = node.inter
    hops = 2 * math.ceil(math.log2(nodes))
    return link.fixed + hops * link.latency + sharing * moved / link.over(nodes)


def _ring(node: Node, ranks: int, num_bytes: float) -> float:
    link = node.intra
    moved = num_bytes * (ranks - 1) / ranks
    return link.fixed + (ranks - 1) * link.latency + moved / link.bandwidth


def _flat(node: Node, ranks: int, nodes: int, num_bytes: float) -> float:
    hops = (nodes - 1) * node.inter.latency + (ranks - nodes) * node.intra.latency
    slowest = min(node.intra.bandwidth, node.inter.over(nodes))
    return node.inter.fixed + hops + num_bytes * (ranks - 1) / ranks / slowest
