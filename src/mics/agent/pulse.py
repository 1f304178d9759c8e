"""What the ranks of a node do, as their agent sees it and tells the other agents."""

from __future__ import annotations

import math
import mmap
import os
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mics.ranks.heartbeat import FILE_BYTES, LONG, PAUSE, Beat, ask_for_pause, read_beat

_STEPS_KEPT = 200  # of which the 99th percentile is taken
_MOST_WORDS = 160


@dataclass(frozen=True)
class Pulse:
    """What one rank does.

    Args:
        rank: of the job.
        node: that it is on.
        step: the one it is in, from 1; 0 before the first, or if it tells nobody.
        micro_step: from 1.
        issued: collectives.
        during: the call of mics it is in, or nothing.
        waits: the collective it waits in, or nothing.
        still: seconds since it has done anything that can be seen; ``None`` if nothing ever was.
        is_long: whether it may stay where it is for any time.
        slow_step: seconds, the 99th percentile of its latest steps; 0 if it has made none.
        ended: whether its program has ended, with exit code 0.
        partition: ranks that hold one copy of the model together; 0 if it has not said it.
    """

    rank: int
    node: int
    step: int = 0
    micro_step: int = 0
    issued: int = 0
    during: str = ""
    waits: str = ""
    still: float | None = None
    is_long: bool = True
    slow_step: float = 0.0
    ended: bool = False
    partition: int = 0

    def as_json(self) -> dict[str, Any]:
        """The same for other agents."""
        return asdict(self)

    @property
    def pauses(self) -> bool:
        """Whether it stands between two steps because its agent has asked for that."""
        return self.during == PAUSE

    @property
    def tells(self) -> bool:
        """Whether it says where it is: in a micro-step, or in a call that takes long."""
        return self.micro_step > 0 or self.during in LONG

    @property
    def place(self) -> str:
        """Where the rank is, for people."""
        parts = []
        if self.step:
            micro = f"micro-step {self.micro_step} of " if self.micro_step else ""
            parts.append(f"{micro}step {self.step}")
        if self.during:
            parts.append(f"in {self.during}")
        if self.waits:
            parts.append(f"waiting in {self.waits}")
        elif self.issued:
            parts.append(f"in no collective, after {self.issued} of them")
        return ", ".join(parts) or "before its first step"


def pulse_from(fields: Any) -> Pulse:
    """Read what another agent has told.

    Raises:
        TypeError: it is no pulse.
    """
    return Pulse(**fields)


class Wrist:
    """Where a rank's pulse is felt: its file, and what it did before.

    Args:
        path: of the file.
        rank: of the job.
        node: that it is on.
    """

    def __init__(self, path: Path, rank: int, node: int) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._file = mmap.mmap(descriptor, FILE_BYTES)
        finally:
            os.close(descriptor)
        self._rank, self._node = rank, node
        self._last: Beat | None = None
        self._changed = time.monotonic()
        self._steps: deque[float] = deque(maxlen=_STEPS_KEPT)

    def feel(self, *, ended: bool = False) -> Pulse:
        """Look at the file."""
        beat, now = read_beat(self._file), time.monotonic()
        if self._last is None or beat.sign_of_life != self._last.sign_of_life:
            self._changed = now
            self._count_step(beat)
            self._last = beat
        if not (beat.beats or beat.issued or beat.waits):
            return Pulse(self._rank, self._node, ended=ended)
        return Pulse(
            self._rank,
            self._node,
            beat.step,
            beat.micro_step,
            beat.issued,
            beat.during[:_MOST_WORDS],
            beat.waits[:_MOST_WORDS],
            now - self._changed,
            beat.is_long,
            self._slow_step(),
            ended,
            beat.partition,
        )

    def ask_for_pause(self, *, wanted: bool) -> None:
        """Let the rank begin no other step, or go on."""
        ask_for_pause(self._file, wanted=wanted)

    def forgive(self) -> None:
        """Begin to count anew: this process itself was held up."""
        self._changed = time.monotonic()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _count_step(self, beat: Beat) -> None:
        last = self._last
        if last is None or last.steps < 1 or beat.steps <= last.steps:
            return
        seconds = (beat.step_began - last.step_began) / (beat.steps - last.steps)
        if 0 < seconds < math.inf:
            self._steps.append(seconds)

    def _slow_step(self) -> float:
        if not self._steps:
            return 0.0
        ordered = sorted(self._steps)
        return ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
