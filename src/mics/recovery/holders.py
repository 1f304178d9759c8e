"""The step from which everybody can go on, and who has it: a decision that all ranks make alike.

[Note: at most one step apart]
A rank begins to write step t + 1 over step t - 1 only when it has heard that step t is in the
memory of every rank (``agreeing.py``). So at any moment all that is whole is of the steps t - 1, t
and t + 1, and t is whole everywhere: whoever dies, no step before t is ever asked for.

[Note: which of two]
Replicas compute the same bits. Where three or more hold a step and most are alike, the others are
wrong and no source. Where two differ nobody knows who is wrong: the step before, on which they
agreed, is the one to go on from. What one alone holds cannot be compared, and is taken.

[Note: generations]
Every restoring begins a new generation, and writes from then on carry its number. All states of one
step that belong together are of one generation. A node that was cut off may come back with a later
step of a history that the others have left: what is newest in the newest generation counts. The
same step of two generations has other bits where they had other numbers of ranks, so the two are
never mixed. A generation that nobody alive has seen may get its number again: the lower bits of a
number are the time at which it began, so no two are equal, and the later one is newer.

[Note: other numbers of ranks]
Ranks of another number hold the same shards as long as the partition size is the same, and take
them from whoever has them. What a rank has of its own goes to the rank of its number. One that
there was in the generation that is gone on from, and that has lost it, lets everybody go back a
step, as ever; one that there was not is new, and has no step in which it was known. What ranks had
that are away now *rests*: it is kept beside the slots until they are back.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_TIME_BITS = 32


@dataclass(frozen=True)
class Seat:
    """A rank: the memory it can read (``host``), and what it needs (``key``)."""

    rank: int
    host: str
    key: str


def is_first_on_host(rank: int, seats: Sequence[Seat]) -> bool:
    """Whether a rank is the one that does what is done once on its node."""
    return rank == min(seat.rank for seat in seats if seat.host == seats[rank].host)


@dataclass(frozen=True)
class Held:
    """A state in the memory of a host.

    ``name`` is the slot's file, ``rank`` who wrote it first, ``world`` how many ranks there were.
    ``owns`` are the ranks of whose own state (random numbers, position in the data) there is a
    copy, ``rests`` those of which there is one of an earlier step, each with that step. ``key`` is
    empty where nothing else is whole.
    """

    host: str
    name: str
    key: str
    rank: int
    generation: int
    step: int
    digest: int
    owns: tuple[int, ...]
    world: int
    rests: tuple[tuple[int, int], ...] = ()

    @property
    def shard(self) -> str:
        """The key of the slot, also where nothing of its own is whole in it."""
        return self.name.split(".")[0]

    @property
    def place(self) -> int:
        """The rank whose slot this is; what it holds may be a copy of another rank's."""
        return int(self.name.split(".")[1])


@dataclass(frozen=True)
class Choice:
    """A step, and for every rank whose slot has its shard and whose has its own state.

    ``world`` is how many ranks had done the step. Ranks that there were not are in ``shards``
    alone. ``rests``: where there is what ranks had of their own in an earlier step, and in which,
    or in this one if they are away now.
    """

    step: int
    shards: dict[int, Held]
    owns: dict[int, Held]
    world: int
    rests: dict[int, tuple[int, Held]]

    @property
    def newcomers(self) -> list[int]:
        """The ranks that have no state of their own of this step."""
        return sorted(self.shards.keys() - self.owns.keys())

    @property
    def away(self) -> list[int]:
        """The ranks that had done the step, and are not there now."""
        return list(range(len(self.shards), self.world))


def choose(seats: Sequence[Seat], held: Iterable[Held], *, compare: bool = True) -> Choice | None:
    """The newest step for which every rank finds its shard and its own state.

    See [Note: at most one step apart], [Note: which of two] and [Note: generations].

    Args:
        seats: of all ranks.
        held: all states there are.
        compare: what replicas disagree on is no source; else everybody takes the nearest.
    """
    moments: defaultdict[tuple[int, int], list[Held]] = defaultdict(list)
    for one in held:
        moments[one.generation, one.step].append(one)
    for moment in sorted(moments, reverse=True):
        choice = _sources(moment[1], seats, moments[moment], compare=compare)
        if choice is not None:
            return choice
    return None


