"""Counts what was communicated: calls, bytes and time per hop, collective and stage.

The ledger is the measurement that ``traffic.py`` predicts. It records the message of every
collective as it is issued and turns messages into bytes per link with the same formulas, so that
``mics.ledger(model).traffic() == mics.traffic.mics(...)`` holds exactly or something is wrong.
Nothing here synchronises a device: on a GPU, times come from events read after they have passed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from mics.communication.pace import Pace
from mics.quantities import megabytes, milliseconds
from mics.ranks.device import on_accelerator
from mics.ranks.issuing import Handle
from mics.ranks.recording import Flight, recorder
from mics.traffic import Collective, Count, Key, StageMessage, Traffic, stage_flow


@dataclass(frozen=True)
class Seconds:
    """Time of one key since the last reset.

    ``total`` runs from issue to completion. ``exposed`` is how long the caller's thread was held
    up; on a GPU the thread is not, and what the *device* waited for is unknown: ``None``.
    """

    total: float = 0.0
    exposed: float | None = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        if self.exposed is None or other.exposed is None:
            return Seconds(self.total + other.total, None)
        return Seconds(self.total + other.total, self.exposed + other.exposed)


class Ledger:
    """Counts of one communication unit on this rank, since the last reset.

    Args:
        rank: this process' world rank.
        gpus_per_node: ranks per node, which decides the link class of a message.
        pace: is told when hops are reached, and what was waited for in them.
    """

    def __init__(self, *, rank: int, gpus_per_node: int, pace: Pace | None = None) -> None:
        self._rank = rank
        self._gpus_per_node = gpus_per_node
        self._pace = pace
        self._lock = threading.Lock()
        self._calls: dict[tuple[Key, StageMessage], int] = {}
        self._spent: dict[Key, tuple[float, float | None]] = {}  # total and exposed seconds
        self._events: deque[tuple[Key, Any, Any]] = deque()

    def issue(
        self, hop: int, collective: Collective, message: StageMessage, device: torch.device
    ) -> Span:
        """Count one collective and return the span that times it."""
        key = Key(hop, collective, message.stage)
        if self._pace is not None:
            self._pace.reached(hop)
        with self._lock:
            self._calls[key, message] = self._calls.get((key, message), 0) + 1
        tracer = recorder()
        flight = None if tracer is None else tracer.issue(self, hop, collective, message)
        return Span(self, key, device, flight)

    def traffic(self) -> Traffic:
        """What this rank sent since the last reset, comparable with a prediction."""
        with self._lock:
            calls = dict(self._calls)
        counts: dict[Key, Count] = {}
        for (key, message), n in calls.items():
            flow = stage_flow(key.collective, message, self._rank, self._gpus_per_node) * n
            count = Count(n, message.message_bytes * n, flow)
            counts[key] = counts.get(key, Count()) + count
        return Traffic(counts)

    def seconds(self) -> dict[Key, Seconds]:
        """Time per key since the last reset; GPU work that has not finished is not in it yet."""
        self._collect_events()
        with self._lock:
            return {key: Seconds(*spent) for key, spent in self._spent.items()}

    def reset(self) -> None:
        """Forget everything counted so far."""
        with self._lock:
            self._calls.clear()
            self._spent.clear()
            self._events.clear()

    def _add_seconds(self, key: Key, total: float, exposed: float | None) -> None:
        with self._lock:
            before, exposed_before = self._spent.get(key, (0.0, 0.0))
            known = None if exposed is None or exposed_before is None else exposed_before + exposed
            self._spent[key] = before + total, known
        # What was exposed; of a device, which says nothing of it, all.
        waited = total if exposed is None else exposed
        if waited and self._pace is not None:
            self._pace.took(key.hop, waited, (id(self), key))

    def _add_events(self, key: Key, start: Any, end: Any) -> None:
        self._events.append((key, start, end))
        if len(self._events) > 64:
            self._collect_events()

    def _collect_events(self) -> None:
        while self._events and self._events[0][2].query():
            key, start, end = self._events.popleft()
            self._add_seconds(key, start.elapsed_time(end) / 1e3, None)


class Span:
    """The time of one collective, from the moment it was issued.

    Use as a context around a blocking call, or ``follow`` a work handle and ``wait`` for it.
    """

    def __init__(
        self, ledger: Ledger, key: Key, device: torch.device, flight: Flight | None
    ) -> None:
        self._ledger = ledger
        self._flight = flight  # what a trace is told of it
        self._key = key
        self._by_events = on_accelerator(device)
        self._start = time.perf_counter()
        self._start_event: Any = None
        self._device = device
        self._followed = False

    def __enter__(self) -> Span:
        self.restart()
        if self._flight is not None:
            self._flight.__enter__()
        self._start_event = _record_event(self._device) if self._by_events else None
        return self

    def __exit__(
        self,
        error: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._flight is not None:
            self._flight.__exit__()
            self._flight.end()
        if error is not None:
            return
        if self._by_events:
            end = _record_event(self._device)
            self._ledger._add_events(self._key, self._start_event, end)
        else:
            spent = time.perf_counter() - self._start
            self._ledger._add_seconds(self._key, spent, spent)

    def restart(self) -> None:
        """Begin here: a second stage is issued with the first but starts after it."""
        self._start = time.perf_counter()
        if self._flight is not None:
            self._flight.restart()

    def follow(self, work: Handle) -> None:
        """Time an asynchronous CPU collective to its completion, in the backend's own thread."""

        def done(_: object) -> None:
            if self._flight is not None:
                self._flight.end()
            self._ledger._add_seconds(self._key, time.perf_counter() - self._start, 0.0)

        try:
            future = work.get_future()
        except RuntimeError:  # Gloo's reduce-scatter has none, and nothing says so beforehand
            return
        future.add_done_callback(done)
        self._followed = True

    def wait(self, work: Handle) -> None:
        """Wait for an asynchronous collective; the time spent here is what was exposed.

        One that was not followed is timed until here, later than its end.
        """
        start = time.perf_counter()
        if self._flight is None:
            work.wait()
        else:
            with self._flight:
                work.wait()
            self._flight.end()
        end = time.perf_counter()
        total = 0.0 if self._followed else end - self._start
        self._ledger._add_seconds(self._key, total, end - start)


