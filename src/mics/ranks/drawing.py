"""A Topology as text: which rank sits where, and who talks to whom.

Plain ASCII, so that a log file or a C locale shows it as well as a terminal does. Large clusters
are cut in the middle, never in silence: what is left out is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from mics.topology import Ranks, Topology, nodes_of

_Item = TypeVar("_Item")

_MOST_COLUMNS = 16  # ranks in one row of the group map; three digits each still fit a terminal
_MOST_RANKS = 4  # ranks spelled out inside one group
_MOST_GROUPS = 4  # groups spelled out on one line


def draw(topology: Topology, *, hosts: Sequence[str] | None = None, most: int = 8) -> str:
    """Draw the node map and, below it, the group map.

    Args:
        topology: what to draw.
        hosts: the host of every rank, if known.
        most: rows of each map before it is cut in the middle; at least 3.
    """
    return f"{node_map(topology, hosts=hosts, most=most)}\n\n{group_map(topology, most=most)}"


def node_map(topology: Topology, *, hosts: Sequence[str] | None = None, most: int = 8) -> str:
    """Draw one line per node: its host, if known, and its ranks.

    Args:
        topology: what to draw.
        hosts: the host of every rank, if known; a node shows the host of its first rank.
        most: nodes before the list is cut in the middle; at least 3.
    """
    k = topology.gpus_per_node
    digits = len(str(topology.world - 1))
    label = len(str(topology.nodes - 1))
    host_of = [hosts[node * k] if hosts else "" for node in range(topology.nodes)]
    width = max(map(len, host_of)) + 2 if hosts else 0

    def line(node: int) -> str:
        ranks = _cells(range(node * k, (node + 1) * k), digits)
        return f"  node {node:<{label}}  {host_of[node]:<{width}}{ranks}"

    title = f"Node map: {_plural(topology.nodes, 'node')} x {_plural(k, 'rank')} = {topology.world}"
    return "\n".join([title, *_cut(range(topology.nodes), most, line, "node")])


def group_map(topology: Topology, *, most: int = 8) -> str:
    """Draw the groups: a row is a partition group, a column is a replication group.

    Below the picture, the groups of hop 1, of its two stages when a partition group spans nodes,
    and of hop 2 are listed.

    Args:
        topology: what to draw.
        most: partition groups before the picture is cut in the middle; at least 3.
    """
    title = (
        f"Group map: partition {topology.partition}, {_plural(topology.replicas, 'replica')} "
        "(row = partition group, column = replication group)"
    )
    return "\n".join([title, *_grid(topology, most), "", *_group_list(topology)])


def ranks_text(ranks: Sequence[int]) -> str:
    """Write ascending ranks, runs of them drawn together: ``0-3, 7``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def group_text(ranks: Sequence[int]) -> str:
    """Write a group: ``{0 2 4}``; a long one is a run, ``{0-7}``, or cut, ``{0 8 .. 504}``."""
    if len(ranks) <= _MOST_RANKS:
        return "{" + " ".join(map(str, ranks)) + "}"
    if ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{{{ranks[0]}-{ranks[-1]}}}"
    return f"{{{ranks[0]} {ranks[1]} .. {ranks[-1]}}}"


# -- the picture ---------------------------------------------------------------------------------


def _grid(topology: Topology, most: int) -> list[str]:
    digits = len(str(topology.world - 1))
    label = len(f"replica {topology.replicas - 1}")
    first = topology.partition_groups()[0]

    def line(replica: int) -> str:
        group = topology.partition_group_of(replica * topology.partition)
        return f"  {f'replica {replica}':<{label}}  {_row(topology, group, digits)}  " + (
            _where(topology, group)
        )

    header = f"  {'shard':>{label}}  {_row(topology, first, digits)}"
    return [header, *_cut(range(topology.replicas), most, line, "replica")]


def _row(topology: Topology, group: Ranks, digits: int) -> str:
    """Write the ranks of a partition group, a bar between nodes, the middle cut out if long."""
    rows = [_cells(row, digits) for row in nodes_of(group, topology.gpus_per_node)]
    if len(rows) <= 2 or topology.partition <= _MOST_COLUMNS:
        return " | ".join(rows)
    return f"{rows[0]} | .. {_plural(len(rows) - 2, 'node')} .. | {rows[-1]}"


def _cells(ranks: Sequence[int], digits: int) -> str:
    """Write ranks in columns of one width; a node with many keeps its first four and its last."""
    cells = [f"{rank:>{digits}}" for rank in ranks]
    if len(cells) > _MOST_COLUMNS:
        cells = [*cells[:4], "..", cells[-1]]
    return " ".join(cells)


def _where(topology: Topology, group: Ranks) -> str:
    first, last = topology.node_of(group[0]), topology.node_of(group[-1])
    return f"node {first}" if first == last else f"nodes {first}-{last}"


def _cut(items: Sequence[_Item], most: int, line: Callable[[_Item], str], noun: str) -> list[str]:
    """Write a line per item; of many, the first ones, how many were left out, and the last."""
    most = max(most, 3)
    if len(items) <= most:
        return [line(item) for item in items]
    shown = items[: most - 2]
    left_out = len(items) - len(shown) - 1
    return [*map(line, shown), f"  ... {_plural(left_out, noun)} left out", line(items[-1])]


# -- the list ------------------------------------------------------------------------------------


def _group_list(topology: Topology) -> list[str]:
    partition, replicas = topology.partition, topology.replicas
    if partition == 1:
        hop_1 = "none: every rank holds a whole replica"
    else:
        hop_1 = _groups(topology.partition_groups())
    entries = [("hop 1, partition groups", hop_1)]
    if topology.spans_nodes and topology.gpus_per_node > 1:
        entries += [
            ("  inter stage", _groups(topology.inter_groups())),
            ("  intra stage", _groups(topology.intra_groups())),
        ]
    hop_2 = _groups(topology.replication_groups()) if replicas > 1 else "none: one replica"
    entries.append(("hop 2, replication groups", hop_2))
    width = max(len(name) for name, _ in entries)
    return [f"  {name:<{width}}  {text}" for name, text in entries]


def _groups(groups: Sequence[Ranks]) -> str:
    text = f"{len(groups)} of {_plural(len(groups[0]), 'rank')}: "
    if len(groups) <= _MOST_GROUPS:
        return text + " ".join(map(group_text, groups))
    shown = " ".join(map(group_text, groups[: _MOST_GROUPS - 2]))
    return f"{text}{shown} .. {group_text(groups[-1])}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
