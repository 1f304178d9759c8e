"""Bytes of the collectives that were seen, per link class, counted as ``traffic.py`` counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

from mics.lab.checking.report import Call, Step
from mics.traffic import Collective, Flow, StageMessage, stage_flow

_RINGS = ("all_gather", "reduce_scatter", "all_reduce")


def flow_of(call: Call, rank: int, gpus_per_node: int, *, gloo: bool = False) -> Flow:
    """What a rank sends in one collective, as a ring of its ranks in order.

    Where no ring is usual: an all-to-all goes to each rank at once, in equal parts; a broadcast,
    and whatever else, passes its whole message on along the ranks; a send goes to its peer.

    Args:
        call: the collective.
        rank: one of its ranks.
        gpus_per_node: ranks of a node.
        gloo: whether a reduce-scatter is Gloo's, which sends twice the bytes of NCCL's.
    """
    if call.collective in _RINGS:
        by_all_reduce = gloo and call.collective == "reduce_scatter" and call.repeats == 1
        message = StageMessage(
            "flat", call.ranks, call.message_bytes, call.repeats, by_all_reduce=by_all_reduce
        )
        return stage_flow(cast(Collective, call.collective), message, rank, gpus_per_node)
    if call.collective == "all_to_all":
        part = Fraction(call.message_bytes, len(call.ranks))
        others = (one for one in call.ranks if one != rank)
        return sum((_to(one, rank, part, gpus_per_node) for one in others), Flow())
    index = call.ranks.index(rank)
    if call.peer < 0 and index == len(call.ranks) - 1:
        return Flow()
    peer = call.peer if call.peer >= 0 else call.ranks[index + 1]
    return _to(peer, rank, Fraction(call.message_bytes), gpus_per_node)


def _to(peer: int, rank: int, sent: Fraction, gpus_per_node: int) -> Flow:
    if peer // gpus_per_node == rank // gpus_per_node:
        return Flow(intra_bytes=sent, intra_messages=1)
    return Flow(inter_bytes=sent, inter_messages=1)


def nodes_of_group(ranks: Iterable[int], gpus_per_node: int) -> int:
    """How many nodes a group has ranks on."""
    return len({rank // gpus_per_node for rank in ranks})


@dataclass(frozen=True)
class Row:
    """Collectives of one kind in one step.

    Args:
        what: their name.
        ranks: size of their groups.
        nodes: how many nodes a group is on.
        calls: of one rank, the one with most.
        intra_bytes: what a node's ranks send to each other, on the node with most.
        inter_bytes: what a node sends to others, the node with most.
    """

    what: str
    ranks: int
    nodes: int
    calls: int
    intra_bytes: int
    inter_bytes: int


def rows_of(steps: Sequence[Step], gpus_per_node: int, labels: dict[Call, str]) -> list[Row]:
    """The collectives of one step, those of a kind together.

    Args:
        steps: the same step of every rank, in the order of ranks.
        gpus_per_node: ranks of a node.
        labels: what each collective is for.
    """
    calls: dict[tuple[str, int, int], dict[int, int]] = {}
    sent: dict[tuple[str, int, int], dict[int, Flow]] = {}
    for rank, step in enumerate(steps):
        for seen, number in step.calls:
            call = seen.call
            key = (labels[call], len(call.ranks), nodes_of_group(call.ranks, gpus_per_node))
            of_rank = calls.setdefault(key, {})
            of_rank[rank] = of_rank.get(rank, 0) + number
            node = rank // gpus_per_node
            flow = flow_of(call, rank, gpus_per_node)
            of_node = sent.setdefault(key, {})
            for _ in range(number):
                of_node[node] = of_node.get(node, Flow()) + flow
    return [
        Row(
            *key,
            max(calls[key].values()),
            round(max(flow.intra_bytes for flow in sent[key].values())),
            round(max(flow.inter_bytes for flow in sent[key].values())),
        )
        for key in sorted(calls)
    ]
