"""Clusters and ranges of nodes as text."""

from __future__ import annotations

from mics.errors import PlanError
from mics.hardware.cluster import MOST_NODES, Cluster
from mics.hardware.lookup import find_node


def parse_cluster(text: str) -> Cluster:
    """Read "p4d:8" or "p4d.24xlarge:8": 8 nodes of a kind.

    Raises:
        PlanError: another form, or an unknown node.
    """
    name, colon, count = text.rpartition(":")
    if not colon or not _is_count(count) or int(count) < 1:
        raise PlanError(
            f"{text!r} is no cluster.", write="<node>:<number of nodes>, for example p4d:8"
        )
    return Cluster(find_node(name), int(count))


def parse_range(text: str) -> list[int]:
    """Read "nodes=2..64" or "2..64": 2, 4, 8, ..., 64.

    Raises:
        PlanError: another form.
    """
    low, dots, high = text.removeprefix("nodes=").partition("..")
    if not dots or not _is_count(low) or not _is_count(high) or not 0 < int(low) <= int(high):
        raise PlanError(f"{text!r} is no range.", write="nodes=2..64 (doubling)")
    if int(high) > MOST_NODES:
        raise PlanError(f"A cluster has 1 to {MOST_NODES:,} nodes, got {text}.")
    counts, count = [], int(low)
    while count <= int(high):
        counts.append(count)
        count *= 2
    return counts


def _is_count(text: str) -> bool:
    """Tell whether a text is a number in plain digits that an integer of 64 bits holds."""
    return text.isascii() and text.isdigit() and len(text) <= 18
