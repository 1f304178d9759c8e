"""The way back: who has what in memory, which step everybody takes, and who gives it to whom."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mics.checkpoint.peers import Peers
from mics.errors import RecoveryError
from mics.quantities import first_of, size
from mics.ranks.console import say
from mics.recovery.holders import Choice, Held, Seat, choose, is_first_on_host
from mics.recovery.job import Job, others_of
from mics.recovery.own import Own, bytes_of, own_of, ranks_and_steps, resting_name
from mics.recovery.slot import Head, Reading, Slot

_PIECE = 1 << 26  # bytes that are sent at once


@dataclass(frozen=True)
class Resting:
    """What a rank that is away had of its own, as JSON, after which step; ``key`` was its shard."""

    step: int
    key: str
    own: bytes


@dataclass(frozen=True)
class Recalled:
    """What this rank goes on from: its slot, now in its own place, and what all ranks chose.

    ``own`` is ``None`` for a newcomer; ``rests`` has what ranks had of their own that have none of
    this step, each with its step, as JSON.
    """

    slot: Slot
    reading: Reading
    own: Own | None
    choice: Choice
    rests: Mapping[int, Resting]

    def resting_for(self, key: str, *, world: int) -> dict[int, Resting]:
        """What ranks that are away had of their own, and had this shard."""
        away = {rank: one for rank, one in self.rests.items() if rank >= world}
        return {rank: one for rank, one in away.items() if one.key == key}


def look(job: Job, model: str, seats: Sequence[Seat], peers: Peers) -> list[Held]:
    """All states of this job in the memory of all nodes; on every rank. Collective.

    Only their heads are read, by one rank of each node.
    """
    found: list[Held] = []
    strange: list[int] = []
    if is_first_on_host(peers.rank, seats):
        found, strange = _here(job, model, seats[peers.rank].host)
    rows = peers.gather([[asdict(one) for one in found], strange])
    steps = sorted({step for _, of_rank in rows for step in of_rank})
    if steps:
        say(
            f"memory has step(s) {first_of(list(map(str, steps)))} of this job with another model, "
            "optimizer, average or version of mics: nobody can go on from that"
        )
    return [_from_row(row) for of_rank, _ in rows for row in of_rank]


def _from_row(row: Mapping[str, Any]) -> Held:
    rests = tuple((rank, step) for rank, step in row["rests"])
    return Held(**{**row, "owns": tuple(row["owns"]), "rests": rests})


def _here(job: Job, model: str, host: str) -> tuple[list[Held], list[int]]:
    """The states of this node, and the steps of those that are of another model."""
    found, strange = [], []
    job.remove_strange()
    for path in job.files():
        head, beside = Slot(path).head(), Slot(others_of(path)).read()
        owns: list[tuple[int, int]] = []  # rank and step
        if beside is not None:
            owns = ranks_and_steps(beside.tensors, beside.head.step)
            if head is None or _moment(head) != _moment(beside.head):
                if (beside.head.job, beside.head.model) == (job.name, model):
                    found.append(_held(host, path.name, "", beside.head, owns))
                owns = []
        if head is not None and _is_of(head, job, model, path):
            inside = [(head.rank, head.step), *owns]
            found.append(_held(host, path.name, head.key, head, inside))
        if head is not None and head.job == job.name and head.model != model:
            strange.append(head.step)
    return found, strange


def _is_of(head: Head, job: Job, model: str, path: Path) -> bool:
    return (head.job, head.model, head.key) == (job.name, model, path.name.split(".")[0])


def _held(host: str, name: str, key: str, head: Head, known: Sequence[tuple[int, int]]) -> Held:
    moment = head.generation, head.step, head.digest
    owns = dict.fromkeys(rank for rank, step in known if step == head.step)
    rests = tuple((rank, step) for rank, step in known if step != head.step)
    return Held(host, name, key, head.rank, *moment, tuple(owns), head.world, rests)


def _moment(head: Head) -> tuple[int, int]:
    return head.generation, head.step


def recall(
    job: Job, held: Sequence[Held], seats: Sequence[Seat], peers: Peers, *, compare: bool
) -> Recalled | None:
    """Let every rank have its state of the newest step that all can have. Collective.

    What turns out not to be whole is no source, and the choice is made anew.

    Args:
        job: of this rank.
        held: what ``look`` found.
        seats: of all ranks.
        peers: all ranks.
        compare: as of ``choose``.

    Returns:
        ``None``, on every rank, where there is no such step.

    Raises:
        RecoveryError: on every rank: one has no room for its state.
    """
    left = list(held)
    while True:
        choice = choose(seats, left, compare=compare)
        if choice is None:
            return None
        slot = _fetch(job, left, choice, seats, peers)
        reading = _read(slot, choice.shards[peers.rank])
        given = _given(job, choice, seats, peers)
        own = _own(choice, given, reading, peers.rank)
        whole = reading is not None and (own is not None or peers.rank in choice.newcomers)
        bad = [] if whole else _sources_of(choice, peers.rank)
        spoilt = {tuple(one) for of_rank in peers.gather(bad) for one in of_rank}
        if not spoilt:
            assert reading is not None
            return Recalled(slot, reading, own, choice, _rests(choice, given))
        left = [one for one in left if (one.host, one.name) not in spoilt]


def _sources_of(choice: Choice, rank: int) -> list[list[str]]:
    sources = (choice.shards[rank], choice.owns.get(rank))
    return [[one.host, one.name] for one in sources if one is not None]


def _read(slot: Slot, wanted: Held) -> Reading | None:
    """What a slot holds, if it is the state that was chosen."""
    reading = slot.read()
    if reading is None:
        return None
    head = reading.head
    found = head.key, head.generation, head.step, head.digest
    return reading if found == (wanted.key, wanted.generation, wanted.step, wanted.digest) else None


def _fetch(
    job: Job, held: Sequence[Held], choice: Choice, seats: Sequence[Seat], peers: Peers
) -> Slot:
    """This rank's slot with its shard, brought here where it is elsewhere. Collective."""
    mine, source = seats[peers.rank], choice.shards[peers.rank]
    place = _least(job, held, mine)
    own = Slot(job.folder / source.name) if _in_place(mine, source) else place
    trouble: list[OSError] = []
    for way in _ways(choice, seats):
        try:
            _pass_on(job, place, way, peers)
        except OSError as error:  # the others' states are on their way all the same
            trouble.append(error)

    def refuse() -> None:
        if trouble:
            raise RecoveryError(
                f"Rank {mine.rank} has no room for its state, which other nodes have.",
                numbers=f"{trouble[0].strerror or trouble[0]}: {job.folder} has room for "
                f"{size(job.free_bytes())}.",
                write="MICS_MEMORY=<a larger folder in memory>, and start again: the states stay",
            )

    peers.together(refuse, kind=RecoveryError)
    return own