def next_generation(held: Iterable[Held], now: float) -> int:
    """The number of the generation that begins, see [Note: generations].

    Args:
        held: all states there are.
        now: seconds since 1970, the same on every rank.
    """
    newest = max((one.generation for one in held), default=0)
    return ((newest >> _TIME_BITS) + 1 << _TIME_BITS) + int(now)


def disputed_after(step: int, held: Iterable[Held]) -> bool:
    """Whether replicas hold other bits of a later step, so that nothing saved of it counts.

    A checkpoint has each tensor of one of the replicas, be it the one that was wrong.
    """
    digests: defaultdict[tuple[int, int, str], set[int]] = defaultdict(set)
    for one in held:
        if one.key and one.step > step:
            digests[one.generation, one.step, one.key].add(one.digest)
    return any(len(found) > 1 for found in digests.values())


def missing(seats: Sequence[Seat], held: Iterable[Held]) -> list[int]:
    """The ranks of whose shard nobody holds any step."""
    keys = {one.key for one in held}
    return [seat.rank for seat in seats if seat.key not in keys]


def more_than(seats: Sequence[Seat], held: Iterable[Held]) -> int:
    """How many ranks kept the newest states, if they were more than there are now; else 0."""
    _, world = max(((one.generation, one.world) for one in held), default=(0, 0))
    return world if world > len(seats) else 0


def on_one_node(seats: Sequence[Seat]) -> list[int]:
    """The ranks whose shard is in the memory of one node only, where there are several nodes."""
    hosts: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for seat in seats:
        hosts[seat.key][seat.host] = None
    several = len({seat.host for seat in seats}) > 1
    return [seat.rank for seat in seats if several and len(hosts[seat.key]) == 1]


def trusted(held: Sequence[Held]) -> list[Held]:
    """Those of the holders of one shard and step that may be a source; none where nobody knows.

    Every rank that has computed it has one vote, however many copies of its state there are.
    """
    votes = {(one.rank, one.digest) for one in held}
    right = majority([digest for _, digest in votes])
    return [one for one in held if one.digest == right]


def majority(digests: Sequence[int]) -> int | None:
    """The digest that more than half have; ``None`` where there is none."""
    ((digest, most),) = Counter(digests).most_common(1)
    return digest if 2 * most > len(digests) else None


def _sources(
    step: int, seats: Sequence[Seat], held: Sequence[Held], *, compare: bool
) -> Choice | None:
    by_key: defaultdict[str, list[Held]] = defaultdict(list)
    for one in held:
        by_key[one.key].append(one)
    alone = by_key.pop("", [])
    good = {k: trusted(holders) if compare else holders for k, holders in by_key.items()}
    world = max(one.world for one in held)
    shards, owns = {}, {}
    for seat in seats:
        holders = good.get(seat.key, [])
        knowing = [one for one in [*holders, *alone] if seat.rank in one.owns]
        if not holders or not (knowing or seat.rank >= world):
            return None
        shards[seat.rank] = _nearest(seat, holders)
        if knowing:
            owns[seat.rank] = _nearest(seat, knowing)
    return Choice(step, shards, owns, world, _resting(step, held, owns))


def _resting(
    step: int, held: Sequence[Held], owns: Mapping[int, Held]
) -> dict[int, tuple[int, Held]]:
    """The newest that there is of the own states of ranks that are away, or have been."""
    found: dict[int, tuple[int, Held]] = {}
    for one in sorted(held, key=lambda one: (one.host, one.name)):
        for rank, at in [*((rank, step) for rank in one.owns), *one.rests]:
            if rank in owns:
                continue
            # Beside another rank's slot it is read without the rest of that.
            before = found.get(rank)
            if before is None or (at, one.rank != rank) > (before[0], before[1].rank != rank):
                found[rank] = at, one
    return found


def _nearest(seat: Seat, held: Sequence[Held]) -> Held:
    return min(held, key=lambda one: _distance(seat, one))


def _distance(seat: Seat, held: Held) -> tuple[bool, bool, str, int]:
    """One's own slot first, then one of this host."""
    return held.host != seat.host, held.place != seat.rank, held.host, held.place
