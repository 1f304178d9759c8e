"""What a trace says in words and numbers, read from the events of its file."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mics.lab.tracing.accounts import HOPS
from mics.lab.tracing.clocks import Offset
from mics.lab.tracing.events import MICS, Json
from mics.lab.tracing.stragglers import Arrival, Met, Straggler, straggler_of
from mics.quantities import milliseconds
from mics.ranks.times import Places
from mics.version import __version__

_MOST_ROWS = 16  # of ranks in a step's table


@dataclass(frozen=True)
class Job:
    """What was traced.

    Args:
        file: that has the events.
        places: of the ranks.
        clocks: of every rank, beside the first one's.
        before: nanoseconds of a step before the recording; ``None`` if there was none to compare.
    """

    file: str
    places: Places
    clocks: Mapping[int, Offset]
    before: int | None

    def label(self, rank: int) -> str:
        """What people see of a rank."""
        replica = self.places.ranks.index(rank) // self.places.partition
        return f"rank {rank}, node {self.places.node_of(rank)}, replica {replica}"

    def head(self) -> Json:
        """What stands in the file beside its events."""
        clocks = {str(rank): asdict(one) for rank, one in self.clocks.items()}
        about = {"version": __version__, "clocks_ns": clocks, "step_before_ns": self.before}
        return {"displayTimeUnit": "ms", "mics": about}


@dataclass(frozen=True)
class RankStep:
    """One step of one rank, in microseconds; what is not known is ``None``.

    Args:
        rank: whose it is.
        step: its number.
        took: all of it.
        compute: of that, in which the rank worked for itself.
        total: by hop, in which a collective of it was under way.
        exposed: by hop, in which the step waited for it.
        others: in which it waited for other ranks elsewhere.
    """

    rank: int
    step: int
    took: float
    compute: float | None
    total: Mapping[int, float]
    exposed: Mapping[int, float | None]
    others: float | None


@dataclass(frozen=True)
class Summary:
    """What a trace says; print it for all of it in words.

    Args:
        steps: by step and rank.
        stragglers: by step, ``None`` where no rank was waited for.
        words: all of it.
    """

    steps: Sequence[RankStep]
    stragglers: Mapping[int, Straggler | None]
    words: str

    def __str__(self) -> str:
        return self.words

    def as_json(self) -> Json:
        """The same, to be sent or kept."""
        late = [[n, None if one is None else asdict(one)] for n, one in self.stragglers.items()]
        return {"steps": [asdict(one) for one in self.steps], "late": late, "words": self.words}

    @classmethod
    def from_json(cls, told: Json) -> Summary:
        """Read what ``as_json`` wrote."""
        return cls(
            [
                RankStep(
                    **{**one, "total": _by_hop(one["total"]), "exposed": _by_hop(one["exposed"])}
                )
                for one in told["steps"]
            ],
            {
                step: None
                if one is None
                else Straggler(
                    one["rank"],
                    one["hop"],
                    one["waited"],
                    {int(hop): tuple(pair) for hop, pair in one["last"].items()},
                )
                for step, one in told["late"]
            },
            told["words"],
        )


def _by_hop(told: Mapping[str, Any]) -> dict[int, Any]:
    return {int(hop): value for hop, value in told.items()}


def summarise(events: Iterable[Json], job: Job) -> Summary:
    """Say what a file's events of mics say, of all ranks.

    Args:
        events: of the file.
        job: what was traced.
    """
    own = [event for event in events if event.get("cat") == MICS]
    steps = sorted(
        (_rank_step(event) for event in own if "compute_us" in event["args"]),
        key=lambda one: (one.step, one.rank),
    )
    met = _met(own)
    errors = {rank: clock.error / 1e3 for rank, clock in job.clocks.items()}
    stragglers = {}
    for number in dict.fromkeys(one.step for one in steps):
        took = max(one.took for one in steps if one.step == number)
        stragglers[number] = straggler_of(met.get(number, []), errors, took)
    words = "\n".join(_words(steps, stragglers, job))
    return Summary(steps, stragglers, words)


def _rank_step(event: Json) -> RankStep:
    args = event["args"]
    hops = [hop for hop in HOPS if f"hop_{hop}_us" in args]
    return RankStep(
        event["pid"],
        args["step"],
        event["dur"],
        _known(args["compute_us"]),
        {hop: args[f"hop_{hop}_us"] for hop in hops},
        {hop: _known(args[f"hop_{hop}_exposed_us"]) for hop in hops},
        _known(args["other_waits_us"]),
    )


def _met(events: Iterable[Json]) -> dict[int, list[Met]]:
    """The collectives of every step to which all their ranks have come, by what they have alike."""
    arrivals: dict[Any, list[Arrival]] = {}
    for event in events:
        args = event["args"]
        if event["ph"] == "X" and args.get("hop") is not None and args["step"] is not None:
            ranks = tuple(args["ranks"])
            key = (
                args["step"],
                args["hop"],
                args["collective"],
                args["stage"],
                ranks,
                args["number"],
            )
            arrivals.setdefault(key, []).append(
                Arrival(event["pid"], event["ts"], args["own_us"], _known(args["exposed_us"]))
            )
    found: dict[int, list[Met]] = {}
    for (step, hop, _, _, ranks, _), some in arrivals.items():
        if len(ranks) > 1 and len(some) == len(ranks):
            found.setdefault(step, []).append((hop, some))
    return found


# -- in words --------------------------------------------------------------------------------------


def _words(
    steps: Sequence[RankStep], stragglers: Mapping[int, Straggler | None], job: Job
) -> Iterable[str]:
    places, numbers = job.places, list(stragglers)
    yield (
        f"{job.file}: {len(numbers)} step(s) of {len(places.ranks)} rank(s) on "
        f"{len(places.nodes)} node(s), p = {places.partition}; open it at https://ui.perfetto.dev"
    )
    hops = [hop for hop in HOPS if any(hop in one.total for one in steps)]
    for number in numbers:
        rows = [one for one in steps if one.step == number]
        yield ""
        yield from _table(number, rows, hops)
        yield _about(rows, hops, stragglers[number], places)
    yield ""
    yield _clocks(job)
    yield _overhead(steps, job)


def _table(number: int, rows: Sequence[RankStep], hops: Sequence[int]) -> Iterable[str]:
    heads = [f"{f'hop {hop}':>10}{'exposed':>10}" for hop in hops]
    yield f"{f'step {number}':<10}{'took':>10}{'compute':>10}{''.join(heads)}{'elsewhere':>11}"
    shown = sorted(rows, key=lambda one: -(one.compute or 0.0))[:_MOST_ROWS]
    for one in sorted(shown, key=lambda one: one.rank):
        cells = [f"{_ms(one.total.get(hop)):>10}{_ms(one.exposed.get(hop)):>10}" for hop in hops]
        yield (
            f"{f'rank {one.rank}':<10}{_ms(one.took):>10}{_ms(one.compute):>10}{''.join(cells)}"
            f"{_ms(one.others):>11}"
        )
    if len(rows) > len(shown):
        yield f"and {len(rows) - len(shown)} ranks that computed less"


def _about(
    rows: Sequence[RankStep], hops: Sequence[int], late: Straggler | None, places: Places
) -> str:
    waits = [
        f"{_ms(_median([one.exposed.get(hop) for one in rows]))} for hop {hop}" for hop in hops
    ]
    text = f"In the median over the ranks the step waited {' and '.join(waits) or 'for no hop'}. "
    if late is None:
        return text + "No rank was waited for."
    last = " and ".join(f"hop {hop} {n} of {of} times" for hop, (n, of) in late.last.items())
    return (
        f"{text}Rank {late.rank} (node {places.node_of(late.rank)}) was waited for: it came last "
        f"at {last}, and kept the others of its groups waiting for {_ms(late.waited)}, most of it "
        f"at hop {late.hop}."
    )


def _clocks(job: Job) -> str:
    others = {rank: one for rank, one in job.clocks.items() if one.error or one.ahead}
    if not others:
        return "One clock."
    worst = max(others, key=lambda rank: others[rank].error)
    moved = sum(1 for one in others.values() if one.ahead)
    return (
        f"Clocks: the times of {moved} rank(s) were moved to rank {job.places.ranks[0]}'s clock; "
        f"rank {worst}'s is known worst, to {others[worst].error / 1e6:.3f} ms."
    )


def _overhead(steps: Sequence[RankStep], job: Job) -> str:
    recorded = statistics.median([one.took for one in steps]) if steps else None
    before = None if job.before is None else job.before / 1e3
    return (
        f"A step took {_ms(recorded)} while it was recorded (median), {_ms(before)} just before "
        "that."
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _known(value: float | str) -> float | None:
    return value if isinstance(value, float | int) else None


def _ms(microseconds: float | None) -> str:
    return milliseconds(None if microseconds is None else microseconds / 1e6)
