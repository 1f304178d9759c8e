"""Which rank, or which link, do the others wait for? Judged from durations alone.

[Note: who is late]
Ranks that wait for each other all take as long for a step. What tells them apart is the time of
their own: a step's seconds less those in which the rank waited for others. The slow rank has most
of it and waits least. Two clocks are never compared, so nodes need not agree on the time.

A name needs a difference that is large, also beside the spread between ranks and between steps, and
there in three of four steps: a busy machine must not be taken for a slow one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mics.quantities import milliseconds
from mics.ranks.slow_links import SlowGroup, SlowLink, TcpAlone, megabits, slow_links
from mics.ranks.times import WHERE, Places, RankTimes, Where

_NEAR = 1.04  # of all ranks' median: less than _LATE of the others' is
_LATE = 1.12  # of the others' median, in time of its own, in three of four steps
_SPREADS = 4.5  # how many spreads the difference has
_OF_A_QUARTILE = 1.36  # deviation of a quartile of n numbers over theirs, times the root of n
_WORTH_NAMING = 0.03  # of a step: less is not worth a word
_FEWEST_STEPS = 5
_MOST_ROWS = 32


@dataclass(frozen=True)
class SlowRank:
    """A rank that the others wait for.

    Args:
        rank: in the job.
        node: it is on.
        where: the others wait for it.
        own: seconds of its own in a step that takes the others their median.
        others: the same, median of the other ranks.
    """

    rank: int
    node: int
    where: Where
    own: float
    others: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} (node {self.node}) is slow: {milliseconds(self.own)} of its own in "
            f"a step, {self.own / self.others - 1:+.0%} of the others' median, and late at "
            f"{self.where}"
        )


Named = SlowRank | SlowLink | SlowGroup | TcpAlone


@dataclass(frozen=True)
class Lateness:
    """Times of all ranks, rates of the links between nodes, and who is slow; print it for a table.

    Args:
        times: by rank.
        rates: bits per second from one node to another, by (from, to); of those with enough bytes.
        named: the slow ones, none if all is well.
        places: where the ranks are.
    """

    times: Mapping[int, RankTimes]
    rates: Mapping[tuple[int, int], float]
    named: tuple[Named, ...]
    places: Places

    @property
    def words(self) -> str:
        """Who is slow, in one line; empty if nobody is."""
        return "; ".join(map(str, self.named))

    def as_json(self) -> dict[str, object]:
        """The same numbers, to be written as JSON; seconds, bits per second."""
        return {
            "slow": [str(one) for one in self.named],
            "ranks": [
                {
                    "rank": rank,
                    "node": self.places.node_of(rank),
                    "own": _known(one.own_seconds),
                    "reached": dict(zip(WHERE, map(_known, one.reached), strict=True)),
                    "waited": dict(zip(WHERE, map(_known, one.waited), strict=True)),
                }
                for rank, one in self.times.items()
            ],
            "links": [
                {"from": a, "to": b, "bits_per_second": round(rate)}
                for (a, b), rate in sorted(self.rates.items())
            ],
        }

    def __str__(self) -> str:
        lines = [
            f"{'rank':>5} {'node':>5} {'own':>11}  {'to hop 1':>11} {'to hop 2':>11} "
            f"{'to the end':>11}  {'waits hop 1':>11} {'hop 2':>11} {'at the end':>11}"
        ]
        by_own = sorted(self.times, key=lambda rank: -self.times[rank].own_seconds)
        for rank in sorted(by_own[:_MOST_ROWS]):
            one = self.times[rank]
            cells = [_cell(value) for value in (*one.reached, *one.waited)]
            slow = any(isinstance(n, SlowRank) and n.rank == rank for n in self.named)
            lines.append(
                f"{rank:>5} {self.places.node_of(rank):>5} {_cell(one.own_seconds):>11}  "
                + " ".join(f"{cell:>11}" for cell in cells[:3])
                + "  "
                + " ".join(f"{cell:>11}" for cell in cells[3:])
                + ("  <- slow" if slow else "")
            )
        if len(by_own) > _MOST_ROWS:
            lines.append(f"      and {len(by_own) - _MOST_ROWS} ranks with less time of their own")
        slowest = sorted(self.rates.items(), key=lambda item: item[1])[:_MOST_ROWS]
        lines += [f"node {a} to node {b}  {megabits(rate)}" for (a, b), rate in sorted(slowest)]
        lines.append(self.words or "nobody is slow")
        return "\n".join(lines)


# -- who is slow -----------------------------------------------------------------------------------


def judge(times: Mapping[int, RankTimes], places: Places) -> Lateness:
    """Say who is slow, from what every rank has measured in the same steps.

    Args:
        times: by rank.
        places: where the ranks are.
    """
    rates, links = slow_links(times, places)
    named: list[Named] = [*_slow_ranks(times, places), *links]
    return Lateness(times, rates, tuple(named), places)


def _slow_ranks(times: Mapping[int, RankTimes], places: Places) -> list[SlowRank]:
    steps = min((len(one.own) for one in times.values()), default=0)
    if steps < _FEWEST_STEPS or len(times) < 2:
        return []
    # Steps that are long for all ranks say nothing of one: what counts is its share of them. What
    # else runs on a machine only ever adds time, so the lower quartiles are what is compared.
    own = {rank: one.own[-steps:] for rank, one in times.items()}
    common = [max(_lower_quartile(step), 1e-9) for step in zip(*own.values(), strict=True)]
    shares = {r: [a / b for a, b in zip(own[r], common, strict=True)] for r in own}
    levels = {rank: _lower_quartile(each) for rank, each in shares.items()}
    noise = statistics.median(map(_deviation, shares.values())) * _OF_A_QUARTILE / math.sqrt(steps)
    found = []
    middle = statistics.median(levels.values())
    for rank, mine in levels.items():
        if mine < _NEAR * middle:  # of a thousand ranks hardly one is looked at twice
            continue
        others = [level for other, level in levels.items() if other != rank]
        usual = statistics.median(others)
        seconds = statistics.median(times[other].own_seconds for other in times if other != rank)
        if (
            mine > _LATE * usual
            and mine - usual > _SPREADS * max(_deviation(others), noise)
            and (mine / usual - 1) * seconds > _WORTH_NAMING * times[rank].step
        ):
            where = _where(rank, times)
            found.append(
                SlowRank(rank, places.node_of(rank), where, seconds * mine / usual, seconds)
            )
    return found


def _where(rank: int, times: Mapping[int, RankTimes]) -> Where:
    """Where a rank comes late: behind the part that takes it longer than the others."""
    mine, others = times[rank], [one for other, one in times.items() if other != rank]
    if any(math.isnan(value) for value in mine.reached):
        gaps = [statistics.median(o.waited[i] for o in others) - mine.waited[i] for i in range(3)]
    else:
        gaps = [mine.reached[i] - statistics.median(o.reached[i] for o in others) for i in range(3)]
    return WHERE[gaps.index(max(gaps))]


# -- arithmetic ------------------------------------------------------------------------------------


def _lower_quartile(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 4]


def _deviation(values: Sequence[float]) -> float:
    """Like a standard deviation, but outliers do not move it."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def _cell(value: float) -> str:
    return milliseconds(None if math.isnan(value) else value)
