"""Which link is slow? Judged from what the kernel counts, or from the groups that use it.

[Note: which link is slow]
All ranks of a ring are held up by its slowest link, and take equally long. But the kernel knows,
for each TCP connection, how long bytes lay in it unacknowledged: bytes sent, divided by these
seconds, is what the connection carried while it had something to carry, whoever waited for what.
Rates are compared between pairs of nodes of one hop, which send alike. A node all of whose pairs
are slow is named, else the pair is.

[Note: which group is slow]
Of other networks there is no such count. There the fastest of many equal collectives, on the rank
of a group that came last to it, is what the group's links need. Groups of one hop send alike, so
they are compared; the node that all slow groups have, and no other, is named.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mics.quantities import milliseconds
from mics.ranks.times import WHERE, Places, RankTimes, Sent, Where
from mics.topology import Ranks

_SLOW = 0.6  # of what its peers carry
_AN_ORDER = 0.2  # the same, where something else than a busy neighbour is at work
_FALLEN_BACK = " (has it fallen back to a slower network?)"
_FEWEST_BYTES = 1 << 18  # of a pair of nodes that is compared
_OF_THE_LARGEST = 0.02  # and how much that is of what the busiest pair has sent
_WORTH_NAMING = 0.03  # of a step: less is not worth a word


@dataclass(frozen=True)
class SlowLink:
    """A link that carries less than its peers do.

    Args:
        nodes: the one node whose every pair is slow, or the two between which one direction is.
        where: the hop that sends over it.
        rate: bits per second that it carried while it had something to carry.
        peers: the same of its peers.
    """

    nodes: tuple[int, ...]
    where: Where
    rate: float
    peers: float

    def __str__(self) -> str:
        which = f"of node {self.nodes[0]}"
        if len(self.nodes) == 2:
            which = f"from node {self.nodes[0]} to node {self.nodes[1]}"
        words = (
            f"the link {which} is slow: {megabits(self.rate)} in {self.where}, "
            f"{self.rate / self.peers:.2f} of what its peers carry"
        )
        if self.rate <= _AN_ORDER * self.peers:
            words += _FALLEN_BACK
        return words


@dataclass(frozen=True)
class TcpAlone:
    """Nodes that send by TCP while the others, of the same job, do not."""

    nodes: tuple[int, ...]
    num_bytes: float

    def __str__(self) -> str:
        which = ", ".join(map(str, self.nodes))
        return (
            f"node {which} has fallen back to TCP: it sent {self.num_bytes / 1e6:.0f} MB that "
            "way, and the other nodes none"
        )


@dataclass(frozen=True)
class SlowGroup:
    """A group whose collectives take longer than those of its peers, on a network of unknown rates.

    Args:
        ranks: of the group, or of the slowest where one node explains several.
        nodes: the node that the slow groups have in common, or all nodes of the one.
        where: the hop of its collectives.
        seconds: that those of a step take when nobody is late.
        peers: the same of its peers.
    """

    ranks: Ranks
    nodes: tuple[int, ...]
    where: Where
    seconds: float
    peers: float

    def __str__(self) -> str:
        which = f"the links of nodes {', '.join(map(str, self.nodes))} are"
        if len(self.nodes) == 1:
            which = f"the link of node {self.nodes[0]} is"
        words = (
            f"{which} slow: {self.where} among ranks {', '.join(map(str, self.ranks))} takes "
            f"{milliseconds(self.seconds)}, {self.seconds / self.peers:.1f} times as long as among "
            "its peers"
        )
        if self.seconds * _AN_ORDER >= self.peers:
            words += _FALLEN_BACK
        return words


Link = SlowLink | SlowGroup | TcpAlone


def slow_links(
    times: Mapping[int, RankTimes], places: Places
) -> tuple[dict[tuple[int, int], float], list[Link]]:
    """Rates in bits per second by (from node, to node), and the links that are slow.

    Args:
        times: by rank.
        places: where the ranks are.
    """
    sent = _between_nodes(times, places)
    rates = {pair: 8 * one.num_bytes / one.busy for pair, one in sent.items()}
    found: list[Link] = [*_slow_pairs(rates, places), *_slow_groups(times, places)]
    if len(places.nodes) > 2 and (alone := _tcp_alone(sent, places)) is not None:
        found.append(alone)
    return rates, found


def _between_nodes(times: Mapping[int, RankTimes], places: Places) -> dict[tuple[int, int], Sent]:
    """What each node has sent to each other, where addresses tell nodes."""
    node_at: dict[int, int | None] = {}
    for rank, one in times.items():
        node = places.node_of(rank)
        for sent in one.sent:
            several = node_at.get(sent.source, node) != node  # nodes of one machine, in a test
            node_at[sent.source] = None if several else node
    total: dict[tuple[int, int], Sent] = {}
    for one in times.values():
        for sent in one.sent:
            a, b = node_at[sent.source], node_at.get(sent.target)
            if a is None or b is None or a == b:
                continue
            so_far = total.get((a, b), Sent(sent.source, sent.target, 0.0, 0.0))
            total[a, b] = Sent(
                sent.source,
                sent.target,
                so_far.num_bytes + sent.num_bytes,
                so_far.busy + sent.busy,
            )
    most = max((one.num_bytes for one in total.values()), default=0.0)
    fewest = max(_FEWEST_BYTES, _OF_THE_LARGEST * most)
    return {pair: one for pair, one in total.items() if one.num_bytes >= fewest and one.busy > 0}


def _slow_pairs(rates: Mapping[tuple[int, int], float], places: Places) -> list[SlowLink]:
    peers: dict[tuple[int, int], float] = {}
    for where in ("hop 1", "hop 2"):
        alike = {pair: rate for pair, rate in rates.items() if places.hop_between(*pair) == where}
        if len({node for pair in alike for node in pair}) > 2:  # of two, which one is slow?
            usual = _upper_median(list(alike.values()))
            peers |= dict.fromkeys(alike, usual)
    slow = {pair for pair, usual in peers.items() if rates[pair] <= _SLOW * usual}
    found = []
    for node in sorted({node for pair in slow for node in pair}):
        own = [pair for pair in peers if node in pair]
        # Both directions, or it may as well be the other end of the one.
        if len(own) > 1 and all(pair in slow for pair in own) and len(set(sum(own, ()))) > 2:
            worst = min(own, key=lambda pair: rates[pair] / peers[pair])
            found.append(((node,), worst))
    explained = {node for (node,), _ in found}
    alone = [((a, b), (a, b)) for a, b in sorted(slow) if not explained & {a, b}]
    return [
        SlowLink(nodes, places.hop_between(*pair), rates[pair], peers[pair])
        for nodes, pair in [*found, *alone]
    ]


def _tcp_alone(sent: Mapping[tuple[int, int], Sent], places: Places) -> TcpAlone | None:
    """Nodes with traffic by TCP, where most have none: theirs goes another way."""
    nodes = sorted({a for a, _ in sent})
    if not nodes or 2 * len(nodes) >= len(places.nodes):
        return None
    return TcpAlone(tuple(nodes), sum(one.num_bytes for one in sent.values()))


def _slow_groups(times: Mapping[int, RankTimes], places: Places) -> list[SlowGroup]:
    step = statistics.median(one.step for one in times.values())
    slow: dict[tuple[int, ...], SlowGroup] = {}  # the slowest of those on the same nodes
    fast: set[int] = set()  # nodes that a group without a slow link is on
    for hop, groups in enumerate((places.partition_groups, places.replication_groups)):
        took = {g: min(times[r].fastest[hop] for r in g) for g in groups if len(g) > 1}
        if len(took) < 2 or min(took.values()) <= 0:  # not measured here
            continue
        usual = statistics.median(sorted(took.values())[: (len(took) + 1) // 2])
        for group, seconds in sorted(took.items(), key=lambda item: item[1]):
            nodes = tuple(sorted({places.node_of(rank) for rank in group}))
            if _SLOW * seconds >= usual and seconds - usual > _WORTH_NAMING * step:
                slow[nodes] = SlowGroup(group, nodes, WHERE[hop], seconds, usual)
            else:
                fast |= set(nodes)
    if len(slow) > 1:
        common = set.intersection(*map(set, slow)) - fast
        if len(common) == 1:
            worst = max(slow.values(), key=lambda one: one.seconds / one.peers)
            return [replace(worst, nodes=tuple(common))]
    return list(slow.values())


def _upper_median(values: Sequence[float]) -> float:
    """Median of the upper half: one slow cable may slow every other pair of a small ring."""
    return statistics.median(sorted(values)[-max(1, len(values) // 2) :])


def megabits(rate: float) -> str:
    """Write the rate of a link: 1,234 Mbit/s."""
    return f"{rate / 1e6:,.0f} Mbit/s"
