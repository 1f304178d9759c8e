"""The order in which a GPU issues its communication, on streams beside computation.

Order decides a fifth of the time: a block's start issues the next gather before its end issues its
reduction (FSDP2's order; the other way round a gather waits behind a reduction that waits for the
block).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mics.simulation.rank import Message, Rank
from mics.simulation.schedule import Schedule, UnitSeconds


class OnStreams:
    """The gathers and reductions that are under way in one micro-step.

    Args:
        rank: whose clock they run on.
        blocks: seconds of every block.
        schedule: how far ahead is gathered, and how many reductions are not waited for.
    """

    def __init__(self, rank: Rank, blocks: Sequence[UnitSeconds], schedule: Schedule) -> None:
        self._rank, self._blocks, self._schedule = rank, blocks, schedule
        self._gathers: dict[int, Message | None] = {}
        self._reductions: deque[Message] = deque()

    def gather(self, unit: UnitSeconds, name: str) -> Message | None:
        """Start a unit's gather, if it has one."""
        return self._rank.send("hop 1", unit.gather, name) if unit.gather else None

    def begin(self, number: int, following: range) -> None:
        """Wait for a block's gather, then start those of the blocks that follow."""
        self._start(number)
        self._rank.wait(self._gathers[number], 1)
        for ahead in following[: self._schedule.prefetch]:
            self._start(ahead)

    def reshard(self, number: int) -> None:
        """Forget a block's parameters: it is gathered anew."""
        self._gathers.pop(number, None)

    def reduce(self, unit: UnitSeconds, name: str, *, syncs: bool) -> list[Message]:
        """Start a unit's reduction, and its hop 2 behind it, which is returned."""
        reduction = None
        if unit.reduce:
            # Gathers and reductions use one communicator, one after the other.
            reduction = self._rank.send("hop 1", unit.reduce, f"reduce {name}")
            self._reductions.append(reduction)
            while len(self._reductions) > self._schedule.in_flight:
                self._rank.wait(self._reductions.popleft(), 1)
        if syncs and unit.sync:
            return [self._rank.send("hop 2", unit.sync, name, after=reduction)]
        return []

    def drain(self) -> list[Message]:
        """Wait for every reduction, as FSDP2 does when the backward pass ends."""
        while self._reductions:
            self._rank.wait(self._reductions.popleft(), 1)
        return []

    def finish(self) -> list[Message]:
        """Issue what is left of every hop 2: nothing, as all of it is on a stream."""
        return []

    def _start(self, number: int) -> None:
        if number not in self._gathers:
            self._gathers[number] = self.gather(self._blocks[number], str(number))
