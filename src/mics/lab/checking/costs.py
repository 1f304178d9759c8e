"""What the collectives of a checked script take on the links of a cluster; no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mics.hardware.cluster import Cluster, Node
from mics.hardware.network import Terms, all_reduce_seconds
from mics.lab.checking.evidence import Evidence
from mics.lab.checking.flows import nodes_of_group
from mics.lab.checking.report import Call
from mics.lab.checking.verdict import Verdict


@dataclass(frozen=True)
class Costs:
    """Seconds of communication in a step, overlapped with computing or not.

    Args:
        cluster: whose links they are for, as text.
        hop_1: all-gathers and reduce-scatters.
        hop_2: all-reduces between copies with what is summed and gathered inside nodes, and what
            brings them blocks of few bits.
        needless: the part of hop 2 that is not needed.
        unknown: collectives of which no time is known.
    """

    cluster: str
    hop_1: float
    hop_2: float
    needless: float
    unknown: int


def costs_of(evidence: Evidence, verdict: Verdict, cluster: Cluster) -> Costs:
    """Work out what rank 0's collectives of the last step take, one after the other.

    The ranks of the check are taken for GPUs of the cluster's nodes, as many per node as the check
    has, and messages for as large as they were.

    Args:
        evidence: what the ranks have seen.
        verdict: on it.
        cluster: as many nodes as the check has.
    """
    calls = [(seen.call, number) for seen, number in evidence.last[0].calls]
    hop_2 = [one for one in calls if evidence.is_hop_2(one[0]) or evidence.is_inside(one[0])]
    rest = [one for one in calls if one not in hop_2]
    hop_1 = [one for one in rest if one[0].collective in ("all_gather", "reduce_scatter")]
    k = evidence.gpus_per_node

    def seconds(of: Iterable[tuple[Call, int]]) -> float:
        return sum(number * seconds_of(call, cluster.node, k) for call, number in of)

    others = [n for c, n in rest if c.collective not in ("all_gather", "reduce_scatter")]
    unknown = sum(others) - sum(n for c, n in rest if c.collective == "all_reduce")
    name = f"{cluster.nodes} x {cluster.node.name}, {k} of {cluster.node.gpus_per_node} GPUs each"
    return Costs(name, seconds(hop_1), seconds(hop_2), seconds(verdict.needless), unknown)


def seconds_of(call: Call, node: Node, gpus_per_node: int) -> float:
    """Seconds of an all-gather, a reduce-scatter, an all-reduce or an exchange on a node's links.

    Args:
        call: one of these.
        node: whose links.
        gpus_per_node: ranks of a node; groups that are on the same nodes run at once.
    """
    ranks, size = len(call.ranks), call.message_bytes
    nodes = nodes_of_group(call.ranks, gpus_per_node)
    sharing = max(1, gpus_per_node * nodes // ranks) if nodes > 1 else 1
    if call.collective == "all_reduce":
        return all_reduce_seconds(node, ranks, nodes, size, sharing)
    sent = size * (ranks - 1) / ranks
    if nodes == 1:
        return Terms("intra", ranks - 1, sent).seconds(node.intra, node.intra)
    terms = Terms("inter", nodes - 1, sharing * sent, nodes, ranks - nodes)
    return terms.seconds(node.inter, node.intra)
