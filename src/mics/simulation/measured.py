"""A node described by what ``mics bench collectives --out`` measured on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mics.errors import PlanError
from mics.simulation.fit import Fit, Point, fit_all_gather, fit_all_reduce
from mics.simulation.hardware import Gpu, Link, Node

_BURST = 1.02


def measured_node(path: Path, gpu: Gpu) -> Node:
    """Latency and bandwidth of both links, fitted to the measured times.

    Between nodes: the flat collectives over several nodes. Inside a node: what the two-stage ones
    take beside their stage between nodes; or the flat ones, where one node was measured (then there
    is no link between nodes, and its figures are the inner ones).

    Args:
        path: the JSON that ``mics bench collectives`` wrote.
        gpu: of the node.

    Raises:
        PlanError: it is no such file, or holds too few sizes.
    """
    try:
        document = json.loads(path.read_text())
        k = int(document["gpus_per_node"])
        rows = document["measured"]
        ranks = int(rows[0]["ranks"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise PlanError(
            f"{path} is no result of mics bench collectives.",
            numbers=f"{type(error).__name__}: {error}",
            write="mics bench collectives --out collectives.json",
        ) from None
    nodes = max(ranks // k, 1)
    flat = fit_all_gather(_points(rows, "all_gather", "flat", nodes))
    reduced = fit_all_reduce(_points(rows, "all_reduce", "flat", nodes))
    if nodes == 1:
        inside = _link(flat)
        return Node(path.stem, gpu, k, inside, inside, source=str(path), measured_nodes=1)
    inner = fit_all_gather(_inner_points(rows, nodes, k, flat))
    return Node(
        path.stem,
        gpu,
        k,
        _link(inner),
        _link(flat),
        Link(reduced.bandwidth, reduced.latency, reduced.falls, reduced.fixed),
        source=str(path),
        measured_nodes=nodes,
    )


def _link(fitted: Fit) -> Link:
    return Link(fitted.bandwidth, fitted.latency, fixed=fitted.fixed)


def _points(
    rows: Sequence[Mapping[str, Any]], collective: str, form: str, nodes: int
) -> list[Point]:
    chosen = [r for r in rows if r["collective"] == collective and r["form"] == form]
    points = [_point(r["ranks"], nodes, r["message_bytes"], _median(r), collective) for r in chosen]
    return _without_bursts(points)


def _without_bursts(points: list[Point]) -> list[Point]:
    """A shaper lets a short message through faster than its rate; a link never is."""
    largest = max(points, key=lambda p: p.num_bytes, default=None)
    return [p for p in points if largest is not None and p.busbw <= _BURST * largest.busbw]


def _point(ranks: int, nodes: int, num_bytes: int, seconds: float, collective: str) -> Point:
    factor = 2 if collective == "all_reduce" else 1
    moved = factor * num_bytes * (ranks - 1) / ranks
    return Point(ranks, nodes, num_bytes, moved / seconds)


def _inner_points(
    rows: Sequence[Mapping[str, Any]], nodes: int, k: int, between: Fit
) -> list[Point]:
    """What is left of two-stage gathers: a gather of the whole message inside the node."""
    points = []
    for row in rows:
        if row["collective"] == "all_gather" and row["form"] == "hierarchical":
            num_bytes = row["message_bytes"]
            outer = (
                between.latency * (nodes - 1) + num_bytes * (nodes - 1) / nodes / between.bandwidth
            )
            left = _median(row) - outer
            if left > 0:
                points.append(_point(k, 1, num_bytes, left, "all_gather"))
    return points


def _median(row: Mapping[str, Any]) -> float:
    return float(row["seconds"]["median"])
