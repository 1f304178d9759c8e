"""Who comes last to which collective, and for whom the others wait.

[Note: who is waited for]
A rank that is late makes those of its partition group late too, and they come late to hop 2 without
a fault of their own. So lateness alone does not tell who is slow. A rank is waited for as long as
it comes after all others of a collective, but no longer than what it had more of time of its own
since the step began: time in which it was not held up by others. Nor longer than somebody's program
was held up, where that is known: collectives are under way beside computation, and beside others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WORTH_NAMING = 0.03  # of a step: less is not worth a word


@dataclass(frozen=True)
class Arrival:
    """When one rank came to one collective, in microseconds.

    Args:
        rank: who.
        at: by the first rank's clock.
        own: that the rank has had for itself in this step by then.
        exposed: that its program was held up in the collective; ``None`` where nobody can tell.
    """

    rank: int
    at: float
    own: float
    exposed: float | None


@dataclass(frozen=True)
class Straggler:
    """The rank that the others waited for in a step.

    Args:
        rank: who.
        hop: where most of the waiting was.
        waited: microseconds that the others of its groups were kept waiting, added up.
        last: by hop, in how many collectives the rank came last, and in how many it took part.
    """

    rank: int
    hop: int
    waited: float
    last: Mapping[int, tuple[int, int]]


Met = tuple[int, Sequence[Arrival]]
"""The hop of one collective, and all its ranks' arrivals."""


def waited_for(arrivals: Sequence[Arrival]) -> tuple[int, float]:
    """Who came last, and how long the others waited for it through its own fault."""
    *others, last = sorted(arrivals, key=lambda one: one.at)
    late = last.at - max(one.at for one in others)
    own = last.own - max(one.own for one in others)
    held = [one.exposed for one in others if one.exposed is not None]
    return last.rank, max(0.0, min(late, own, max(held, default=late)))


def straggler_of(
    met: Sequence[Met], errors: Mapping[int, float], seconds: float
) -> Straggler | None:
    """Name the rank that the others of a step waited for, if there is one.

    Args:
        met: collectives of the step, of two ranks and more.
        errors: of each rank's clock, in microseconds; what they explain is no lateness.
        seconds: microseconds that the step took.
    """
    waited: dict[int, dict[int, float]] = {}
    last: dict[int, dict[int, int]] = {}
    took_part: dict[int, dict[int, int]] = {}
    for hop, arrivals in met:
        rank, kept_waiting = waited_for(arrivals)
        bound = sum(sorted(errors.get(one.rank, 0.0) for one in arrivals)[-2:])
        for one in arrivals:
            counts = took_part.setdefault(one.rank, {})
            counts[hop] = counts.get(hop, 0) + 1
        counts = last.setdefault(rank, {})
        counts[hop] = counts.get(hop, 0) + 1
        if kept_waiting > bound:
            by_hop = waited.setdefault(rank, {})
            by_hop[hop] = by_hop.get(hop, 0.0) + kept_waiting
    if not waited:
        return None
    rank = max(waited, key=lambda one: sum(waited[one].values()))
    total = sum(waited[rank].values())
    if total < _WORTH_NAMING * seconds:
        return None
    hop = max(waited[rank], key=lambda one: waited[rank][one])
    shares = {
        one: (last.get(rank, {}).get(one, 0), count)
        for one, count in sorted(took_part[rank].items())
    }
    return Straggler(rank, hop, total, shares)
