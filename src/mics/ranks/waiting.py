"""The one way in which mics waits for other ranks on a host: in slices, with an eye on the board.

A wait that is soon over costs what torch's own costs. A longer one says on the board where it is
(``board.py``), and between slices looks whether it can still end. It ends with a ``RankError`` on
every rank, within seconds, when a rank has failed or left, when its process is gone, and when ranks
wait for each other in different places. After ``Patience.speak`` seconds it says for whom it waits.
Else it ends with the timeout of the group.

What is not seen: collectives that a program calls in ``torch.distributed`` itself, and those of an
accelerator, for which the host does not wait. There the questions of ``same_steps.py`` and the
notes that checkpoints compare, which run on Gloo, are where a rank notices that others do not come.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Protocol

from mics.errors import RankError
from mics.ranks.board import Board, NoAnswer, Notice, board_of_job, patience
from mics.ranks.console import say_of_this_rank
from mics.ranks.drawing import ranks_text
from mics.ranks.heartbeat import heart
from mics.ranks.recording import recorder
from mics.ranks.verdict import judge, lost, place, store_gone, timed_out, whom
from mics.ranks.whereabouts import Counted, give_up, notice

IsOver = Callable[[float], bool]
"""Waits for at most some seconds; returns whether the wait is over, and raises if it broke."""

_NOTICES_PER_LOOK = 64  # that one rank reads, on average
_MOST_VOICES = 8  # ranks that say for whom they wait
_MOST_UNANSWERED = 3  # looks, before a board that a rank keeps is taken to have gone with it


@dataclass(slots=True)
class Place:
    """A collective that a rank may have to wait in; its words are the same on all its ranks.

    Args:
        group: whose collective it is.
        number: of the group's collectives, from 1.
        what: it is.
        num_bytes: of its message, if they tell it from others.
    """

    group: Counted
    number: int
    what: str
    num_bytes: int = 0

    def __str__(self) -> str:
        size = f" of {self.num_bytes:,} bytes" if self.num_bytes else ""
        return f"the {self.what}{size} among ranks {ranks_text(self.group.ranks)}"


class Awaited(Protocol):
    """What can be waited for in slices, as torch's handle of a collective of the host."""

    def wait(self, timeout: timedelta) -> bool:
        """Wait for so long; raise a RuntimeError if it is not over, or has broken."""
        ...

    def is_completed(self) -> bool:
        """Whether a wait would return or raise at once."""
        ...


def wait_for_work(work: Awaited, place: Place) -> None:
    """Wait for what a backend of the host has under way.

    Raises:
        RankError: it can not end, or has broken; names the rank and what it did.
    """
    began = time.monotonic()
    _seen_to_wait(place)
    tracer = recorder()
    try:
        if tracer is None:
            _wait_for_work(work, place, began)
        else:
            with tracer.waiting(place):
                _wait_for_work(work, place, began)
    finally:
        _seen_to_go_on()
    _waited.seconds = getattr(_waited, "seconds", 0.0) + time.monotonic() - began


def _wait_for_work(work: Awaited, place: Place, began: float) -> None:
    try:
        work.wait(_slice())  # nearly always enough: what follows is for the others
    except RuntimeError:
        _wait_until(lambda seconds: _is_over(work, seconds), place, began)


_waited = threading.local()


def own_clock() -> float:
    """Seconds on a clock of this thread that stands still while it waits for other ranks."""
    return time.monotonic() - float(getattr(_waited, "seconds", 0.0))


def _seen_to_wait(place: Place) -> None:
    """Let whoever reads this rank's heartbeat know where it waits."""
    mine = heart()
    if mine is not None:
        mine.wait((place.what, place.num_bytes, place.group.key), place)


def _seen_to_go_on() -> None:
    mine = heart()
    if mine is not None:
        mine.go_on()


@functools.cache
def _slice() -> timedelta:
    return timedelta(seconds=patience().look)


def wait_until(is_over: IsOver, place: Place, began: float) -> None:
    """Wait for anything that other ranks have to come to.

    Args:
        is_over: waits for a while.
        place: what is waited for.
        began: when, on the monotonic clock.

    Raises:
        RankError: as ``wait_for_work``.
    """
    _seen_to_wait(place)
    try:
        _wait_until(is_over, place, began)
    finally:
        _seen_to_go_on()


