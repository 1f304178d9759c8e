"""One step of one rank, event by event.

Computation, gathers, reductions and hop 2 run beside each other. Computation waits for a block's
gather, for room for one more reduction, and at the end for all. Every rank of a step does the same,
so one stands for all; see ``straggling`` for what that leaves out. ``on_streams.py`` and
``on_gloo.py`` have the order in which a GPU and a CPU issue what they send; ``rank.py`` serves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

from mics.hardware.network import Stage
from mics.simulation.on_gloo import OnGloo
from mics.simulation.on_host import OnHost
from mics.simulation.on_streams import OnStreams
from mics.simulation.rank import Hop, Rank, Span
from mics.simulation.schedule import Schedule, UnitSeconds


@dataclass(frozen=True)
class Step:
    """What a step took, seconds.

    Args:
        seconds: of the step, ``late`` included.
        compute: of it, computation (with what communication beside it costs).
        exposed: by hop, how long computation waited; hop 0 is the optimizer step and what follows
            it, hop 3 the copies of activations to and from the host.
        total: by hop, how long communication ran.
        timeline: every span, if asked for.
        late: waiting for whoever is late, see ``straggling``.
    """

    seconds: float
    compute: float
    exposed: dict[Hop, float]
    total: dict[Hop, float]
    timeline: tuple[Span, ...] = field(default=(), repr=False)
    late: float = 0.0

    def __str__(self) -> str:
        parts = {
            "computation": self.compute,
            "waiting for hop 1": self.exposed[1],
            "waiting for hop 2": self.exposed[2],
            "optimizer step": self.exposed[0],
            "waiting for the latest GPU": self.late,
        }
        if self.total.get(3):
            parts["waiting for the host"] = self.exposed[3]
        lines = [f"a step of {self.seconds:.4g} s"]
        lines += [
            f"  {name:<28}{value:>10.4g} s{value / self.seconds:>8.1%}"
            for name, value in parts.items()
        ]
        return "\n".join(lines)


def simulate(
    blocks: Sequence[UnitSeconds],
    root: UnitSeconds,
    schedule: Schedule,
    *,
    timeline: bool = False,
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
    """
    communicates = any(unit.gather or unit.reduce for unit in blocks)
    rank = Rank(
        slower=1.0 + (schedule.slows if communicates else 0.0),
        held=schedule.host * schedule.messages,
        pipelined=schedule.pipelined,
        timeline=timeline,
    )
    simulated = schedule.micro_steps if timeline else min(schedule.micro_steps, 2)
    for number in range(simulated):
        _micro_step(rank, blocks, root, schedule, last=number == simulated - 1)
        if number == 0:
            first = (rank.now, rank.computed, *(rank.exposed[hop] for hop in _IN_EVERY))
    _finish(rank, schedule)
    more = schedule.micro_steps - simulated
    seconds, compute = rank.now + more * first[0], rank.computed + more * first[1]
    exposed = dict(rank.exposed)
    for hop, waited in zip(_IN_EVERY, first[2:], strict=True):
        exposed[hop] += more * waited
    return Step(seconds, compute, exposed, _totals(blocks, root, schedule), tuple(rank.spans))


def _micro_step(
    rank: Rank,
    blocks: Sequence[UnitSeconds],
    root: UnitSeconds,
    schedule: Schedule,
    *,
    last: bool,
) -> None:
    """Run forward and backward once."""
    order = OnGloo(rank, blocks, schedule) if schedule.gloo else OnStreams(rank, blocks, schedule)
    host = OnHost(rank, blocks)
    syncs = schedule.sync == "every" or (schedule.sync == "last" and last)
    if schedule.gathers:
        rank.wait(order.gather(root, "root"), 1)
    rank.compute(root.forward, "root")
    for number, unit in enumerate(blocks):
        if schedule.gathers:
            order.begin(number, range(number + 1, len(blocks)))
        rank.compute(unit.forward, f"forward {number}")
        host.end_forward(number)
        order.reshard(number)
    rank.compute(root.backward, "loss")
    started = []
    for number in range(len(blocks) - 1, -1, -1):
        if schedule.gathers:
            order.begin(number, range(number - 1, -1, -1))
        host.begin_backward(number)
        rank.compute(blocks[number].backward, f"backward {number}")
        order.reshard(number)
        started += order.reduce(blocks[number], f"{number}", syncs=syncs)
    started += order.reduce(root, "root", syncs=syncs)
    started += order.drain()
    started += order.finish()
    for message in started:
        rank.wait(message, 2)


def _finish(rank: Rank, schedule: Schedule) -> None:
    """Take the optimizer step, and gather what is gathered after it."""
    before = rank.now
    rank.now += schedule.last
    if schedule.gathered_at_end:
        rank.wait(rank.send("hop 1", schedule.gathered_at_end, "all parameters"), 0)
    rank.exposed[0] = rank.now - before


def _totals(
    blocks: Sequence[UnitSeconds], root: UnitSeconds, schedule: Schedule
) -> dict[Hop, float]:
    """Add up how long communication runs, by hop."""
    s = schedule.micro_steps
    syncs = {"last": 1, "every": s, "never": 0}[schedule.sync]
    hop_1 = hop_2 = 0.0
    for unit in [*blocks, root]:
        gathers = schedule.gathers * (1 if unit is root else 2)
        hop_1 += s * gathers * _seconds(unit.gather) + s * _seconds(unit.reduce)
        hop_2 += syncs * _seconds(unit.sync)
    # Of the last block nothing is fetched.
    copies = s * sum(2 * unit.copy for unit in blocks) - s * blocks[-1].copy if blocks else 0.0
    at_end = schedule.last + _seconds(schedule.gathered_at_end)
    return {0: at_end, 1: hop_1, 2: hop_2, 3: copies}


_IN_EVERY: tuple[Hop, ...] = (1, 2, 3)
"""Hops of every micro-step."""


def _seconds(stages: Sequence[Stage]) -> float:
    return sum(stage.seconds for stage in stages)


def straggling(sigma: float, group: int, replicas: int, alone: int) -> float:
    """Work out how many times as long a step takes because somebody is always late.

    A group that communicates in every block waits for its slowest all the time. Replicas wait for
    each other at hop 2, and by then the micro-steps between two of them have averaged. What a group
    waits for inside of it is no lateness of its replica a second time: with one micro-step the
    latest of all replicas is the latest of all GPUs, however they are divided. So replicas add only
    what the latest of all GPUs has over the latest of one group, averaged.

    Args:
        sigma: spread of a micro-step's time over GPUs, as a share of it.
        group: GPUs that wait for each other in every block.
        replicas: groups that wait for each other at hop 2.
        alone: micro-steps from one hop 2 to the next.
    """
    within = _latest(group)
    return 1 + sigma * (within + (_latest(group * replicas) - within) / math.sqrt(alone))


def _latest(n: int) -> float:
    """Expect the maximum of n normal numbers, in standard deviations (Blom, 1958)."""
    return 0.0 if n == 1 else NormalDist().inv_cdf((n - 0.375) / (n + 0.25))
