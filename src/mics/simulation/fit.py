"""Latency and bandwidth of a link, fitted to measured collectives.

Least squares of the relative error, no figure negative. All-gather and reduce-scatter:
``t = fixed + latency (n - 1) + S (n - 1) / n / B``. All-reduce over nodes, which runs on trees:
``t = fixed + latency 2 log2 N + 2 S (n - 1) / n / B (N / 2) ** falls``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from mics.errors import PlanError
from mics.traffic import Collective


@dataclass(frozen=True)
class Point:
    """A measured collective.

    Args:
        ranks: n.
        nodes: N.
        num_bytes: S, of the gathered or reduced message.
        busbw: bus bandwidth as nccl-tests defines it, bytes per second.
    """

    ranks: int
    nodes: int
    num_bytes: float
    busbw: float

    def moved(self, collective: Collective) -> float:
        """Bytes that every rank sends."""
        factor = 2 if collective == "all_reduce" else 1
        return factor * self.num_bytes * (self.ranks - 1) / self.ranks

    def seconds(self, fitted: Fit) -> float:
        """Measured, of the collective that was fitted."""
        return self.moved(fitted.collective) / self.busbw


@dataclass(frozen=True)
class Fit:
    """Figures of a link; seconds and bytes per second."""

    collective: Collective
    fixed: float
    latency: float
    bandwidth: float
    falls: float = 0.0


def predicted(fitted: Fit, point: Point) -> float:
    """Seconds of a collective of that size."""
    fixed, hops, moved = _terms(fitted.collective, point, fitted.falls)
    return fitted.fixed * fixed + fitted.latency * hops + moved / fitted.bandwidth


def fit_all_gather(points: Sequence[Point]) -> Fit:
    """Of all-gathers or reduce-scatters.

    Raises:
        PlanError: fewer than two points, or none that shows a bandwidth.
    """
    return _fit("all_gather", points, 0.0)[1]


def fit_all_reduce(points: Sequence[Point]) -> Fit:
    """Of all-reduces; how the bandwidth falls with the nodes is tried in steps of 0.02.

    Raises:
        PlanError: fewer than two points, or none that shows a bandwidth.
    """
    several = len({p.nodes for p in points}) > 1
    tried = [n / 50 for n in range(31)] if several else [0.0]
    return min((_fit("all_reduce", points, falls) for falls in tried), key=lambda one: one[0])[1]


def _fit(collective: Collective, points: Sequence[Point], falls: float) -> tuple[float, Fit]:
    rows = [_terms(collective, p, falls) for p in points]
    measured = [p.moved(collective) / p.busbw for p in points]
    relative = torch.tensor(
        [[term / t for term in row] for row, t in zip(rows, measured, strict=True)],
        dtype=torch.float64,
    )
    one = torch.ones(len(points), 1, dtype=torch.float64)
    best: tuple[float, list[float]] | None = None
    # At most three figures: trying every subset finds the best without negative ones.
    for count in range(1, 4):
        for chosen in combinations(range(3), count):
            found = torch.linalg.lstsq(relative[:, chosen], one, driver="gelsd").solution[:, 0]
            if 2 not in chosen or bool((found < 0).any()):
                continue
            error = float(((relative[:, chosen] @ found - 1) ** 2).sum())
            if best is None or error < best[0] - 1e-12:
                figures = [0.0, 0.0, 0.0]
                for at, value in zip(chosen, found.tolist(), strict=True):
                    figures[at] = value
                best = (error, figures)
    if len(points) < 2 or best is None or best[1][2] <= 0:
        raise PlanError(
            "Latency and bandwidth do not follow from these measurements.",
            numbers=f"{len(points)} measurement(s).",
            write="mics bench collectives with several --sizes",
        )
    fixed, latency, per_byte = best[1]
    return best[0], Fit(collective, fixed, latency, 1 / per_byte, falls)


def _terms(collective: Collective, point: Point, falls: float) -> tuple[float, float, float]:
    if collective == "all_reduce":
        hops = 2 * math.log2(point.nodes) if point.nodes > 1 else 2 * (point.ranks - 1)
        slower = (max(point.nodes, 2) / 2) ** falls
        return 1.0, hops, point.moved(collective) * slower
    return 1.0, float(point.ranks - 1), point.moved(collective)
