"""When a rank comes to each hop, by a clock of its own that stands still while it waits.

Each rank measures alone: what it notes here costs two readings of the clock per collective and
sends nothing. ``ranks/lateness.py`` compares what the ranks have noted, when somebody asks.

On an accelerator the host does not wait, and runs ahead of what it measures. There the seconds of a
collective, from events that have passed, stand for those in which the device waits: they hold the
transfer too, which is alike for all ranks of a group, and the one that comes last has the fewest.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass

from mics.communication.sockets import Sockets
from mics.ranks.device import on_accelerator
from mics.ranks.mesh import Groups, PerMesh
from mics.ranks.times import STEPS, WHERE, RankTimes
from mics.ranks.waiting import own_clock


@dataclass(frozen=True)
class _Step:
    """One step: all of it, its own time, and both by where the rank was to come; in seconds."""

    seconds: float
    own: float
    reached: tuple[float, float, float]
    waited: tuple[float, float, float]


class Pace:
    """The most recent steps of one mesh on this rank.

    Args:
        on_host: whether this rank's host waits for its collectives.
    """

    def __init__(self, *, on_host: bool) -> None:
        self._on_host = on_host
        self._steps: deque[_Step] = deque(maxlen=STEPS)
        self._began: tuple[float, float] | None = None
        self._at: dict[int, float] = {}  # the clock of its own, as the first of a hop was issued
        self._waited = {1: 0.0, 2: 0.0}
        # Of each kind of collective on an accelerator how many, and the seconds of the fastest.
        self._kinds: dict[tuple[int, object], tuple[int, float]] = {}
        self._steps_of_kinds = 0
        self._sockets = Sockets()
        self.spent = 0.0
        """Seconds of the processor that this object has taken in all."""

    def reached(self, hop: int) -> None:
        """Note that a collective of a hop is issued."""
        hop = max(hop, 1)
        if hop not in self._at:
            self._at[hop] = own_clock()

    def took(self, hop: int, seconds: float, kind: object) -> None:
        """Note how long the rank waited in a collective of a hop.

        Args:
            hop: whose it is.
            seconds: on an accelerator all that it took.
            kind: of collectives that are alike.
        """
        hop = max(hop, 1)
        self._waited[hop] += seconds
        if not self._on_host:
            calls, fastest = self._kinds.get((hop, kind), (0, math.inf))
            self._kinds[hop, kind] = calls + 1, min(fastest, seconds)

    def end_step(self) -> None:
        """A step has ended on all ranks."""
        before, now, own = time.thread_time(), time.monotonic(), own_clock()
        if self._began is None:
            self._sockets.sent()  # what was sent until now is no part of a step
        else:
            self._steps.append(self._step(now - self._began[0], self._began[1], own))
        self._steps_of_kinds += 1
        self._began = now, own
        self._at.clear()
        self._waited = {1: 0.0, 2: 0.0}
        self.spent += time.thread_time() - before

    def _step(self, seconds: float, began: float, ended: float) -> _Step:
        hop_1, hop_2 = self._waited[1], self._waited[2]
        if not self._on_host:
            nothing = (math.nan, math.nan, math.nan)
            return _Step(seconds, seconds - hop_1 - hop_2, nothing, (hop_1, hop_2, 0.0))
        own, reached, before = ended - began, [0.0, 0.0], began
        for hop in sorted(self._at):  # a hop that there is not is not waited at
            reached[hop - 1] = max(self._at[hop] - before, 0.0)
            before = max(self._at[hop], before)
        return _Step(
            seconds,
            own,
            (reached[0], reached[1], ended - before),
            (hop_1, hop_2, max(seconds - own - hop_1 - hop_2, 0.0)),
        )

    def times(self) -> RankTimes:
        """The steps so far, and what was sent since the last call."""
        before = time.thread_time()
        steps = list(self._steps)
        times = RankTimes(
            own=tuple(one.own for one in steps),
            step=_median([one.seconds for one in steps]),
            reached=tuple(_median([one.reached[i] for one in steps]) for i in range(len(WHERE))),
            waited=tuple(_median([one.waited[i] for one in steps]) for i in range(len(WHERE))),
            sent=tuple(self._sockets.sent()),
            fastest=(self._fastest(1), self._fastest(2)),
        )
        self._kinds.clear()
        self._steps_of_kinds = 0
        self.spent += time.thread_time() - before
        return times

    def _fastest(self, hop: int) -> float:
        """Seconds of a step's collectives of a hop, each as fast as the fastest of its kind."""
        kinds = [number for (of, _), number in self._kinds.items() if of == hop]
        return sum(calls * fastest for calls, fastest in kinds) / max(self._steps_of_kinds, 1)


def _pace(groups: Groups) -> Pace:
    return Pace(on_host=not on_accelerator(groups.device))


pace_of = PerMesh(_pace)
"""The pace of this rank on a mesh."""


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan
