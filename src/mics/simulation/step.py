"""One step of one rank, event by event.

Four streams run beside each other: computation, gathers, reductions and hop 2. A stage of a
collective occupies its link, inside the node or between nodes; a link serves who is ready first.
Computation waits for a block's gather, for room for one more reduction, and at the end for all.
Every rank of a step does the same, so one stands for all; see ``straggling`` for what that leaves
out.

Order decides a fifth of the time: a block's start issues the next gather before its end issues its
reduction (FSDP2's order; the other way round a gather waits behind a reduction that waits for the
block).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import NormalDist
from typing import Literal

from mics.hardware.network import On, Stage

Hop = Literal[0, 1, 2]
Sync = Literal["last", "every", "never"]


@dataclass(frozen=True)
class Work:
    """What one unit needs, seconds.

    Args:
        forward: computation.
        backward: computation, recomputed forward included.
        gather: stages of its all-gather.
        reduce: stages of its reduce-scatter.
        sync: stages of its hop 2.
    """

    forward: float
    backward: float
    gather: tuple[Stage, ...] = ()
    reduce: tuple[Stage, ...] = ()
    sync: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """When things happen.

    Args:
        micro_steps: s.
        gathers: in forward, in backward.
        prefetch: blocks gathered ahead; 0 waits for each when it is needed.
        in_flight: reductions computation does not wait for; 0 waits for each.
        sync: on the last micro-step, on every one, or never; beside the backward pass, which ends
            when it has landed.
        pipelined: the next gather's first stage runs beside this one's second.
        host: seconds computation is held up by every message that is started.
        messages: of one unit's gather, and of its reduction.
        slows: where blocks communicate, all computation takes that much longer.
        last: seconds after everything, the optimizer step.
        gathered_at_end: stages of a gather of all parameters after the optimizer step.
    """

    micro_steps: int = 1
    gathers: tuple[bool, bool] = (True, True)
    prefetch: int = 1
    in_flight: int = 1
    sync: Sync = "last"
    pipelined: bool = False
    host: float = 0.0
    messages: int = 1
    slows: float = 0.0
    last: float = 0.0
    gathered_at_end: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class Span:
    """Something in a step's timeline, seconds."""

    stream: str
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Step:
    """What came out.

    Args:
        seconds: of the step, ``late`` included.
        compute: of it, computation (with what communication beside it costs).
        exposed: by hop, seconds that computation waited; hop 0 is the optimizer step and what
            follows it.
        total: by hop, seconds of communication.
        timeline: every span, if asked for.
        late: seconds of waiting for whoever is late, see ``straggling``.
    """

    seconds: float
    compute: float
    exposed: dict[Hop, float]
    total: dict[Hop, float]
    timeline: tuple[Span, ...] = field(default=(), repr=False)
    late: float = 0.0


def simulate(
    blocks: Sequence[Work],
    root: Work,
    schedule: Schedule,
    *,
    timeline: bool = False,
    kind: type[Rank] | None = None,
) -> Step:
    """Run one step.

    A micro-step ends when everything has landed, so all but the last are alike, and one of them is
    simulated, unless every span is wanted.

    Args:
        blocks: in the order of the model.
        root: what is outside of them; ``forward`` runs ahead of the first block, ``backward``
            between the last block's forward and its backward.
        schedule: the engine's.
        timeline: keep every span.
        kind: of rank; one with streams by default, see ``step_on_cpu.py``.
    """
    rank = (kind or Rank)(blocks, root, schedule, timeline)
    simulated = schedule.micro_steps if timeline else min(schedule.micro_steps, 2)
    for number in range(simulated):
        rank.micro_step(last=number == simulated - 1)
        if number == 0:
            first = (rank.now, rank.compute, rank.exposed[1], rank.exposed[2])
    rank.finish()
    more = schedule.micro_steps - simulated
    seconds, compute = rank.now + more * first[0], rank.compute + more * first[1]
    exposed = dict(rank.exposed)
    exposed[1] += more * first[2]
    exposed[2] += more * first[3]
    return Step(seconds, compute, exposed, _totals(blocks, root, schedule), tuple(rank.spans))


def _totals(blocks: Sequence[Work], root: Work, schedule: Schedule) -> dict[Hop, float]:
    s = schedule.micro_steps
    syncs = {"last": 1, "every": s, "never": 0}[schedule.sync]
    hop_1 = hop_2 = 0.0
    for work in [*blocks, root]:
        gathers = sum(schedule.gathers) if work is not root else schedule.gathers[0]
        hop_1 += s * gathers * _seconds(work.gather) + s * _seconds(work.reduce)
        hop_2 += syncs * _seconds(work.sync)
    return {0: schedule.last + _seconds(schedule.gathered_at_end), 1: hop_1, 2: hop_2}


def _seconds(stages: Sequence[Stage]) -> float:
    return sum(stage.seconds for stage in stages)