def _wait_until(is_over: IsOver, place: Place, began: float) -> None:
    board, seconds = board_of_job(), patience().look
    vigil: _Vigil | None = None
    try:
        while not is_over(seconds):
            if board is not None:
                vigil = vigil or _Vigil(board, place, began)
                vigil.look()
    except RankError:
        raise
    except RuntimeError as error:
        if board is None:
            raise
        raise (vigil or _Vigil(board, place, began)).explain(error) from None
    if vigil is not None:
        vigil.end()


def _is_over(work: Awaited, seconds: float) -> bool:
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait(timedelta(seconds=seconds))  # over meanwhile, or broken, which raises again
    return True


class _Vigil:
    """A wait that has become long.

    Args:
        board: what the ranks say.
        place: what is waited for.
        began: when, on the monotonic clock.
    """

    def __init__(self, board: Board, place: Place, began: float) -> None:
        self._board = board
        self._place = place
        self._began = began
        # Another thread, such as a save in the background, waits beside a program that may go on:
        # it hears what others say, and says nothing.
        self._speaks = threading.current_thread() is threading.main_thread()
        self._told = False
        self._looks = 0
        self._unanswered = 0
        self._next_word = board.patience.speak
        self._evidence: object = None

    def look(self) -> None:
        """Say where this rank waits, see whether that can still end, and say for whom it waits.

        Raises:
            RankError: it can not end.
        """
        try:
            self._tell()
            self._looks += 1
            stride = max(1, self._board.world // _NOTICES_PER_LOOK)
            if self._looks % stride == 0 or self._board.somebody_ended():
                self._end_if_vain(broken=False)
            self._unanswered = 0
        except NoAnswer:
            self._unanswered += 1
            if self._unanswered >= _MOST_UNANSWERED and self._board.is_gone:
                self._end(store_gone(self._wait(), self._seconds))
        if self._seconds > self._place.group.longest:
            self._end(timed_out(self._wait(), self._board.seen, self._seconds))
        if self._speaks and self._seconds >= self._next_word:
            self._next_word = self._seconds + self._board.patience.again
            self._say()

    def end(self) -> None:
        """Say that this rank goes on."""
        if self._told:
            with contextlib.suppress(NoAnswer):
                self._board.tell(notice(self._board, "works"))

    def explain(self, error: RuntimeError) -> RankError:
        """The error of a wait that the backend has given up: what the others say, or its words."""
        until = time.monotonic() + self._board.patience.grace
        while time.monotonic() < until:
            time.sleep(self._board.patience.look / 2)
            try:
                self._tell()
                self._end_if_vain(broken=True)
            except NoAnswer:
                pass
            except RankError as known:
                return known
        if self._board.is_gone:
            unknown = store_gone(self._wait(), self._seconds)
        elif "imed out" in str(error):
            unknown = timed_out(self._wait(), self._board.seen, self._seconds)
        else:
            unknown = lost(self._wait(), self._board.seen, str(error))
        give_up(self._board, unknown)
        return unknown

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _wait(self) -> Notice:
        return replace(
            notice(self._board, "waits"),
            group=self._place.group.key,
            members=self._place.group.ranks,
            number=self._place.number,
            what=str(self._place),
        )

    def _tell(self) -> None:
        if self._speaks and not self._told:
            self._board.tell(self._wait())
            self._told = True

    def _end_if_vain(self, *, broken: bool) -> None:
        verdict = judge(self._wait(), self._board.read(), self._seconds, broken=broken)
        seen_before = verdict is not None and verdict.evidence == self._evidence
        self._evidence = None if verdict is None else verdict.evidence
        if verdict is not None and (verdict.evidence is None or seen_before):
            self._end(verdict.error)

    def _end(self, error: RankError) -> None:
        give_up(self._board, error)
        raise error

    def _say(self) -> None:
        mine, notices = self._wait(), self._board.seen
        before = [r for r, n in notices.items() if n.does == "waits" and r < self._board.rank]
        if len(before) >= _MOST_VOICES:
            return  # they speak for those behind them
        where = f"has waited {self._seconds:.0f} s in {place(mine)}"
        if self._unanswered:
            told = "the job's store does not answer"
            if self._board.kept_by_first_rank:
                told += ": rank 0, which keeps it, is stopped or gone"
        else:
            told = f"it waits for {whom(mine, notices)}"
        say_of_this_rank(f"{where}; {told}")
