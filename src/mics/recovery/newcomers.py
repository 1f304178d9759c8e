"""Ranks that are others in number than those that kept a state: who gets what of its own.

[Note: what a newcomer gets]
Buffers and values come from the rank whose shard it takes, which is at the same step. Random
numbers are its own of the step in which it was last here, if somebody has kept them: any will do,
but two ranks must not draw the same. An extra that is the same on all ranks, as a scheduler is,
must not be taken from then: it is that of the others now. One that differs from rank to rank can
only be its own of then, and is not right where it tells a position in data, so that is said aloud.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mics.checkpoint.folder import steps_of
from mics.checkpoint.peers import Peers
from mics.errors import RecoveryError
from mics.ranks.console import alarm, say
from mics.ranks.drawing import ranks_text
from mics.ranks.launcher import full_world
from mics.recovery.healing import Recalled, Resting, own_from, own_of_writer
from mics.recovery.holders import Held, Seat, more_than
from mics.recovery.own import Own
from mics.recovery.words import why_not
from mics.sharding.dealing import is_dealt


class Samples:
    """Looks whether a step has those of the full job, as far as anybody can know, and says if not.

    Args:
        model: that trains.
        world: how many ranks there are.

    Raises:
        TopologyError: the variable that tells of the full job is no number.
    """

    def __init__(self, model: nn.Module, world: int) -> None:
        self._model, self._world, self._full = model, world, full_world(world)
        self._said = False

    def before(self, world: int) -> None:
        """Take note that there were so many ranks."""
        self._full = max(self._full, world)

    def look(self) -> None:
        """Say it once, behind a step."""
        if self._said or self._full == self._world or is_dealt(self._model):
            return
        self._said = True
        alarm(
            f"{self._world} OF {self._full} RANKS TRAIN, and the loop does not deal its "
            "micro-batches.\nIf data are by rank, a step has other samples than with all ranks.\n"
            "Write: for micro in mics.deal(model, <micro-batches of a step>)"
        )


def leave(
    seats: Sequence[Seat],
    held: Sequence[Held],
    newer: Path | None,
    checkpoints: Path | None,
    peers: Peers,
) -> None:
    """Say why nobody goes on from what is in memory, unless that may be thrown away. Collective.

    Fewer ranks do not begin at step 0 beside what those hold that are away.

    Args:
        seats: of all ranks.
        held: all states there are, of which none can be had.
        newer: a checkpoint of a later step, if there is one.
        checkpoints: the folder of checkpoints, if any.
        peers: all ranks.

    Raises:
        RecoveryError: on every rank: they would.
    """
    before, why = more_than(seats, held), why_not(seats, held, newer)
    saved = peers.together(lambda: checkpoints is not None and any(steps_of(checkpoints)), only=0)
    if before and not saved[0]:
        raise RecoveryError(
            f"{len(seats)} ranks {why}. There were {before}: to begin at step 0 would throw away "
            "what they have kept.",
            write="all ranks again, with the same partition size; or, to begin at step 0, "
            "snapshots.forget() instead of restore()",
        )
    say(why)


@dataclass(frozen=True)
class Given:
    """What this rank gets of its own, and names of extras that stay as the program made them."""

    own: Own
    left: frozenset[str]


def settle(found: Recalled, rank: int, peers: Peers) -> Given:
    """Give this rank what it gets of its own, and say what was not to be had. Collective."""
    choice = found.choice
    if not choice.newcomers and not choice.away:
        assert found.own is not None
        return Given(found.own, frozenset())
    rows = peers.gather(None if found.own is None else prints_of(found.own))
    known = [row for row in rows if row is not None]
    differ = differing(known)
    _say(found, differ)
    if found.own is not None:
        return Given(found.own, frozenset())
    return _newcomer(found, differ, found.rests.get(rank))


def _newcomer(found: Recalled, differ: Collection[str], resting: Resting | None) -> Given:
    base = own_of_writer(found.reading)
    assert base is not None  # it was read by others of this version
    then = None if resting is None else own_from(json.loads(resting.own))
    extras = {name: state for name, state in base.extras.items() if name not in differ}
    if then is not None:
        extras |= {name: state for name, state in then.extras.items() if name in differ}
    own = Own(base.tensors, base.values, {} if then is None else then.random, extras)
    return Given(own, frozenset(base.extras) - frozenset(extras))


def differing(prints: Sequence[Mapping[str, str]]) -> frozenset[str]:
    """The names of extras that are not the same on all ranks, given what ``prints_of`` returned."""
    return frozenset(name for name in prints[0] if len({row.get(name) for row in prints}) > 1)


def prints_of(own: Own) -> dict[str, str]:
    """A fingerprint of each extra."""
    return {
        name: hashlib.sha256(Own({}, {}, {}, {name: state}).to_bytes()).hexdigest()
        for name, state in own.extras.items()
    }


def _say(found: Recalled, differ: Collection[str]) -> None:
    choice, rests = found.choice, found.rests
    say(f"{len(choice.shards)} ranks go on with what {choice.world} have kept")
    back = [rank for rank in choice.newcomers if rank in rests]
    kept = [rank for rank in choice.away if rank in rests]
    lines = [
        *(
            f"rank(s) {ranks_text(ranks)}, back again, have their random state of step {step}"
            for step, ranks in _by_step(back, rests).items()
        ),
        _line(
            "are new, and their random state is as the program has set it", choice.newcomers, back
        ),
        _line("are away; what they have of their own is kept until they are back", kept),
        _line("are away, and nobody has what they had of their own", choice.away, kept),
    ]
    for line in filter(None, lines):
        say(line)
    if differ:
        alarm("\n".join(on_extras(sorted(differ), choice.newcomers, choice.away, rests)))


def _line(words: str, ranks: Sequence[int], but: Sequence[int] = ()) -> str:
    some = [rank for rank in ranks if rank not in but]
    return f"rank(s) {ranks_text(some)} {words}" if some else ""


def _by_step(ranks: Sequence[int], rests: Mapping[int, Resting]) -> dict[int, list[int]]:
    steps: defaultdict[int, list[int]] = defaultdict(list)
    for rank in ranks:
        steps[rests[rank].step].append(rank)
    return dict(sorted(steps.items()))


def on_extras(
    names: Sequence[str],
    newcomers: Sequence[int],
    away: Sequence[int],
    rests: Mapping[int, Resting],
) -> list[str]:
    """What is to be said of extras that differ, as lines.

    Args:
        names: of them.
        newcomers: ranks that were not there.
        away: ranks that are not there any more.
        rests: what newcomers had of their own when they were last here, by rank.
    """
    lines = [f"EXTRAS DIFFER FROM RANK TO RANK ({', '.join(names)}), and the ranks are others now."]
    if away:
        lines.append(f"Those of rank(s) {ranks_text(away)} stand still: what data they tell of, if")
        lines.append("any, nobody sees as long as these ranks are away.")
    for step, ranks in _by_step([r for r in newcomers if r in rests], rests).items():
        lines.append(f"Those of rank(s) {ranks_text(ranks)} are of step {step}.")
    fresh = [rank for rank in newcomers if rank not in rests]
    if fresh:
        lines.append(f"Those of rank(s) {ranks_text(fresh)} are as the program has made them.")
    return [*lines, "Write: data that depend on the step and the micro-batch alone (mics.deal)"]
