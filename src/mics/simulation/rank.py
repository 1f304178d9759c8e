"""A rank in the middle of its step: its clock, its links, and the queues of its streams.

A stage of a collective occupies its link, inside the node or between nodes; a link serves who is
ready first. What is issued and waited for, and when, the orders say (``on_streams.py`` for GPUs,
``on_gloo.py`` for CPUs).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from mics.hardware.network import On, Stage

Hop = Literal[0, 1, 2, 3]
"""What computation waits for; ``Step`` says what 0 and 3 are."""


@dataclass(frozen=True)
class Span:
    """Something in a step's timeline, seconds."""

    stream: str
    name: str
    start: float
    end: float


class Message:
    """One stage of a collective."""

    __slots__ = ("after", "end", "link", "name", "ready", "seconds", "stream")

    def __init__(
        self, stream: str, stage: Stage, ready: float, after: Message | None, name: str
    ) -> None:
        self.stream, self.link, self.seconds = stream, stage.link, stage.seconds
        self.ready, self.after, self.name = ready, after, name
        self.end = -1.0  # not yet known


class Rank:
    """A rank's clock, seconds, and what runs beside its computation.

    Args:
        slower: all computation takes so many times as long.
        held: seconds computation is held up by every collective that is started.
        pipelined: stages of one stream run beside each other, each in a queue of its link.
        timeline: keep every span.
    """

    def __init__(self, *, slower: float, held: float, pipelined: bool, timeline: bool) -> None:
        self.now = self.computed = 0.0
        self.exposed: dict[Hop, float] = {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}
        self.spans: list[Span] = []
        self._slower, self._held, self._pipelined = slower, held, pipelined
        self._timeline = timeline
        self._queues: dict[str, deque[Message]] = {}
        self._stream_free: dict[str, float] = {}
        self._link_free: dict[On, float] = dict.fromkeys(get_args(On), 0.0)

    def compute(self, seconds: float, name: str) -> None:
        """Compute for so long."""
        seconds *= self._slower
        if self._timeline:
            self.spans.append(Span("compute", name, self.now, self.now + seconds))
        self.now += seconds
        self.computed += seconds

    def send(
        self, stream: str, stages: Sequence[Stage], name: str, after: Message | None = None
    ) -> Message:
        """Queue a collective; its last stage is what one waits for."""
        if self._held:
            self.now += self._held
            self.computed += self._held
        message = after
        queues = self._queues
        for stage in stages:
            queue = _queue(stream, stage.link) if self._pipelined else stream
            message = Message(queue, stage, self.now, message, name)
            waiting = queues.get(queue)
            if waiting is None:
                waiting = queues[queue] = deque()
                self._stream_free[queue] = 0.0
            waiting.append(message)
        assert message is not None
        return message

    def wait(self, message: Message | None, hop: Hop) -> None:
        """Let computation wait for a message; ``None`` is one that was never sent."""
        if message is None:
            return
        while message.end < 0:
            self._serve()
        if message.end > self.now:
            self.exposed[hop] += message.end - self.now
            self.now = message.end

    def _serve(self) -> None:
        """Let the message run that can start first; nobody issues anything meanwhile."""
        best, soonest = None, math.inf
        for queue, waiting in self._queues.items():
            if not waiting:
                continue
            head = waiting[0]
            start, free, after = head.ready, self._link_free[head.link], head.after
            if after is not None:
                if after.end < 0:
                    continue
                if after.end > start:
                    start = after.end
            if free > start:
                start = free
            free = self._stream_free[queue]
            if free > start:
                start = free
            if start < soonest:
                best, soonest = head, start
        assert best is not None
        best.end = soonest + best.seconds
        self._stream_free[best.stream] = self._link_free[best.link] = best.end
        self._queues[best.stream].popleft()
        if self._timeline:
            self.spans.append(Span(best.stream, best.name, soonest, best.end))


@cache
def _queue(stream: str, link: On) -> str:
    """Name the queue of one stage, where stages run beside each other."""
    return f"{stream} {link}"
