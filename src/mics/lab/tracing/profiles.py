"""What torch's profiler has recorded, read from the file it exports."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "mics: comparison of clocks"
_NS = 1_000

Thread = tuple[str, str]
"""A row as torch names it: process or device, thread or stream."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event of torch's; times in nanoseconds since 1970.

    Args:
        phase: X for a range; s and f for the two ends of an arrow.
        name: of it.
        kind: torch's category: cpu_op, user_annotation, kernel.
        thread: where it ran.
        begun: when it began.
        ended: when it was over; of an arrow's end when it is.
        args: torch's details.
        arrow: the arrow's number, of the ends of one.
    """

    phase: str
    name: str
    kind: str
    thread: Thread
    begun: int
    ended: int
    args: dict[str, Any]
    arrow: int | None = None


@dataclass
class Profile:
    """All events of a rank.

    Args:
        events: as recorded.
        threads: what torch calls rows.
        error: nanoseconds that torch's clock was seen to be off this host's.
    """

    events: list[Event] = field(default_factory=list)
    threads: dict[Thread, str] = field(default_factory=dict)
    error: int = 0


class Profiler:
    """torch's profiler from start to stop, and a mark by which its clock is compared."""

    def __init__(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator()
            own = getattr(ProfilerActivity, str(kind.type).upper(), None) if kind else None
            activities += [own] if own is not None else []
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # of its library, which says when it starts
        self._profile = profile(activities=activities)
        self._profile.start()
        before = time.time_ns()
        with record_function(_MARK):
            pass
        self._marked = before, time.time_ns()

    def stop(self) -> None:
        """Record no more."""
        self._profile.stop()

    def read(self) -> Profile:
        """What was recorded; to be called once, after ``stop``."""
        with tempfile.TemporaryDirectory(prefix="mics-trace-") as folder:
            file = Path(folder) / "rank.json"
            self._profile.export_chrome_trace(str(file))
            found = parse(json.loads(file.read_bytes()))
        mark = next((event for event in found.events if event.name == _MARK), None)
        if mark is not None:
            first, last = self._marked
            found.error = max(first - mark.begun, mark.ended - last, 0)
        return found


def parse(document: dict[str, Any]) -> Profile:
    """Read what torch exports (Chrome's trace events, microseconds behind a base)."""
    base = int(document.get("baseTimeNanoseconds", 0))
    found = Profile()
    for one in document["traceEvents"]:
        thread = str(one.get("pid", "")), str(one.get("tid", ""))
        if one["ph"] == "M" and one["name"] == "thread_name":
            found.threads[thread] = str(one["args"]["name"])
        if one["ph"] not in ("X", "s", "f") or one.get("cat") == "Trace":
            continue
        begun = base + round(one["ts"] * _NS)
        found.events.append(
            Event(
                one["ph"],
                one["name"],
                one.get("cat", ""),
                thread,
                begun,
                begun + round(one.get("dur", 0) * _NS),
                one.get("args", {}),
                one.get("id"),
            )
        )
    return found
