"""What ``metrics.jsonl`` holds, read back: entries by kind, those of steps taken back left out."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mics.training.record import HELD_OUT

METRICS = "metrics.jsonl"
Entry = dict[str, Any]


@dataclass(frozen=True)
class History:
    """A run as its metrics tell it.

    Args:
        entries: all, in the order in which they were written.
        steps: one entry for each step that counts, in order.
        evaluations: the same of evaluations of the held-out share.
        sets: the same of what else was measured, by its name.
        again: how many entries of steps do not count, because the run went back behind them.
    """

    entries: Sequence[Entry] = field(repr=False)
    steps: Sequence[Entry] = field(repr=False)
    evaluations: Sequence[Entry] = field(repr=False)
    sets: Mapping[str, Sequence[Entry]] = field(repr=False)
    again: int = 0

    def of(self, kind: str) -> list[Entry]:
        """List the entries of a kind, in the order in which they were written."""
        return [entry for entry in self.entries if entry["kind"] == kind]

    @property
    def begin(self) -> Entry:
        """The latest beginning; nothing is known of it in files of earlier versions."""
        return next(iter(self.of("begin")[::-1]), {})

    @property
    def end(self) -> Entry:
        """The end, if the run has come to one since it was begun last; else an empty entry."""
        for entry in reversed(self.entries):
            if entry["kind"] in ("begin", "end"):
                return entry if entry["kind"] == "end" else {}
        return {}


def read_history(path: Path) -> History:
    """Read a metrics file.

    Where a run was resumed or has gone back, the steps behind that point do not count: it has left
    them. Lines that a killed process has torn are left out.

    Args:
        path: ``metrics.jsonl``.

    Raises:
        OSError: it cannot be read.
    """
    entries = list(_entries(path.read_text(errors="replace").splitlines()))
    # None: steps. What was measured has the names that stand in the file.
    kept: dict[str | None, dict[int, Entry]] = {None: {}, HELD_OUT: {}}
    for entry in entries:
        back = {"begin": "step", "rollback": "to"}.get(entry["kind"])
        if back is not None:
            last = number(entry, back)
            for kind, rows in kept.items():
                kept[kind] = {n: row for n, row in rows.items() if last is None or n <= last}
        elif entry["kind"] == "step":
            kept[None][entry["step"]] = entry
        elif entry["kind"] == "evaluation":
            kept.setdefault(str(entry.get("name", HELD_OUT)), {})[entry["step"]] = entry
    steps, evaluations = (_in_order(kept.pop(key)) for key in (None, HELD_OUT))
    sets = {str(name): _in_order(rows) for name, rows in kept.items() if rows}
    written = sum(entry["kind"] == "step" for entry in entries)
    return History(entries, steps, evaluations, sets, written - len(steps))


def _in_order(rows: Mapping[int, Entry]) -> list[Entry]:
    return [rows[step] for step in sorted(rows)]


def _entries(lines: Iterable[str]) -> Iterable[Entry]:
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict):
            continue
        if isinstance(entry.get("step"), int) and isinstance(entry.get("kind"), str):
            yield entry


def number(entry: Entry, key: str) -> float | None:
    """Read a number of an entry; ``None`` where there is none, or none that is finite."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def numbers(entries: Iterable[Entry], key: str) -> list[float]:
    """Read what is known of a number in several entries."""
    return [value for entry in entries if (value := number(entry, key)) is not None]


def typical(entries: Iterable[Entry], key: str) -> float | None:
    """Take the median of what is known of a number; ``None`` where nothing is."""
    known = numbers(entries, key)
    return statistics.median(known) if known else None


@dataclass(frozen=True)
class Thinned:
    """A line with fewer points than were measured.

    Args:
        at: steps, of each bucket the last.
        middle: median of each bucket; ``None`` where nothing is known of it.
        low: the least in it.
        high: the most in it.
        each: steps of a bucket; 1: every step is shown.
    """

    at: list[int]
    middle: list[float | None]
    low: list[float | None]
    high: list[float | None]
    each: int


def thinned(steps: Sequence[Entry], key: str, most: int = 1000) -> Thinned:
    """Reduce a number of many steps to so many points that a browser does not lag.

    Args:
        steps: entries.
        key: of the number.
        most: points.
    """
    each = max(1, math.ceil(len(steps) / most))
    buckets = [steps[i : i + each] for i in range(0, len(steps), each)]

    def of(function: Callable[[list[float]], float]) -> list[float | None]:
        known = (numbers(bucket, key) for bucket in buckets)
        return [function(values) if values else None for values in known]

    at = [bucket[-1]["step"] for bucket in buckets]
    return Thinned(at, of(statistics.median), of(min), of(max), each)