class Untimed:
    """Stands in the place of a span, for a collective that nobody counts."""

    def __enter__(self) -> Untimed:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def restart(self) -> None:
        """Do nothing."""

    def follow(self, work: Handle) -> None:
        """Do nothing."""

    def wait(self, work: Handle) -> None:
        """Wait for an asynchronous collective."""
        work.wait()


Timed = Span | Untimed


@dataclass(frozen=True)
class LedgerView:
    """The ledgers of a whole model, read together."""

    ledgers: tuple[Ledger, ...]

    def traffic(self) -> Traffic:
        """What this rank sent since the last reset."""
        return sum((ledger.traffic() for ledger in self.ledgers), Traffic({}))

    def seconds(self) -> dict[Key, Seconds]:
        """Time per hop, collective and stage since the last reset."""
        total: dict[Key, Seconds] = {}
        for ledger in self.ledgers:
            for key, seconds in ledger.seconds().items():
                total[key] = total.get(key, Seconds()) + seconds
        return total

    def reset(self) -> None:
        """Start counting anew."""
        for ledger in self.ledgers:
            ledger.reset()

    def __str__(self) -> str:
        return "\n".join(_table(self.traffic(), self.seconds()))


def _table(traffic: Traffic, seconds: dict[Key, Seconds]) -> Iterable[str]:
    yield (
        f"{'hop':<4}{'collective':<16}{'stage':<7}{'calls':>7}{'sent intra':>13}{'sent inter':>13}"
        f"{'total':>11}{'exposed':>11}"
    )
    for key, count in sorted(traffic.counts.items()):
        spent = seconds.get(key)
        yield (
            f"{key.hop:<4}{key.collective:<16}{key.stage:<7}{count.calls:>7}"
            f"{megabytes(count.flow.intra_bytes):>13}{megabytes(count.flow.inter_bytes):>13}"
            f"{milliseconds(spent.total if spent else None):>11}"
            f"{milliseconds(spent.exposed if spent else None):>11}"
        )


def _record_event(device: torch.device) -> Any:
    module = torch.get_device_module(device)
    event = module.Event(enable_timing=True)
    event.record(module.current_stream(device))
    return event
