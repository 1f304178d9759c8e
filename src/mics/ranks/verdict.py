"""Can a wait still end? The answer, and its words, from what the ranks say of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mics.errors import RankError
from mics.ranks.board import Notice
from mics.ranks.drawing import ranks_text
from mics.ranks.stuck import circle, crossed, missing, state_of_process

_MOST_PLACES = 4  # spelled out in one message

_SAME_STEPS = "for batches in mics.steps(loader, ...), which ends on all ranks together"
_SAME_CALLS = "the same calls in the same order on every rank"
_ITS_LOG = (
    "the log of that rank: was it killed (for want of memory?), or ended by Gloo, which aborts "
    "where ranks send different sizes?"
)


@dataclass(frozen=True)
class Verdict:
    """Why a wait can not end.

    Args:
        error: says so.
        evidence: what it was concluded from, if that may be a moment's picture: then it has to be
            the same at the next look.
    """

    error: RankError
    evidence: object = None


def judge(
    mine: Notice, notices: Mapping[int, Notice], seconds: float, *, broken: bool = False
) -> Verdict | None:
    """Tell why a wait can not end, if it can not.

    Args:
        mine: the wait.
        notices: of every rank that has put one up.
        seconds: how long it has lasted.
        broken: whether the backend has given it up already.
    """
    others = [notice for rank, notice in sorted(notices.items()) if rank != mine.rank]
    waited = f"Rank {mine.rank} waited for it in {place(mine)} for {seconds:.0f} s."
    for other in others:
        if other.does == "has given up":
            what, numbers, write = other.error
            return Verdict(RankError(what, numbers=numbers, write=write))
    for other in others:
        if other.does == "has failed":
            during = f" in {other.during}" if other.during else ""
            what = f"Rank {other.rank} has failed{during}: {other.what}"
            return Verdict(RankError(what, numbers=waited))
    absent = missing(mine, notices)
    for other in others:
        if other.rank not in (mine.members if broken else absent):
            continue
        if other.does == "has ended":
            what = f"Rank {other.rank} has ended its program, and the others have not."
            return Verdict(RankError(what, numbers=waited, write=_SAME_STEPS))
        if other.does == "has left" and other.step == mine.step > 0:
            by = f" by {other.what}" if other.what else ""
            what = f"Rank {other.rank} alone has left {other.during}{by}."
            write = "break, and exceptions that a program goes on after, on every rank or on none"
            # The exception may be on its way to the end of the program, which says more.
            return Verdict(RankError(what, numbers=waited, write=write), evidence=other)
    return _gone(mine, notices, absent, waited) or _never(notices)


def _gone(
    mine: Notice, notices: Mapping[int, Notice], absent: Sequence[int], waited: str
) -> Verdict | None:
    gone = [r for r in absent if r in notices and state_of_process(notices[r], mine) == "is gone"]
    if not gone:
        return None
    rank = notices[gone[0]]
    what = f"Rank {rank.rank} has died: its process {rank.process} is gone, and said nothing."
    return Verdict(RankError(what, numbers=waited, write=f"see {_ITS_LOG}"), evidence=tuple(gone))


def _never(notices: Mapping[int, Notice]) -> Verdict | None:
    waits = crossed(notices)
    what = "Ranks take one and the same collective for different ones."
    if not waits:
        waits = circle(notices)
        what = "Ranks wait for each other in different places, so none of them can go on."
    if not waits:
        return None
    evidence = tuple((wait.rank, wait.group, wait.number) for wait in waits)
    numbers = _places(waits, notices)
    return Verdict(RankError(what, numbers=numbers, write=_SAME_CALLS), evidence)


def timed_out(mine: Notice, notices: Mapping[int, Notice], seconds: float) -> RankError:
    """The error of a wait that has lasted as long as it may."""
    return RankError(
        f"Rank {mine.rank} has waited {seconds:.0f} s, the timeout, in {place(mine)}.",
        numbers=f"It waited for {whom(mine, notices)}.",
        write="the same calls on every rank, or a longer timeout= for init_process_group",
    )


def store_gone(mine: Notice, seconds: float) -> RankError:
    """The error of a wait in which the board went, with the rank that kept it."""
    return RankError(
        "Rank 0 has ended, and the others have not: the job's store, which it kept, is gone.",
        numbers=f"Rank {mine.rank} waited in {place(mine)} for {seconds:.0f} s.",
        write=f"{_SAME_STEPS}; or see {_ITS_LOG}",
    )


def lost(mine: Notice, notices: Mapping[int, Notice], words: str) -> RankError:
    """The error of a wait that the backend has given up, where nobody says why.

    Args:
        mine: the wait.
        notices: of every rank that has put one up.
        words: the backend's.
    """
    absent = missing(mine, notices)
    named = f"rank(s) {ranks_text(absent)}" if absent else "another rank"
    return RankError(
        f"The connection to {named} was lost, and nothing else was heard.",
        numbers=f"Rank {mine.rank} was in {place(mine)}. The backend says: {words.splitlines()[0]}",
        write=f"see {_ITS_LOG}",
    )


def whom(mine: Notice, notices: Mapping[int, Notice]) -> str:
    """Name those that a rank waits for, and what is known of them."""
    absent = missing(mine, notices)
    if not absent:
        return "none of them: all have come, and it is under way"
    known: dict[str, list[int]] = {}
    for rank in absent:
        known.setdefault(_known(mine, notices.get(rank)), []).append(rank)
    told = [f"rank(s) {ranks_text(ranks)}, {text}" for text, ranks in known.items()]
    more = len(told) - _MOST_PLACES
    return "; ".join(told[:_MOST_PLACES]) + (f"; and {more} more" if more > 0 else "")


def _known(mine: Notice, other: Notice | None) -> str:
    if other is None:
        return "of which nothing has been heard"
    state = state_of_process(other, mine)
    if state:
        return f"whose process {other.process} {state}"
    if other.does == "waits":
        return f"which waits in {place(other)}"
    if other.does == "works":
        return "which has not come: it computes, or is where mics does not see it"
    return f"which {other.does}"


def place(wait: Notice) -> str:
    """Where a rank waits."""
    return f"{wait.what}, {wait.during}" if wait.during else wait.what


def _places(waits: Sequence[Notice], notices: Mapping[int, Notice]) -> str:
    by_place: dict[str, list[int]] = {}
    for wait in waits:
        absent = missing(wait, notices)
        to_come = f", for rank(s) {ranks_text(absent)}" if absent else ""
        by_place.setdefault(f"{place(wait)}{to_come}", []).append(wait.rank)
    told = [f"rank(s) {ranks_text(ranks)} in {where}" for where, ranks in by_place.items()]
    more = len(told) - _MOST_PLACES
    told = told[:_MOST_PLACES] + ([f"and {more} more"] if more > 0 else [])
    return f"{told[0][:1].upper()}{'; '.join(told)[1:]}."
