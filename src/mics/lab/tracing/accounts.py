"""Where the time of a step went on one rank: intervals in, nanoseconds out. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Interval = tuple[int, int]
"""Beginning and end, in nanoseconds."""

HOPS = (0, 1, 2)


@dataclass(frozen=True)
class Hop:
    """What one hop took of a step.

    Args:
        total: in which at least one of its collectives was under way.
        exposed: of that, in which the step waited for it; ``None`` where nobody can tell.
    """

    total: int = 0
    exposed: int | None = 0


@dataclass(frozen=True)
class Account:
    """One step of one rank, in nanoseconds.

    Args:
        step: its number, from 1.
        begun: when it began.
        ended: when the next one did.
        compute: in which the rank worked for itself; ``None`` where nobody can tell.
        hops: those that it has.
        others: in which it waited for other ranks in what belongs to no unit.
    """

    step: int
    begun: int
    ended: int
    compute: int | None
    hops: dict[int, Hop] = field(default_factory=dict)
    others: int | None = 0


def account_of_host(
    step: int,
    span: Interval,
    flights: Iterable[tuple[int, Interval]],
    waits: Iterable[tuple[int | None, Interval]],
) -> Account:
    """Account for a step whose program is held up while it waits.

    Args:
        step: its number.
        span: of the step.
        flights: the hop of every collective, and when it was under way.
        waits: the hop, ``None`` of what is none, and when the program was held up; they do not
            overlap, as there is one program.
    """
    under_way: dict[int, list[Interval]] = {}
    for hop, interval in flights:
        under_way.setdefault(hop, []).append(interval)
    held: dict[int | None, int] = {}
    for hop_or_none, interval in waits:
        held[hop_or_none] = held.get(hop_or_none, 0) + measure([interval], span)
    hops = {
        hop: Hop(measure(under_way[hop], span), held.get(hop, 0))
        for hop in HOPS
        if hop in under_way
    }
    compute = span[1] - span[0] - sum(held.values())
    return Account(step, *span, compute, hops, held.get(None, 0))


def account_of_device(
    step: int,
    span: Interval,
    flights: Sequence[tuple[int, Interval]],
    others: Sequence[Interval],
) -> Account:
    """Account for a step of a device, whose work runs beside each other on streams.

    Args:
        step: its number.
        span: of the step.
        flights: the hop of every kernel that communicates for a unit, and when it ran.
        others: when other kernels and copies ran.
    """
    computing = measure(others, span)
    hops = {}
    for hop in HOPS:
        own = [interval for of, interval in flights if of == hop]
        total = measure(own, span)
        if total:
            hops[hop] = Hop(total, measure([*own, *others], span) - computing)
    return Account(step, *span, computing, hops, None)


def measure(intervals: Iterable[Interval], span: Interval) -> int:
    """Nanoseconds of a span that are in at least one interval."""
    total, at = 0, span[0]
    for begun, ended in sorted(intervals):
        begun, ended = max(begun, at), min(ended, span[1])
        if ended > begun:
            total += ended - begun
            at = ended
    return total
