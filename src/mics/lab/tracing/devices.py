"""When an accelerator worked for what: its kernels, by the ranges of the host that launched them.

The host runs ahead of a device and is not held up, so what it wrote down says when collectives were
launched, not when they ran. torch's profiler numbers every launch and gives its kernel the same
number; a launch inside of a hop's range makes its kernel one of that hop's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from mics.lab.tracing.accounts import Account, Interval, account_of_device
from mics.lab.tracing.profiles import Event, Thread
from mics.ranks.recording import Flight

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver", "xpu_runtime", "xpu_driver")


@dataclass
class _Work:
    """One kernel: when the host launched it, when it ran, and the collective it is part of."""

    launched: int
    ran: Interval
    flight: Flight | None


def settle_on_device(
    events: Sequence[Event], flights: Sequence[Flight], steps: Sequence[tuple[int, Interval]]
) -> list[Account]:
    """Give collectives the times in which they ran on the device, and account for its steps.

    Args:
        events: of torch's profiler.
        flights: their times are replaced; one without a kernel is said to have no end.
        steps: numbers and spans on the host.

    Returns:
        One account per step; with nothing known of one that launched no kernel.
    """
    work = _work_of(events, flights)
    ran: dict[int, list[Interval]] = {}
    for one in work:
        if one.flight is not None:
            ran.setdefault(id(one.flight), []).append(one.ran)
    accounts = []
    spans = _spans_on_device(work, steps)
    for (number, host), span in zip(steps, spans, strict=True):
        if span is None:
            accounts.append(Account(number, *host, None, {}, None))
            continue
        hops = [(w.flight.hop, w.ran) for w in work if w.flight is not None]
        others = [w.ran for w in work if w.flight is None]
        inside = [flight for flight in flights if host[0] <= flight.begun < host[1]]
        accounts.append(account_of_device(number, span, hops, others))
        busy = _Busy(others, span)
        for flight in inside:
            own = ran.get(id(flight))
            flight.waits, flight.ended = [], None
            if own is not None:
                flight.begun = min(begun for begun, _ in own)
                flight.ended = max(ended for _, ended in own)
                flight.own = busy.until(flight.begun)
    return accounts


def _work_of(events: Sequence[Event], flights: Sequence[Flight]) -> list[_Work]:
    launches = {e.args.get("correlation"): e for e in events if e.kind in _LAUNCHES}
    ranges = _ranges_of(events, flights)
    found = []
    for event in events:
        if event.kind not in _ON_DEVICE:
            continue
        launch = launches.get(event.args.get("correlation"))
        launched = event.begun if launch is None else launch.begun
        flight = None if launch is None else _flight_at(ranges.get(launch.thread, []), launched)
        found.append(_Work(launched, (event.begun, event.ended), flight))
    return sorted(found, key=lambda one: one.launched)


def _ranges_of(
    events: Sequence[Event], flights: Sequence[Flight]
) -> dict[Thread, list[tuple[int, int, Flight]]]:
    """The ranges of collectives on the host, in order of time: the n-th is the n-th of its name."""
    waiting: dict[str, list[Flight]] = {}
    for flight in flights:
        if flight.waits:
            waiting.setdefault(flight.name, []).append(flight)
    found: dict[Thread, list[tuple[int, int, Flight]]] = {}
    for event in sorted(events, key=lambda one: one.begun):
        if event.kind == "user_annotation" and waiting.get(event.name):
            flight = waiting[event.name].pop(0)
            found.setdefault(event.thread, []).append((event.begun, event.ended, flight))
    return found


def _flight_at(ranges: list[tuple[int, int, Flight]], at: int) -> Flight | None:
    number = bisect_right(ranges, at, key=lambda one: one[0]) - 1
    return ranges[number][2] if number >= 0 and at < ranges[number][1] else None


def _spans_on_device(
    work: Sequence[_Work], steps: Sequence[tuple[int, Interval]]
) -> list[Interval | None]:
    """A step ends with the first kernel of the next, the last one with its own last kernel."""
    of_steps = [[w.ran for w in work if a <= w.launched < b] for _, (a, b) in steps]
    first = [min((begun for begun, _ in ran), default=None) for ran in of_steps]
    spans: list[Interval | None] = []
    for number, ran in enumerate(of_steps):
        begun, follows = first[number], first[number + 1 : number + 2]
        last = max((ended for _, ended in ran), default=0)
        ended = follows[0] if follows and follows[0] is not None else last
        spans.append(None if begun is None else (begun, max(ended, begun)))
    return spans


class _Busy:
    """How long a device has computed since a step began, asked at many moments."""

    def __init__(self, intervals: Sequence[Interval], span: Interval) -> None:
        self._merged: list[Interval] = []
        for begun, ended in sorted(intervals):
            begun, ended = max(begun, span[0]), min(ended, span[1])
            if self._merged and begun <= self._merged[-1][1]:
                self._merged[-1] = self._merged[-1][0], max(ended, self._merged[-1][1])
            elif ended > begun:
                self._merged.append((begun, ended))
        self._before = list(accumulate((b - a for a, b in self._merged), initial=0))

    def until(self, at: int) -> int:
        number = bisect_right(self._merged, at, key=lambda one: one[0])
        if number == 0:
            return 0
        begun, ended = self._merged[number - 1]
        return self._before[number - 1] + min(at, ended) - begun
