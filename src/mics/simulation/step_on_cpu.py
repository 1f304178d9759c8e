"""A rank of mics on Gloo, where nothing runs ahead of the program.

Four things differ from a GPU (`gather_ahead.py`, `landing.py`): in forward a block starts the
next gather before it waits for its own; a gather's second stage runs when somebody waits for it; a
reduction's second stage is issued when the next unit is reduced; and inside a node the last
micro-step's reductions are waited for at once, since hop 2 follows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from mics.hardware.network import Stage
from mics.simulation.step import Message, Rank, Schedule, Work


@dataclass
class _Reduction:
    """One that is under way: what it waits for, the stages to come, hop 2 after it."""

    message: Message
    left: Sequence[Stage]
    sync: tuple[Stage, ...]
    name: str


class CpuRank(Rank):
    """A rank in the middle of its step, on Gloo."""

    def __init__(
        self, blocks: Sequence[Work], root: Work, schedule: Schedule, timeline: bool
    ) -> None:
        super().__init__(blocks, root, schedule, timeline)
        self._under_way: deque[_Reduction] = deque()

    def begin(self, number: int, following: range, gathered: bool) -> None:
        """Wait for a block's gather; in forward the next one is on its way by then."""
        if not gathered:
            return
        in_forward = len(following) == 0 or following.step > 0
        ahead = following[: self.schedule.prefetch]
        self._start(number)
        if in_forward:
            for other in ahead:
                self._start(other)
        self._wait_gather(number)
        for other in ahead:
            self._start(other)

    def gather(self, work: Work, name: str) -> Message | None:
        """Start a gather's first stage."""
        return self.send("hop 1", work.gather[:1], name) if work.gather else None

    def reduce(self, work: Work, syncs: bool, name: str) -> None:
        """Wait for the stage every reduction is in, issue their next; then start this one."""
        if not work.reduce:
            if syncs and work.sync:
                self.syncs.append(self.send("hop 2", work.sync, name))
            return
        self._advance()
        first, *left = work.reduce
        message = self.send("hop 1, reductions", (first,), f"reduce {name}")
        one = _Reduction(message, left, work.sync if syncs else (), name)
        self._under_way.append(one)
        if one.sync and not left:
            self.drain()

    def drain(self) -> None:
        """Wait until none is under way."""
        while self._under_way:
            self._advance()

    def _start(self, number: int) -> None:
        if number not in self.gathers:
            self.gathers[number] = self.gather(self.blocks[number], str(number))

    def _wait_gather(self, number: int) -> None:
        message = self.gathers[number]
        self.wait(message, 1)
        for stage in self.blocks[number].gather[1:]:
            self.wait(self.send("hop 1, second stage", (stage,), str(number)), 1)

    def _advance(self) -> None:
        for one in list(self._under_way):
            self.wait(one.message, 1)
            if one.left:
                stage, *one.left = one.left
                one.message = self.send("hop 1, reductions", (stage,), f"reduce {one.name}")
            else:
                self._under_way.remove(one)
                if one.sync:
                    self.syncs.append(self.send("hop 2", one.sync, one.name))