def _pass_on(job: Job, place: Slot, way: _Way, peers: Peers) -> None:
    """Do this rank's part of one way; ``place`` is where it takes things.

    Raises:
        OSError: there is no room for what came.
    """
    if way.giver == peers.rank:
        slot = place if way.second_hand else Slot(job.folder / way.source.name)
        content = slot.content() if _read(slot, way.source) is not None else None
        if way.taker == peers.rank:
            _take(place, content)
        else:
            _send(content, way.taker, peers)
    elif way.taker == peers.rank:
        _receive(place, way.giver, peers)


def _least(job: Job, held: Sequence[Held], mine: Seat) -> Slot:
    """The slot of this rank that is worth least: what the other has counts if the giver dies."""
    known = {
        one.name: (one.generation, one.step) for one in held if one.host == mine.host and one.key
    }
    paths = job.slots(mine.key, mine.rank)
    return Slot(min(paths, key=lambda path: known.get(path.name, (0, 0))))


@dataclass(frozen=True)
class _Way:
    """A slot on its way from one rank to another, or to the same one under another name."""

    source: Held
    giver: int
    taker: int
    second_hand: bool


def _ways(choice: Choice, seats: Sequence[Seat]) -> list[_Way]:
    """Who gives what to whom, in one order for all; who has taken gives as well."""
    takers: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for seat in seats:
        source = choice.shards[seat.rank]
        if not _in_place(seat, source):
            takers[source.host, source.name].append(seat.rank)
    rounds: list[tuple[int, _Way]] = []
    for ranks in takers.values():
        source = choice.shards[ranks[0]]
        givers = [(_giver(source, seats), False)]
        number = 0
        while ranks:
            now, ranks = ranks[: len(givers)], ranks[len(givers) :]
            pairs = zip(givers, now, strict=False)
            rounds += [
                (number, _Way(source, giver, taker, second)) for (giver, second), taker in pairs
            ]
            givers += [(taker, True) for taker in now]
            number += 1
    return [way for _, way in sorted(rounds, key=lambda one: (one[0], one[1].taker))]


