"""How far the clocks of ranks are apart, measured by collectives that all of them take part in.

No rank leaves an all-gather before every rank has come to it. So a clock that says when its rank
left is behind another one's word of when that came by no more than they are apart: each such pair
bounds the offset, one from above, one from below. The tightest of several all-gathers count. Clocks
drift, so they are compared before and after what is traced, and what changed between is part of the
error.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mics.ranks.issuing import all_gather
from mics.ranks.together import gather_json

_ROUNDS = 24

Visit = tuple[int, int]
"""When a rank came to an all-gather and when it left, by its own clock; nanoseconds."""


@dataclass(frozen=True)
class Offset:
    """How far a rank's clock is ahead of the first rank's, in nanoseconds.

    Args:
        ahead: what is to be taken off its times.
        error: that this may be wrong by at most.
    """

    ahead: int
    error: int


EXACT = Offset(0, 0)
"""A rank's own clock."""


def compare_clocks(group: dist.ProcessGroup | None) -> list[Offset]:
    """Compare the clock of every rank of a Gloo group with the first one's. Collective.

    Returns:
        In the group's order, the same on every rank; one for a process alone.

    Raises:
        RankError: a rank does not come.
    """
    if group is None:
        return [EXACT]
    mine = torch.zeros(1)
    all_of_them = torch.zeros(group.size())
    visits: list[Visit] = []
    for _ in range(_ROUNDS):
        came = time.time_ns()
        all_gather(all_of_them, mine, group, name="comparison of clocks")
        visits.append((came, time.time_ns()))
    first, *others = gather_json(visits, group)
    return [EXACT, *(offset_of(first, one) for one in others)]


def offset_of(first: Sequence[Visit], other: Sequence[Visit]) -> Offset:
    """What the same all-gathers tell of two clocks.

    Args:
        first: the first rank's visits.
        other: those of the rank whose offset is asked for.
    """
    pairs = list(zip(first, other, strict=True))
    least = max(came - left for (_, left), (came, _) in pairs)
    most = min(left - came for (came, _), (_, left) in pairs)
    return Offset((least + most) // 2, (most - least + 1) // 2)


def between(before: Offset, after: Offset) -> Offset:
    """The offset of the time between two comparisons.

    One that the error explains is none: ranks of one host have one clock.
    """
    error = max(before.error, after.error) + (abs(after.ahead - before.ahead) + 1) // 2
    ahead = (before.ahead + after.ahead) // 2
    return Offset(0 if abs(ahead) <= error else ahead, error)
