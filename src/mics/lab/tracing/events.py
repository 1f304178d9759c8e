"""One rank's part of the file: what mics and torch's profiler have recorded, as trace events.

[Note: rows of a rank]
A rank is one process of the picture. Its first rows are of mics: the steps, the blocks' forward and
backward, and the collectives of each hop while they are under way. The rows below are torch's
threads and streams, where the same names stand for what the program does: issue a collective, or
wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mics.lab.tracing.accounts import HOPS, Account
from mics.lab.tracing.lanes import lanes_of
from mics.lab.tracing.profiles import Event, Profile
from mics.ranks.recording import Block, Flight

MICS = "mics"
"""The category of what mics has recorded."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """The moment from which the file counts, by one rank's clock.

    Args:
        rank: the process that it is in the file.
        label: what people see of it.
        start: nanoseconds by the first rank's clock at which some rank's first step began.
        ahead: that this rank's clock is ahead of that one.
    """

    rank: int
    label: str
    start: int
    ahead: int

    def microseconds(self, at: int) -> float:
        """A time of this rank's in the file."""
        return (at - self.ahead - self.start) / 1e3


@dataclass(frozen=True)
class _Drawn:
    """A range on a row that has a name, or an instant (``ended`` is ``None``)."""

    row: str
    name: str
    kind: str
    begun: int
    ended: int | None
    args: Json


def events_of_mics(
    origin: Origin,
    accounts: Sequence[Account],
    flights: Sequence[Flight],
    blocks: Sequence[Block],
) -> list[Json]:
    """The first rows of a rank, names included, see [Note: rows of a rank]."""
    drawn = [*map(_step, accounts)]
    drawn += [
        _Drawn("blocks", f"{b.way} {b.unit}", MICS, b.begun, b.ended, {"unit": b.unit})
        for b in blocks
    ]
    counts: dict[object, int] = {}
    for flight in flights:
        step = _step_at(accounts, flight)
        key = (step, flight.hop, flight.collective, flight.message.stage, flight.message.ranks)
        counts[key] = counts.get(key, 0) + 1
        drawn.append(_flight(flight, step, counts[key]))
    rows = ["steps", "blocks", *(f"hop {hop}" for hop in HOPS)]
    process: Json = {"ph": "M", "pid": origin.rank, "tid": 0}
    named = [
        process | {"name": "process_name", "args": {"name": origin.label}},
        process | {"name": "process_sort_index", "args": {"sort_index": origin.rank}},
    ]
    return named + _draw(origin, drawn, rows, first=1)


def _step_at(accounts: Sequence[Account], flight: Flight) -> int | None:
    return next((a.step for a in accounts if a.begun <= flight.begun < a.ended), None)


def _step(account: Account) -> _Drawn:
    args: Json = {"step": account.step, "compute_us": _us(account.compute)}
    for hop, one in account.hops.items():
        args[f"hop_{hop}_us"] = _us(one.total)
        args[f"hop_{hop}_exposed_us"] = _us(one.exposed)
    args["other_waits_us"] = _us(account.others)
    return _Drawn("steps", f"step {account.step}", MICS, account.begun, account.ended, args)


def _flight(flight: Flight, step: int | None, number: int) -> _Drawn:
    args: Json = {
        "step": step,
        "unit": flight.unit,
        "hop": flight.hop,
        "collective": flight.collective,
        "stage": flight.message.stage,
        "number": number,
        "bytes": flight.message.message_bytes,
        "ranks": list(flight.message.ranks),
        "own_us": _us(flight.own),
        "exposed_us": _us(sum(b - a for a, b in flight.waits)) if flight.waits else "n/a",
    }
    return _Drawn(f"hop {flight.hop}", flight.name, MICS, flight.begun, flight.ended, args)


def events_of_torch(origin: Origin, profile: Profile, span: tuple[int, int]) -> list[Json]:
    """The rows below: what began in a span of time on this rank's clock."""
    inside = [event for event in profile.events if span[0] <= event.begun < span[1]]
    names = {thread: _name(thread, profile) for thread in profile.threads}
    drawn, arrows = [], []
    for event in inside:
        row = names.get(event.thread) or " ".join(event.thread)
        if event.phase == "X":
            drawn.append(_Drawn(row, event.name, event.kind, event.begun, event.ended, event.args))
        else:
            arrows.append((row, event))
    rows = sorted({one.row for one in drawn}, key=_number_last)
    first = 100  # behind the rows of mics, whatever lanes they need
    events = _draw(origin, drawn, rows, first=first)
    row_ids = {
        one["args"]["name"]: one["tid"] for one in events if one.get("name") == "thread_name"
    }
    return events + [_arrow(origin, event, row_ids[row]) for row, event in arrows if row in row_ids]


def _name(thread: tuple[str, str], profile: Profile) -> str:
    name = profile.threads[thread].strip()
    return name if any(c.isdigit() for c in name) else f"{name} {thread[1]}"


def _number_last(row: str) -> tuple[str, int]:
    words = [word for word in row.split() if word.isdigit()]
    return row.split()[0], int(words[0]) if words else 0


def _arrow(origin: Origin, event: Event, row: int) -> Json:
    """One end of an arrow; its number is made one that no other rank uses."""
    end: Json = {"bp": "e"} if event.phase == "f" else {}
    number = origin.rank * 2**32 + int(event.arrow or 0)
    return end | {
        "ph": event.phase,
        "id": number,
        "pid": origin.rank,
        "tid": row,
        "ts": origin.microseconds(event.begun),
        "cat": event.kind,
        "name": event.name,
    }


def _draw(origin: Origin, drawn: Iterable[_Drawn], rows: Sequence[str], first: int) -> list[Json]:
    """Give every row as many lanes as it needs, and every lane a number."""
    by_row: dict[str, list[_Drawn]] = {row: [] for row in rows}
    for one in drawn:
        by_row[one.row].append(one)
    events: list[Json] = []
    number = first
    for row, ones in by_row.items():
        lanes, ends = lanes_of([(one.begun, one.ended or one.begun) for one in ones])
        for lane in range(max(lanes, default=-1) + 1):
            name = row if lane == 0 else f"{row} ({lane + 1})"
            head: Json = {"ph": "M", "pid": origin.rank, "tid": number + lane}
            events.append(head | {"name": "thread_name", "args": {"name": name}})
            sort = {"sort_index": number + lane}
            events.append(head | {"name": "thread_sort_index", "args": sort})
        for one, lane, end in zip(ones, lanes, ends, strict=True):
            event: Json = {
                "ph": "X",
                "pid": origin.rank,
                "tid": number + lane,
                "ts": origin.microseconds(one.begun),
                "name": one.name,
                "cat": one.kind,
                "args": one.args,
            }
            if one.ended is None:
                event |= {"ph": "i", "s": "t"}
            else:
                event["dur"] = (end - one.begun) / 1e3
            events.append(event)
        number += max(lanes, default=-1) + 1
    return events


def _us(nanoseconds: int | None) -> float | str:
    return "n/a" if nanoseconds is None else nanoseconds / 1e3
