"""How long a collective takes, from latency and bandwidth per link.

n ranks on N nodes, S bytes of the gathered (or reduced) message:

==========================  =================================================================
stage                       seconds
==========================  =================================================================
gather inside a node        fixed + (n - 1) latency + S (n - 1) / n / B
gather over nodes, flat     fixed + (N - 1) latency + (n - N) inside + S (n - 1) / n / B(N)
gather, inter stage         fixed + (N - 1) latency + S (N - 1) / N / B(N), a node's ranks
                            together
gather, intra stage         as inside a node
all-reduce inside a node    fixed + 2 (n - 1) latency + 2 S (n - 1) / n / B
all-reduce, tree            fixed + 2 ceil(log2 N) latency + g 2 S (N - 1) / N / B(N)
all-reduce, ring            fixed + 2 (N - 1) latency + 2 (n - N) inside
                            + g 2 S (n - 1) / n / B(N)
all-reduce, two stages      a gather of S over the n / N ranks inside a node, twice, and an
                            all-reduce of S N / n over N nodes by g n / N groups
==========================  =================================================================

The figures are those of the link the stage is on; ``inside`` is the latency of a hop within nodes,
g the number of groups that share a node's link, B(N) = B (N / 2) ** -falls. A reduce-scatter is a
gather run backwards. Every stage is linear in a link's figures (``Terms``), and a fit to
measurements solves the same lines (``fit.py``).

A ring passes every node's link once, so a node sends what one rank does (``traffic.py``); NCCL's
gathers are rings. Its trees join whole nodes, whose GPUs have summed before, so a node sends
2 S (N - 1) / N. Counted like that, public all-reduces on 2, 4 and 8 p5 have one bandwidth; as bus
bandwidth it is 445, 348 and 278 GB/s, the first above the line rate. Gloo's all-reduce is a ring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mics.hardware.cluster import Link, Node
from mics.traffic import Form

On = Literal["intra", "inter", "to host", "from host"]


@dataclass(frozen=True)
class Stage:
    """Part of a collective: the link it is on, and how long."""

    link: On
    seconds: float


@dataclass(frozen=True)
class Terms:
    """What a stage's time is made of.

    Args:
        link: the link that it is on.
        hops: how many hops over that link follow each other.
        num_bytes: how many bytes the link carries.
        nodes: N, which the bandwidth between nodes depends on.
        inside: how many hops of a ring over several nodes are within nodes.
    """

    link: On
    hops: float
    num_bytes: float
    nodes: int = 1
    inside: float = 0.0

    def seconds(self, link: Link, intra: Link) -> float:
        """What the stage takes on these links.

        Args:
            link: the link that it is on.
            intra: the link inside a node.
        """
        bandwidth = link.over(self.nodes)
        if self.inside:  # a ring goes as fast as its slowest part
            bandwidth = min(bandwidth, intra.bandwidth)
        hops = self.hops * link.latency + self.inside * intra.latency
        return link.fixed + hops + self.num_bytes / bandwidth


def gather_terms(k: int, ranks: int, num_bytes: float, form: Form = "flat") -> tuple[Terms, ...]:
    """What the stages of an all-gather are made of.

    Args:
        k: GPUs of a node.
        ranks: n, the size of a group of consecutive ranks.
        num_bytes: S, the size of the gathered message.
        form: flat or hierarchical, where the group spans several nodes.
    """
    if ranks == 1:
        return ()
    if ranks <= k:
        return (_inside(ranks, num_bytes),)
    nodes = ranks // k
    if form == "hierarchical" and k > 1:
        inter = Terms("inter", nodes - 1, num_bytes * (nodes - 1) / nodes, nodes)
        return (inter, _inside(k, num_bytes))
    return (Terms("inter", nodes - 1, num_bytes * (ranks - 1) / ranks, nodes, ranks - nodes),)


def all_reduce_terms(
    ranks: int, nodes: int, num_bytes: float, sharing: int = 1, *, ring: bool = False
) -> Terms:
    """What an all-reduce is made of.

    Args:
        ranks: n, the size of the group.
        nodes: N, how many nodes the group spans.
        num_bytes: S, the size of each rank's message.
        sharing: how many groups run on the same nodes at once.
        ring: whether it is a ring of all ranks, instead of a tree of nodes.
    """
    in_ring = 2 * num_bytes * (ranks - 1) / ranks
    if nodes == 1:
        return Terms("intra", 2 * (ranks - 1), in_ring)
    if ring:
        return Terms("inter", 2 * (nodes - 1), sharing * in_ring, nodes, 2 * (ranks - nodes))
    moved = sharing * 2 * num_bytes * (nodes - 1) / nodes
    return Terms("inter", 2 * math.ceil(math.log2(nodes)), moved, nodes)


def gather_stages(
    node: Node, ranks: int, num_bytes: float, form: Form = "flat"
) -> tuple[Stage, ...]:
    """Stages of an all-gather over consecutive ranks; a reduce-scatter runs them in reverse.

    Args:
        node: the nodes of the cluster.
        ranks: the size of the group: p, or the world.
        num_bytes: size of the gathered message.
        form: flat or hierarchical, where the group spans several nodes.
    """
    return tuple(
        Stage(terms.link, terms.seconds(getattr(node, terms.link), node.intra))
        for terms in gather_terms(node.gpus_per_node, ranks, num_bytes, form)
    )


def all_reduce_seconds(
    node: Node, ranks: int, nodes: int, num_bytes: float, sharing: int = 1
) -> float:
    """Seconds of an all-reduce between replicas.

    Args:
        node: the nodes of the cluster.
        ranks: the size of the group.
        nodes: how many nodes the group spans.
        num_bytes: size of each rank's message.
        sharing: how many groups run on the same nodes at once.
    """
    if ranks == 1:
        return 0.0
    terms = all_reduce_terms(ranks, nodes, num_bytes, sharing, ring=node.gloo)
    between = node.all_reduce or node.inter
    return terms.seconds(node.intra if nodes == 1 else between, node.intra)


def all_reduce_stages(
    node: Node, ranks: int, nodes: int, num_bytes: float, sharing: int = 1, form: Form = "flat"
) -> tuple[Stage, ...]:
    """Stages of an all-reduce between replicas; arguments as ``all_reduce_seconds``.

    Args:
        form: flat or hierarchical, where several nodes have several of the ranks.
    """
    inside = ranks // nodes
    if form == "flat" or nodes == 1 or inside == 1:
        seconds = all_reduce_seconds(node, ranks, nodes, num_bytes, sharing)
        return (Stage("inter" if nodes > 1 else "intra", seconds),)
    gather = Stage("intra", _inside(inside, num_bytes).seconds(node.intra, node.intra))
    between = all_reduce_seconds(node, nodes, nodes, num_bytes / inside, sharing * inside)
    return (gather, Stage("inter", between), gather)


def _inside(ranks: int, num_bytes: float) -> Terms:
    return Terms("intra", ranks - 1, num_bytes * (ranks - 1) / ranks)
