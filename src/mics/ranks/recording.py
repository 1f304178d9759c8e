"""What a rank writes down of its steps while somebody traces them.

Whoever communicates, waits or computes asks ``recorder`` for one that is there. Nobody traces as a
rule: then the answer is ``None``, and that look is all it costs.

Times are nanoseconds since 1970 by the clock of this host (``time.time_ns``), in which torch's
profiler writes too.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.profiler import record_function

from mics.traffic import Collective, StageMessage


@dataclass(slots=True)
class Flight:
    """One collective of a unit, from issue to end, and when the program waited for it.

    Args:
        name: what its range is called: hop 2 all-reduce layers.0.
        unit: the unit's name.
        hop: 0, 1 or 2.
        collective: its kind.
        message: what was sent, and among whom.
        begun: when this rank came to it.
        own: nanoseconds that this rank has had for itself since the step began.
        recorder: whose it is.
        ended: when it was over; ``None`` where nobody was told.
        waits: beginnings and ends of what held up the program.
    """

    name: str
    unit: str
    hop: int
    collective: Collective
    message: StageMessage
    begun: int
    own: int
    recorder: Recorder
    ended: int | None = None
    waits: list[tuple[int, int]] = field(default_factory=list)
    _range: Any = None
    _entered: int = 0

    def restart(self) -> None:
        """It begins here: a second stage is issued with the first but starts after it."""
        self.begun = time.time_ns()
        self.own = self.recorder.own(self.begun)

    def __enter__(self) -> None:
        """The program stands in it from now on."""
        self._range = record_function(self.name)
        self._range.__enter__()
        self._entered = time.time_ns()
        self.recorder.inside += 1

    def __exit__(self, *_: object) -> None:
        """The program goes on."""
        now = time.time_ns()
        self.recorder.inside -= 1
        self._range.__exit__(None, None, None)
        self.waits.append((self._entered, now))
        self.recorder.waited(self.hop, self._entered, now)

    def end(self) -> None:
        """It is over; what is said first counts."""
        if self.ended is None:
            self.ended = time.time_ns()


@dataclass(frozen=True)
class Block:
    """A unit's forward or backward on this rank, with what it waits for inside."""

    unit: str
    way: Literal["forward", "backward"]
    begun: int
    ended: int


class Recorder:
    """What one rank has written down since ``clear``.

    Args:
        before_forward: called when a forward of a unit begins that needs gradients, before it
            gathers anything.
        names: of units, by the ledger that counts for them; others are not recorded.
    """

    def __init__(
        self, before_forward: Callable[[], None], names: Callable[[], Mapping[object, str]]
    ) -> None:
        self._before_forward, self._find_names = before_forward, names
        self._names: Mapping[object, str] = {}
        self._thread = threading.get_ident()
        self._on = False
        self.inside = 0  # collectives that the program stands in
        self.clear(0)

    def switch(self, on: bool) -> None:
        """Write down from now on, or no more."""
        self._on = on
        self._names = self._find_names() if on else {}

    def clear(self, now: int) -> None:
        """Forget what was written down so far: a step begins that is the first of interest."""
        self.flights: list[Flight] = []
        self.blocks: list[Block] = []
        self.waits: list[tuple[int | None, int, int]] = []
        """What held up the program: the hop, ``None`` for what is none; beginning and end."""
        self._forwards: dict[object, int] = {}
        self._backwards: dict[object, list[int]] = {}
        self.begin_step(now)

    def begin_step(self, now: int) -> None:
        """A step begins."""
        self._begun, self._waited = now, 0

    def own(self, now: int) -> int:
        """Nanoseconds since the step began in which the program was not held up."""
        return now - self._begun - self._waited

    # -- collectives and waits ---------------------------------------------------------------------

    def issue(
        self, owner: object, hop: int, collective: Collective, message: StageMessage
    ) -> Flight | None:
        """A collective is issued; ``None`` if it is not written down."""
        unit = self._names.get(owner)
        if unit is None:
            return None
        if collective == "reduce_scatter":
            self._end_open_backward(owner)
        stage = "" if message.stage == "flat" else f" {message.stage}"
        name = f"hop {hop} {collective.replace('_', '-')}{stage} {unit}"
        now = time.time_ns()
        flight = Flight(name, unit, hop, collective, message, now, self.own(now), self)
        self.flights.append(flight)
        return flight

    @contextlib.contextmanager
    def waiting(self, what: object) -> Iterator[None]:
        """The program waits for other ranks in what is no unit's.

        Args:
            what: it waits for, in words.
        """
        if not self._on or self.inside or threading.get_ident() != self._thread:
            yield
            return
        with record_function(f"waits for {what}"):
            begun = time.time_ns()
            try:
                yield
            finally:
                self.waited(None, begun, time.time_ns())

    def waited(self, hop: int | None, begun: int, ended: int) -> None:
        """The program was held up."""
        self.waits.append((hop, begun, ended))
        self._waited += ended - begun

    # -- blocks ------------------------------------------------------------------------------------

    def arrive(self, owner: object) -> None:
        """A forward of a unit begins; nothing of it has been gathered."""
        if torch.is_grad_enabled():
            self._before_forward()
        if owner in self._names:
            self._forwards[owner] = time.time_ns()

    def leave(self, owner: object) -> None:
        """The forward of a unit has ended."""
        begun = self._forwards.pop(owner, None)
        if begun is not None:
            self.blocks.append(Block(self._names[owner], "forward", begun, time.time_ns()))

    def begin_backward(self, owner: object) -> None:
        """A gradient of what the unit returned has come."""
        open_one = self._backwards.get(owner)
        if owner not in self._names or (open_one is not None and len(open_one) == 1):
            return
        self._close_backward(owner)
        self._backwards[owner] = [time.time_ns()]

    def end_backward(self, owner: object) -> None:
        """A gradient of what the unit was given has come; the last one counts."""
        if owner in self._backwards:
            self._backwards[owner][1:] = [time.time_ns()]

    def _end_open_backward(self, owner: object) -> None:
        """Where nothing that it was given needs a gradient, it ends when it is reduced."""
        if len(self._backwards.get(owner, ())) == 1:
            self.end_backward(owner)

    def _close_backward(self, owner: object) -> None:
        times: Sequence[int] = self._backwards.pop(owner, ())
        if len(times) == 2:
            self.blocks.append(Block(self._names[owner], "backward", times[0], times[1]))

    def close_backwards(self) -> None:
        """No backward is under way any more."""
        for owner in list(self._backwards):
            self._close_backward(owner)


_recorder: Recorder | None = None


def recorder() -> Recorder | None:
    """The recorder of this process, if somebody traces it."""
    return _recorder


def record_by(one: Recorder | None) -> None:
    """Let everybody write down what they do in ``one``; ``None`` ends that."""
    global _recorder
    _recorder = one