def _in_place(seat: Seat, source: Held) -> bool:
    return (source.host, source.place, source.key) == (seat.host, seat.rank, seat.key)


def _giver(source: Held, seats: Sequence[Seat]) -> int:
    """A rank that can read a slot, one that has that shard itself if there is one."""
    there = [seat for seat in seats if seat.host == source.host]
    return min(there, key=lambda seat: (seat.key != source.key, seat.rank)).rank


def _take(place: Slot, content: torch.Tensor | None) -> None:
    if content is None:
        return
    place.begin(content.numel())
    for first in range(0, content.numel(), _PIECE):
        place.take(first, content[first : first + _PIECE])
    place.end()


def _send(content: torch.Tensor | None, taker: int, peers: Peers) -> None:
    """Send the bytes of a slot; none where it has turned out not to be whole."""
    num_bytes = 0 if content is None else content.numel()
    peers.send(torch.tensor([num_bytes]), taker)
    for first in range(0, num_bytes, _PIECE):
        assert content is not None
        peers.send(content[first : first + _PIECE], taker)


def _receive(place: Slot, giver: int, peers: Peers) -> None:
    whole = torch.zeros(1, dtype=torch.int64)
    peers.receive(whole, giver)
    num_bytes = int(whole)
    if not num_bytes:
        return
    trouble = None
    try:
        place.begin(num_bytes)
    except OSError as error:
        trouble = error
    for first in range(0, num_bytes, _PIECE):
        piece = torch.empty(min(_PIECE, num_bytes - first), dtype=torch.uint8)
        peers.receive(piece, giver)
        if trouble is None:
            place.take(first, piece)
    if trouble is not None:
        raise trouble
    place.end()


def _given(job: Job, choice: Choice, seats: Sequence[Seat], peers: Peers) -> dict[int, Any]:
    """What ranks had of their own that is not in the slots that they go on from. Collective."""
    given: dict[str, Any] = {}
    wanted = {
        **{rank: (choice.step, one) for rank, one in choice.owns.items()},
        **choice.rests,
    }
    for rank, (step, source) in wanted.items():
        if not _is_in_slot(rank, choice) and _giver(source, seats) == peers.rank:
            found = _own_in(job, source, rank, step)
            if found is not None:
                given[str(rank)] = found
    return {int(rank): own for of_rank in peers.gather(given) for rank, own in of_rank.items()}


def _own(
    choice: Choice, given: Mapping[int, Any], reading: Reading | None, rank: int
) -> Own | None:
    """What this rank had of its own, from its slot or from a replica's; ``None`` for a newcomer."""
    if rank not in choice.owns:
        return None
    return own_from(_own_inside(reading) if _is_in_slot(rank, choice) else given.get(rank))


def own_from(parsed: Any) -> Own | None:
    """What JSON says that a rank had of its own, ``None`` where it is of another version."""
    try:
        return None if parsed is None else own_of(parsed)
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


def own_of_writer(reading: Reading) -> Own | None:
    """What the rank had of its own that wrote a slot."""
    return own_from(_own_inside(reading))


def _rests(choice: Choice, given: Mapping[int, Any]) -> dict[int, Resting]:
    return {
        rank: Resting(step, source.shard, json.dumps(given[rank]).encode())
        for rank, (step, source) in choice.rests.items()
        if rank in given
    }


def _own_inside(reading: Reading | None) -> Any:
    return None if reading is None or len(reading.others) != 3 else reading.others[2]


def _is_in_slot(rank: int, choice: Choice) -> bool:
    source = choice.owns.get(rank)
    return source is not None and source.rank == rank and choice.shards[rank] == source


def _own_in(job: Job, source: Held, rank: int, step: int) -> Any:
    """What a rank had of its own, as a slot of this node, or the file beside it, tells it."""
    if source.rank == rank and source.key and source.step == step:
        return _own_inside(Slot(job.folder / source.name).read())
    others = Slot(others_of(job.folder / source.name)).read()
    if others is None:
        return None
    for name in (str(rank), resting_name(rank, step)):
        if name in others.tensors:
            return json.loads(bytes_of(others.tensors[name]))
    return None
