"""Which rank holds up the others: found by comparing what all of them do.

A rank that computes, sleeps, is stopped or holds its interpreter's lock is in no collective, and
the others wait for it in one. Where all wait, one of them has left out a collective and has issued
fewer than the others, or waits in another one than most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mics.agent.pulse import Pulse

_TIMES_A_STEP = 5


@dataclass(frozen=True)
class Hang:
    """A rank that holds up the others.

    Args:
        culprit: the rank.
        seconds: that it has stood still.
        limit: seconds that it may.
    """

    culprit: Pulse
    seconds: float
    limit: float

    def __str__(self) -> str:
        who = self.culprit
        if who.ended:
            return (
                f"rank {who.rank} on node {who.node} has ended its program with exit code 0, and "
                f"the others have waited for it for {self.seconds:.0f} s"
            )
        return (
            f"rank {who.rank} on node {who.node} has stood still for {self.seconds:.0f} s "
            f"(limit {self.limit:.0f} s): {who.place}"
        )


def find_hang(pulses: Sequence[Pulse], least: float) -> Hang | None:
    """Find the rank that holds up the others, if one does.

    Args:
        pulses: of all ranks of the job.
        least: seconds that every rank may stand still, however short its steps are.
    """
    seen = [pulse for pulse in pulses if pulse.still is not None and not pulse.ended]
    if not seen or len(seen) < len([p for p in pulses if not p.ended]):
        return None  # a rank of which nothing is seen may be the one that works
    limit = max(least, _TIMES_A_STEP * max(pulse.slow_step for pulse in seen))
    culprit = _culprit(seen)
    if culprit.is_long or culprit.still is None or culprit.still <= limit:
        return None
    ended = [pulse for pulse in pulses if pulse.ended]
    if ended and all(pulse.waits for pulse in seen):
        return Hang(ended[0], min(pulse.still or 0.0 for pulse in seen), limit)
    if culprit.waits and any((pulse.still or 0.0) <= limit for pulse in seen):
        return None  # it waits, and somebody else still does something
    return Hang(culprit, culprit.still, limit)


def _culprit(seen: Sequence[Pulse]) -> Pulse:
    places = Counter(pulse.waits for pulse in seen)
    # Those that wait in no collective come first, then those that have issued the fewest.
    return min(
        seen,
        key=lambda p: (bool(p.waits), p.step, p.issued, places[p.waits], -(p.still or 0), p.rank),
    )
