"""A node described by what ``mics bench collectives --out`` measured on it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mics.anatomy.recipe import ON_GPUS, ON_HOSTS
from mics.errors import PlanError
from mics.hardware.cluster import Gpu, Link, Node
from mics.hardware.fit import Point, fit_links
from mics.hardware.network import all_reduce_terms, gather_terms
from mics.ranks.files import read_small
from mics.traffic import Form

_BURST = 1.02
_MOST_BYTES = 2**26  # of a file that mics bench wrote

MeasuredRow = Mapping[str, Any]


def measured_node(path: Path, gpu: Gpu) -> Node:
    """Describe a node by its links, whose figures are fitted to measured times.

    All-gathers, flat and hierarchical, of groups of any size give both links at once; all-reduces
    over nodes have figures of their own. Where one node was measured nothing is known of the link
    between nodes.

    Ranks that were measured on CPUs talked through Gloo, and are planned for so. There a stage
    inside a node takes longer in a step than alone, as ranks compute on the same cores; a factor
    that was found by comparing a run stands in the file as ``inside_in_a_step``.

    Args:
        path: the JSON that ``mics bench collectives`` wrote.
        gpu: the GPU that the node has.

    Raises:
        PlanError: it is no such file, or holds too few sizes.
    """
    try:
        document = json.loads(read_small(path, _MOST_BYTES))
        k = _count(document["gpus_per_node"])
        rows = [_checked(row, k) for row in document["measured"]]
        largest = max(row["ranks"] for row in rows)
        gloo = _on_gloo(document)
        inside = _positive(document.get("inside_in_a_step", 1.0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PlanError(
            f"{path} is no result of mics bench collectives.",
            numbers=f"{type(error).__name__}: {error}",
            write="mics bench collectives --out collectives.json",
        ) from None
    nodes = max(largest // k, 1)
    if largest == 1:
        raise PlanError(
            f"{path} was measured on one rank, which has no link.",
            write="torchrun --nproc-per-node <GPUs> -m mics bench collectives",
        )
    for collective in ("all_gather", "all_reduce") if nodes > 1 else ("all_gather",):
        if not _rows_of(rows, collective, "flat"):
            raise PlanError(
                f"{path} has no {collective.replace('_', '-')} among what was measured.",
                write="mics bench collectives --out collectives.json",
            )
    links = fit_links(_gathers(rows, k))
    inter = links.get("inter", Link(0.0, 0.0))
    intra = links.get("intra", inter)  # of nodes with one rank, of which no group is inside
    how: dict[str, Any] = {"gloo": gloo, "inside": inside}
    how["machine"] = ON_HOSTS if gloo else ON_GPUS
    node = Node(path.stem, gpu, k, intra, inter, source=str(path), measured_nodes=nodes, **how)
    if nodes == 1:
        return node
    return replace(node, all_reduce=fit_links(_all_reduces(rows, k, gloo), intra)["inter"])


def _on_gloo(document: dict[str, Any]) -> bool:
    """Whether Gloo moved what was measured; by the device, where torch named no backend."""
    backend = document.get("backend")
    if backend in (None, "undefined"):
        return bool(document.get("device", "cpu") == "cpu")
    return bool(backend == "gloo")


def _checked(row: Any, k: int) -> MeasuredRow:
    """A row with figures that are some."""
    ranks = _count(row["ranks"])
    _positive(row["seconds"]["median"])
    if ranks % k and k % ranks:
        raise ValueError(f"{ranks} ranks on nodes of {k}")
    named = {name: str(row[name]) for name in ("collective", "form")}
    return {**row, **named, "ranks": ranks, "message_bytes": _count(row["message_bytes"])}


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} is no positive whole number")
    return value


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{value!r} is no positive number")
    return number


def _gathers(rows: Sequence[MeasuredRow], k: int) -> list[Point]:
    forms: tuple[Form, ...] = ("flat", "hierarchical")
    return [
        Point(gather_terms(k, row["ranks"], row["message_bytes"], form), _median(row))
        for form in forms
        for row in _rows_of(rows, "all_gather", form)
        if row["ranks"] > 1
    ]


def _all_reduces(rows: Sequence[MeasuredRow], k: int, ring: bool) -> list[Point]:
    points = []
    for row in _rows_of(rows, "all_reduce", "flat"):
        ranks, nodes = row["ranks"], row["ranks"] // k
        if nodes > 1:
            terms = all_reduce_terms(ranks, nodes, row["message_bytes"], ring=ring)
            points.append(Point((terms,), _median(row)))
    return points


def _rows_of(rows: Sequence[MeasuredRow], collective: str, form: str) -> list[MeasuredRow]:
    """The rows of a collective in a form, but for bursts that passed a shaper above its rate."""
    chosen = [row for row in rows if row["collective"] == collective and row["form"] == form]
    kept = []
    for ranks in sorted({row["ranks"] for row in chosen}):
        group = [row for row in chosen if row["ranks"] == ranks]
        slowest = _rate(max(group, key=lambda row: int(row["message_bytes"])))
        kept += [row for row in group if _rate(row) <= _BURST * slowest]
    return kept


def _rate(row: MeasuredRow) -> float:
    return float(row["message_bytes"]) / _median(row)


def _median(row: MeasuredRow) -> float:
    return float(row["seconds"]["median"])
