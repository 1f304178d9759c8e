"""Links fitted to measured collectives: the lines of ``network.py``, solved for a link's figures.

Least squares of the relative error, no figure negative. What a collective takes whatever its size
can be told from latency only where groups of different size were measured; where one was, all of it
is latency: more nodes than measured then look rather too slow than too good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from mics.errors import PlanError
from mics.hardware.cluster import Link
from mics.hardware.network import On, Terms


@dataclass(frozen=True)
class Point:
    """A measured collective: its stages, one after the other, and seconds."""

    stages: tuple[Terms, ...]
    seconds: float


def fit_links(points: Sequence[Point], intra: Link | None = None) -> dict[On, Link]:
    """The links that measurements were made on.

    Args:
        points: measured collectives on the same links.
        intra: the link inside a node, where it is known and not to be fitted.

    Raises:
        PlanError: fewer than two points of a link, or none that shows a bandwidth.
    """
    links: list[On] = sorted(
        {t.link for p in points for t in p.stages} - {"intra" if intra else ""}
    )
    # A ring over nodes passes the links inside them too, whether they were measured or not.
    columns = {(on, figure) for on in links for figure in ("latency", "per byte")}
    for on in links:
        if len({t.hops for p in points for t in p.stages if t.link == on}) > 1:
            columns.add((on, "fixed"))
    named = sorted(columns)
    rows = [[_factor(point, *column) for column in named] for point in points]
    known = [_known(point, intra) for point in points]
    left = [p.seconds - k for p, k in zip(points, known, strict=True)]
    found = _solved(rows, left, [p.seconds for p in points])
    figures = dict(zip(named, found, strict=True)) if found else {}
    for on in links:
        count = sum(any(t.link == on for t in p.stages) for p in points)
        if count < 2 or not figures.get((on, "per byte")):
            raise PlanError(
                "Latency and bandwidth do not follow from these measurements.",
                numbers=f"{count} measurement(s) of the link {_WHERE[on]}.",
                write="mics bench collectives with several --sizes",
            )
    return {
        on: Link(
            1 / figures[on, "per byte"],
            figures[on, "latency"],
            fixed=figures.get((on, "fixed"), 0.0),
        )
        for on in links
    }


_WHERE = {"intra": "inside a node", "inter": "between nodes"}


def _factor(point: Point, on: On, figure: str) -> float:
    total = 0.0
    for terms in point.stages:
        if figure == "latency" and on == "intra":
            total += terms.inside
        if terms.link == on:
            total += {"fixed": 1.0, "latency": terms.hops, "per byte": terms.num_bytes}[figure]
    return total


def _known(point: Point, intra: Link | None) -> float:
    """Seconds of a measurement that are known before the fit."""
    if intra is None:
        return 0.0
    own = sum(t.seconds(intra, intra) for t in point.stages if t.link == "intra")
    return own + sum(t.inside * intra.latency for t in point.stages)


def _solved(
    rows: Sequence[Sequence[float]], left: Sequence[float], seconds: Sequence[float]
) -> list[float] | None:
    """Figures, none negative: every subset of them is tried, which is exact for so few."""
    scaled = [[factor / t for factor in row] for row, t in zip(rows, seconds, strict=True)]
    matrix = torch.tensor(scaled, dtype=torch.float64)
    goal = torch.tensor([[x / t] for x, t in zip(left, seconds, strict=True)], dtype=torch.float64)
    width = matrix.shape[1] if rows else 0
    best: tuple[float, list[float]] | None = None
    for count in range(1, width + 1):
        for chosen in combinations(range(width), count):
            part = matrix[:, chosen]
            found = torch.linalg.lstsq(part, goal, driver="gelsd").solution[:, 0]
            if bool((found < 0).any()):
                continue
            error = float(((part @ found - goal[:, 0]) ** 2).sum())
            if best is None or error < best[0] - 1e-12:
                figures = [0.0] * width
                for at, value in zip(chosen, found.tolist(), strict=True):
                    figures[at] = value
                best = (error, figures)
    return best[1] if best else None
