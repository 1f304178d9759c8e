"""Where the time of a run went, from its first step on: stretches of time and what filled them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from mics.planning.pages import colours
from mics.planning.pages.document import Figure
from mics.quantities import clock
from mics.training.page.entries import Entry, number

PARTS = {
    "computation": colours.COMPUTE,
    "waits for hop 1": colours.HOP_1,
    "waits for hop 2": colours.HOP_2,
    "step, parts n/a": colours.TEAL,
    "evaluation": colours.EVALUATION,
    "checkpoint": colours.SAVE,
    "not measured": colours.OTHER,
}
"""What fills a stretch, and its colour."""

MOST = 500
"""Bars that a browser draws and zooms without a lag."""

_MARKS = {
    "restart": ("triangle-right", colours.INDIGO),
    "skipped step": ("x", colours.LIMIT),
    "rollback": ("triangle-left", colours.PURPLE),
    "somebody slow": ("diamond", colours.YELLOW),
}


@dataclass(frozen=True)
class Stretch:
    """A stretch of the time in which the run ran.

    Args:
        start: seconds since it began, without the time in which it did not run.
        end: the same.
        words: what it was: step 7.
        parts: seconds by ``PARTS``.
    """

    start: float
    end: float
    words: str
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Mark:
    """Something that happened at a moment (seconds, as of stretches)."""

    at: float
    kind: str
    words: str


@dataclass
class Timeline:
    """A run's time, in order."""

    stretches: list[Stretch] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)


def timeline(entries: Sequence[Entry]) -> Timeline:
    """Put a run's entries in order of time.

    A stretch begins where the one before has ended; what nobody has measured of it is said to be
    that. Entries of earlier versions bear no time: then a step's own seconds are all that is known.

    Args:
        entries: all of a run, in the order in which they were written.
    """
    found = Timeline()
    now, shift, latest = 0.0, None, None  # shift: from the clock on the wall to that of the run
    for entry in entries:
        kind, wall = entry["kind"], number(entry, "time")
        if kind == "begin" or shift is None:
            if found.stretches:
                found.marks.append(Mark(now, "restart", _restarted(entry, wall, latest)))
            shift = None if wall is None else wall - now
            if shift is not None and kind != "begin":
                shift -= number(entry, "seconds") or 0.0
        latest = wall if wall is not None else latest
        parts = _parts(entry)
        if parts:
            spent = sum(parts.values())
            end = now + spent if wall is None or shift is None else max(wall - shift, now)
            rest = end - now - spent
            shown = parts if rest <= 0 else parts | {"not measured": rest}
            if end > now:
                found.stretches.append(Stretch(now, end, f"{kind} {entry['step']}", shown))
            now = end
        found.marks += _marks(entry, now)
    return found


def _restarted(entry: Entry, wall: float | None, latest: float | None) -> str:
    stood = None if wall is None or latest is None else wall - latest
    return f"goes on from step {entry['step']}; did not run for {clock(stood)}"


def _parts(entry: Entry) -> dict[str, float]:
    """Take apart what an entry says of its seconds."""
    seconds = number(entry, "seconds")
    if seconds is None:
        return {}
    if entry["kind"] in ("evaluation", "save"):
        return {"evaluation" if entry["kind"] == "evaluation" else "checkpoint": seconds}
    if entry["kind"] != "step":
        return {}
    one, two = number(entry, "hop_1_exposed"), number(entry, "hop_2_exposed")
    if one is None or two is None:
        return {"step, parts n/a": seconds}
    one = min(one, seconds)
    two = min(two, seconds - one)
    return {"computation": seconds - one - two, "waits for hop 1": one, "waits for hop 2": two}


