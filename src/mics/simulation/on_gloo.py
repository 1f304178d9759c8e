"""The order in which mics communicates on Gloo, where nothing runs ahead of the program.

Five things differ from a GPU (``gather_ahead.py``, ``landing.py``): in forward a block starts the
next gather before it waits for its own; a gather's second stage runs when somebody waits for it; a
reduction's second stage is issued when the next unit is reduced; inside a node the last
micro-step's reductions are waited for at once, since hop 2 follows; and of a hop 2 in two stages
what gathers inside nodes is issued at the end (``hop_order.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from mics.hardware.network import Stage
from mics.simulation.rank import Message, Rank
from mics.simulation.schedule import Schedule, UnitSeconds


@dataclass
class _Reduction:
    """A reduction under way: what it waits for, the stages to come, and hop 2 after it."""

    message: Message
    stages_to_come: Sequence[Stage]
    sync: tuple[Stage, ...]
    name: str


class OnGloo:
    """The gathers and reductions that are under way in one micro-step.

    Args:
        rank: whose clock they run on.
        blocks: seconds of every block.
        schedule: how far ahead is gathered.
    """

    def __init__(self, rank: Rank, blocks: Sequence[UnitSeconds], schedule: Schedule) -> None:
        self._rank, self._blocks, self._schedule = rank, blocks, schedule
        self._gathers: dict[int, Message | None] = {}
        self._reductions: deque[_Reduction] = deque()
        self._between_nodes: list[tuple[Message, Sequence[Stage], str]] = []

    def gather(self, unit: UnitSeconds, name: str) -> Message | None:
        """Start the first stage of a unit's gather, if it has one."""
        return self._rank.send("hop 1", unit.gather[:1], name) if unit.gather else None

    def begin(self, number: int, following: range) -> None:
        """Wait for a block's gather; in forward the next one is on its way by then."""
        in_forward = len(following) == 0 or following.step > 0
        ahead = following[: self._schedule.prefetch]
        self._start(number)
        if in_forward:
            for other in ahead:
                self._start(other)
        self._wait_for_gather(number)
        for other in ahead:
            self._start(other)

    def reshard(self, number: int) -> None:
        """Forget a block's parameters: it is gathered anew."""
        self._gathers.pop(number, None)

    def reduce(self, unit: UnitSeconds, name: str, *, syncs: bool) -> list[Message]:
        """Wait for the stage every reduction is in and issue their next; then start this one.

        Returns:
            every hop 2 that was started.
        """
        sync = unit.sync if syncs else ()
        if not unit.reduce:
            return [self._sync(sync, name)] if sync else []
        started = self._advance()
        first, *to_come = unit.reduce
        message = self._rank.send("hop 1, reductions", (first,), f"reduce {name}")
        self._reductions.append(_Reduction(message, to_come, sync, name))
        return started + (self.drain() if sync and not to_come else [])

    def drain(self) -> list[Message]:
        """Wait until no reduction is under way, and return every hop 2 that was started."""
        started = []
        while self._reductions:
            started += self._advance()
        return started

    def finish(self) -> list[Message]:
        """Gather inside nodes what every hop 2 has brought there, one after the other."""
        gathers = []
        for message, stages, name in self._between_nodes:
            self._rank.wait(message, 2)
            gathers.append(self._rank.send("hop 2", stages, name))
        return gathers

    def _start(self, number: int) -> None:
        if number not in self._gathers:
            self._gathers[number] = self.gather(self._blocks[number], str(number))

    def _wait_for_gather(self, number: int) -> None:
        self._rank.wait(self._gathers[number], 1)
        for stage in self._blocks[number].gather[1:]:
            second = self._rank.send("hop 1, second stage", (stage,), str(number))
            self._rank.wait(second, 1)

    def _advance(self) -> list[Message]:
        """Wait for the stage every reduction is in; issue its next, or its hop 2."""
        started = []
        for one in list(self._reductions):
            self._rank.wait(one.message, 1)
            if one.stages_to_come:
                stage, *one.stages_to_come = one.stages_to_come
                one.message = self._rank.send("hop 1, reductions", (stage,), f"reduce {one.name}")
                continue
            self._reductions.remove(one)
            if one.sync:
                started.append(self._sync(one.sync, one.name))
        return started

    def _sync(self, stages: tuple[Stage, ...], name: str) -> Message:
        """Start a hop 2, without what gathers inside nodes behind it."""
        message = self._rank.send("hop 2", stages[:2], name)
        if stages[2:]:
            self._between_nodes.append((message, stages[2:], name))
        return message