@cache
def _queue(stream: str, link: On) -> str:
    """The stream of one stage, where stages run beside each other."""
    return f"{stream} {link}"


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
    """A rank in the middle of its step."""

    def __init__(
        self, blocks: Sequence[Work], root: Work, schedule: Schedule, timeline: bool
    ) -> None:
        self.blocks, self._root, self.schedule = blocks, root, schedule
        self.now = self.compute = 0.0
        self.exposed: dict[Hop, float] = {0: 0.0, 1: 0.0, 2: 0.0}
        self.spans: list[Span] = []
        self._timeline = timeline
        self._queues: dict[str, deque[Message]] = {}
        self._stream_free: dict[str, float] = {}
        self._link_free: dict[On, float] = {"intra": 0.0, "inter": 0.0}
        self.gathers: dict[int, Message | None] = {}
        self._reductions: deque[Message] = deque()
        self.syncs: list[Message] = []
        communicates = any(w.gather or w.reduce for w in blocks)
        self._slower = 1.0 + (schedule.slows if communicates else 0.0)

    def micro_step(self, *, last: bool) -> None:
        """Forward and backward once."""
        blocks, schedule = self.blocks, self.schedule
        in_forward, in_backward = schedule.gathers
        syncs = schedule.sync == "every" or (schedule.sync == "last" and last)
        if in_forward:
            self.wait(self.gather(self._root, "root"), 1)
        self._run(self._root.forward, "root")
        for number, work in enumerate(blocks):
            self.begin(number, range(number + 1, len(blocks)), in_forward)
            self._run(work.forward, f"forward {number}")
            if in_backward:
                self.gathers.pop(number, None)
        if not in_backward:
            self.gathers.clear()
        self._run(self._root.backward, "loss")
        for number in range(len(blocks) - 1, -1, -1):
            self.begin(number, range(number - 1, -1, -1), in_backward)
            self._run(blocks[number].backward, f"backward {number}")
            self.gathers.pop(number, None)
            self.reduce(blocks[number], syncs, f"{number}")
        self.reduce(self._root, syncs, "root")
        self.drain()
        for message in self.syncs:
            self.wait(message, 2)
        self.syncs.clear()

    def drain(self) -> None:
        """Wait for every reduction, as FSDP2 does when the backward pass ends."""
        while self._reductions:
            self.wait(self._reductions.popleft(), 1)

    def finish(self) -> None:
        """Take the optimizer step, gather what is gathered after it."""
        schedule = self.schedule
        before = self.now
        self.now += schedule.last
        if schedule.gathered_at_end:
            message = self.send("hop 1", schedule.gathered_at_end, "all parameters")
            self.wait(message, 0)
        self.exposed[0] = self.now - before

    def begin(self, number: int, following: range, gathered: bool) -> None:
        """Wait for a block's gather, start those of the blocks that follow."""
        if not gathered:
            return
        if number not in self.gathers:
            self.gathers[number] = self.gather(self.blocks[number], str(number))
        self.wait(self.gathers[number], 1)
        for ahead in following[: self.schedule.prefetch]:
            if ahead not in self.gathers:
                self.gathers[ahead] = self.gather(self.blocks[ahead], str(ahead))

    def gather(self, work: Work, name: str) -> Message | None:
        """Start a unit's gather, if it has one."""
        return self.send("hop 1", work.gather, name) if work.gather else None

    def reduce(self, work: Work, syncs: bool, name: str) -> None:
        """Start a unit's reduction, and its hop 2 behind it."""
        schedule = self.schedule
        reduction = None
        if work.reduce:
            # Gathers and reductions use one communicator, one after the other.
            reduction = self.send("hop 1", work.reduce, f"reduce {name}")
            self._reductions.append(reduction)
            while len(self._reductions) > schedule.in_flight:
                self.wait(self._reductions.popleft(), 1)
        if syncs and work.sync:
            self.syncs.append(self.send("hop 2", work.sync, name, after=reduction))

    def send(
        self, stream: str, stages: Sequence[Stage], name: str, after: Message | None = None
    ) -> Message:
        """Queue a collective; its last stage is what one waits for."""
        schedule = self.schedule
        if schedule.host:
            held = schedule.host * schedule.messages
            self.now += held
            self.compute += held
        message = after
        queues = self._queues
        for stage in stages:
            queue = _queue(stream, stage.link) if schedule.pipelined else stream
            message = Message(queue, stage, self.now, message, name)
            waiting = queues.get(queue)
            if waiting is None:
                waiting = queues[queue] = deque()
                self._stream_free[queue] = 0.0
            waiting.append(message)
        assert message is not None
        return message

    def _run(self, seconds: float, name: str) -> None:
        seconds *= self._slower
        if self._timeline:
            self.spans.append(Span("compute", name, self.now, self.now + seconds))
        self.now += seconds
        self.compute += seconds

    def wait(self, message: Message | None, hop: Hop) -> None:
        """Let computation wait for a message."""
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


def straggling(sigma: float, group: int, replicas: int, alone: int) -> float:
    """How much longer a step takes because somebody is always late.

    A group that communicates in every block waits for its slowest all the time; replicas wait for
    each other at hop 2, and by then the micro-steps between two of them have averaged.

    Args:
        sigma: spread of a micro-step's time over GPUs, as a share of it.
        group: GPUs that wait for each other in every block.
        replicas: groups that wait for each other at hop 2.
        alone: micro-steps from one hop 2 to the next.
    """
    return 1 + sigma * (_latest(group) + _latest(replicas) / math.sqrt(alone))


def _latest(n: int) -> float:
    """Expected maximum of n normal numbers, in standard deviations (Blom, 1958)."""
    return 0.0 if n == 1 else NormalDist().inv_cdf((n - 0.375) / (n + 0.25))
