"""The figures of a run's page, but for the timeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import cycle
from typing import Any

from mics.planning.pages import colours
from mics.planning.pages.document import Figure
from mics.quantities import GIB, MIB
from mics.training.page.entries import Entry, History, number, numbers, thinned, typical

_WAITS = ("hop 1", "hop 2", "the end of the step")
_MOST_RANKS = 32


def loss_figure(history: History, key: str) -> Figure:
    """Draw the loss in training and on what is not trained on, and the steps that were skipped.

    Args:
        history: of the run, with one step at least.
        key: "loss", or "bits_per_byte".
    """
    traces = _line(history.steps, key, "training", colours.TRAINING)
    measured = measured_in(history, key)
    for name, colour, entries in measured:
        traces.append(
            _scatter(escape(name), [e["step"] for e in entries], _known(entries, key))
            | {"mode": "lines+markers", "marker": {"size": 8, "color": colour}}
            | {"line": {"color": colour, "width": 2}}
        )
    shown = [*history.steps, *(entry for *_, entries in measured for entry in entries)]
    low = min(numbers(shown, key), default=0.0)
    skipped = [entry["step"] for entry in history.steps if entry.get("taken") is False][-500:]
    if skipped:
        traces.append(
            _scatter("skipped step", skipped, [low] * len(skipped))
            | {"mode": "markers", "marker": {"symbol": "x", "size": 9, "color": colours.LIMIT}}
        )
    return Figure(traces, 360, _over_steps())


def measured_in(history: History, key: str) -> list[tuple[str, str, Sequence[Entry]]]:
    """List what was measured and can be drawn, each with its name and its colour.

    Args:
        history: of the run.
        key: "loss", or "bits_per_byte", which is not known of everything.
    """
    colour = cycle(colours.SETS)
    found = [("held out", colours.HELD_OUT, history.evaluations)]
    found += [(name, next(colour), history.sets[name]) for name in sorted(history.sets)]
    return [one for one in found if numbers(one[2], key)]


def speed_figure(history: History) -> Figure:
    """Draw tokens per second of the whole job."""
    traces = _line(history.steps, "tokens_per_second", "tokens per second", colours.GREEN)
    return Figure(traces, 280, _over_steps(from_zero=True))


def memory_figure(history: History) -> Figure:
    """Draw the peak memory of rank 0 so far, GiB."""
    traces = _line(history.steps, "memory_bytes", "peak of rank 0", colours.BLUE, scale=1 / GIB)
    layout = _over_steps(from_zero=True)
    layout["yaxis"] = layout["yaxis"] | {"ticksuffix": " GiB"}
    return Figure(traces, 240, layout)


def bytes_figure(history: History) -> Figure:
    """Draw bytes of a step by link class: counted, predicted, and of full sharding instead."""
    begin = history.begin
    rows: dict[str, tuple[float | None, float | None]] = {
        "FSDP2, full sharding<br>(arithmetic)": _both(begin, "full_sharding_{}_nodes"),
        "mics, predicted": _both(begin, "predicted_{}_nodes"),
        "mics, counted": tuple_of(lambda key: typical(history.steps, f"bytes_{key}_nodes")),
    }
    most = max((value or 0 for pair in rows.values() for value in pair), default=0)
    unit, name = (GIB, "GiB") if most >= GIB else (MIB, "MiB")
    traces = []
    for index, (link, colour) in enumerate(colours.LINKS.items()):
        known = [pair[index] for pair in rows.values()]
        values = [None if value is None else value / unit for value in known]
        texts = ["n/a" if value is None else f"{value:.4g} {name}" for value in values]
        traces.append(
            {"type": "bar", "orientation": "h", "name": link, "x": values, "y": list(rows)}
            | {"marker": {"color": colour}, "text": texts, "textposition": "auto"}
            | {"hoverinfo": "name+text", "cliponaxis": False}
        )
    layout: dict[str, Any] = {"barmode": "group"}
    layout["xaxis"] = {
        "ticksuffix": f" {name}",
        "nticks": 4,
        "range": [0, 1.02 * (most / unit or 1)],
    }
    return Figure(traces, 300, layout | {"yaxis": {"fixedrange": True}})


def ranks_figure(look: Entry) -> Figure | None:
    """Draw the time of every rank in a step, of its own and waiting, as last looked at.

    Args:
        look: an entry of the kind "stragglers".

    Returns:
        ``None`` where it has no rank.
    """
    given = look.get("ranks")
    ranks = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    ranks = sorted(ranks, key=lambda one: -(number(one, "own") or 0.0))[:_MOST_RANKS]
    ranks.sort(key=lambda one: number(one, "rank") or 0)
    if not ranks:
        return None
    names = [f"rank {number(one, 'rank') or 0:.0f}" for one in ranks]
    shades = (colours.HOP_1, colours.HOP_2, colours.GREY)
    parts: list[tuple[str, str, list[float | None]]] = [
        ("time of its own", colours.COMPUTE, [_milliseconds(one, "own") for one in ranks])
    ]
    for where, colour in zip(_WAITS, shades, strict=True):
        waited = [one.get("waited") for one in ranks]
        values = [_milliseconds(w if isinstance(w, dict) else {}, where) for w in waited]
        parts.append((f"waits in {where}".replace("in the", "at the"), colour, values))
    traces = [
        {"type": "bar", "orientation": "h", "name": name, "x": values, "y": names}
        | {"marker": {"color": colour}, "hovertemplate": "%{y}: %{x:.4g} ms"}
        for name, colour, values in parts
    ]
    layout: dict[str, Any] = {
        "barmode": "stack",
        "xaxis": {"ticksuffix": " ms", "nticks": 4},
        "bargap": 0.25,
    }
    layout["yaxis"] = {"autorange": "reversed", "fixedrange": True}
    return Figure(traces, 130 + 24 * len(ranks), layout)


def tuple_of(value: Callable[[str], float | None]) -> tuple[float | None, float | None]:
    """Ask for the value of both link classes."""
    return value("between"), value("inside")


def _both(entry: Entry, key: str) -> tuple[float | None, float | None]:
    return tuple_of(lambda link: number(entry, key.format(link)))


def _milliseconds(entry: Entry, key: str) -> float | None:
    value = number(entry, key)
    return None if value is None else 1e3 * value


def _known(entries: Sequence[Entry], key: str) -> list[float | None]:
    return [number(entry, key) for entry in entries]


def _line(
    steps: Sequence[Entry], key: str, name: str, colour: str, scale: float = 1.0
) -> list[dict[str, Any]]:
    """Draw a number over the steps; where steps share a point, with the range of their values."""
    points = thinned(steps, key)

    def scaled(values: Sequence[float | None]) -> list[float | None]:
        return [None if value is None else value * scale for value in values]

    line = _scatter(name, points.at, scaled(points.middle)) | {
        "mode": "lines" if len(points.at) > 1 else "markers",
        "line": {"color": colour, "width": 1.8},
    }
    if points.each == 1:
        return [line]
    edge = {"mode": "lines", "line": {"width": 0, "color": colour}, "hoverinfo": "skip"}
    band = {"fill": "tonexty", "fillcolor": f"{colour}33"}
    low = _scatter("least", points.at, scaled(points.low)) | edge | {"showlegend": False}
    high = _scatter("least to most", points.at, scaled(points.high)) | edge | band
    return [low, high, line]


def _scatter(name: str, x: Sequence[int], y: Sequence[float | None]) -> dict[str, Any]:
    return {"type": "scatter", "name": name, "x": list(x), "y": list(y)} | {
        "hovertemplate": "step %{x}: %{y:.4~g}"
    }


def _over_steps(*, from_zero: bool = False) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": "step"}, "zeroline": False, "nticks": 8},
        "yaxis": {"rangemode": "tozero" if from_zero else "normal", "zeroline": from_zero}
        | {"fixedrange": True},
        "hovermode": "x unified",
    }