def _marks(entry: Entry, now: float) -> Iterator[Mark]:
    step = entry["step"]
    if entry["kind"] == "skip":
        yield Mark(now, "skipped step", f"step {step}: {entry.get('why', 'n/a')}")
    if entry["kind"] == "rollback":
        yield Mark(now, "rollback", f"after step {step} back to step {entry.get('to', 'n/a')}")
    slow = entry.get("slow")
    if entry["kind"] == "stragglers" and isinstance(slow, list) and slow:
        yield Mark(now, "somebody slow", f"step {step}: {'; '.join(map(str, slow))}")


def merged(stretches: Sequence[Stretch], most: int = MOST) -> tuple[list[Stretch], int]:
    """Join neighbours until so few are left; nothing of their seconds is lost.

    Args:
        stretches: in order.
        most: to be left.

    Returns:
        The joined ones, and how many became one.
    """
    each = max(1, math.ceil(len(stretches) / most))
    if each == 1:
        return list(stretches), 1
    joined = []
    for i in range(0, len(stretches), each):
        some = stretches[i : i + each]
        parts: dict[str, float] = {}
        for one in some:
            for kind, seconds in one.parts.items():
                parts[kind] = parts.get(kind, 0.0) + seconds
        words = f"{some[0].words} to {some[-1].words}"
        joined.append(Stretch(some[0].start, some[-1].end, words, parts))
    return joined, each


def timeline_figure(found: Timeline) -> tuple[Figure, int]:
    """Draw shares of the time over the time; a slider below chooses what is seen.

    Args:
        found: the run's time, with one stretch at least.

    Returns:
        The figure, and how many stretches one bar stands for.
    """
    bars, each = merged(found.stretches)
    unit, suffix = _unit(bars[-1].end)
    middles = [round((bar.start + bar.end) / 2 / unit, 6) for bar in bars]
    widths = [round((bar.end - bar.start) / unit, 6) for bar in bars]
    traces: list[dict[str, Any]] = []
    for kind, colour in PARTS.items():
        seconds = [bar.parts.get(kind, 0.0) for bar in bars]
        if not any(seconds):
            continue
        shares = [
            round(100 * part / max(bar.end - bar.start, sum(bar.parts.values())), 3)
            for part, bar in zip(seconds, bars, strict=True)
        ]
        words = [
            f"{bar.words}: {kind} {part:.4g} of {bar.end - bar.start:.4g} s"
            for part, bar in zip(seconds, bars, strict=True)
        ]
        look = {"color": colour, "line": {"width": 0}}
        traces.append(
            {"type": "bar", "name": kind, "x": middles, "y": shares, "width": widths}
            | {"marker": look, "hovertext": words, "hoverinfo": "text"}
        )
    traces += _mark_traces(found.marks, unit)
    end = bars[-1].end / unit
    axis = {"ticksuffix": suffix, "range": [0, end], "rangeslider": {"thickness": 0.13}}
    layout = {
        "barmode": "stack",
        "bargap": 0,
        "xaxis": axis | {"showgrid": False},
        "yaxis": {"range": [0, 112], "fixedrange": True, "tickvals": [0, 25, 50, 75, 100]}
        | {"ticktext": ["0 %", "25 %", "50 %", "75 %", "100 %"]},
    }
    return Figure(traces, 430, layout), each


def _mark_traces(marks: Sequence[Mark], unit: float) -> list[dict[str, Any]]:
    traces = []
    for kind, (symbol, colour) in _MARKS.items():
        some = [mark for mark in marks if mark.kind == kind][-MOST:]
        if some:
            look = {"symbol": symbol, "color": colour, "size": 11}
            traces.append(
                {"type": "scatter", "mode": "markers", "name": kind, "marker": look}
                | {"x": [mark.at / unit for mark in some], "y": [106] * len(some)}
                | {"hovertext": [escape(mark.words) for mark in some], "hoverinfo": "text"}
            )
    return traces


def _unit(seconds: float) -> tuple[float, str]:
    if seconds < 300:
        return 1.0, " s"
    if seconds < 4 * 3600:
        return 60.0, " min"
    return 3600.0, " h"
