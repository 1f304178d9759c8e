"""What this rank is in, what it has issued, and how its end is said: its side of the board.

An end is said by ``sys.excepthook``, by a finalizer of ``multiprocessing`` (which also runs where a
launcher of torch ends a process), or by whoever catches the last exception. A process that is
killed says nothing; the others see that it is gone, or that nothing is heard of it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import util as multiprocessing_util
from types import TracebackType

import torch.distributed as dist

from mics import compat
from mics.errors import RankError
from mics.ranks.board import Board, Does, NoAnswer, Notice, board_of_job, last_board
from mics.ranks.drawing import ranks_text
from mics.ranks.heartbeat import heart

_MOST_WORDS = 300  # characters of an exception that the others are told


class Counted:
    """The collectives that this rank has issued in one process group.

    Args:
        key: names the group, the same on all its ranks.
        ranks: of the group, by their numbers in the job.
        on_gloo: whether Gloo serves the host's tensors.
        longest: seconds that a wait may take.
    """

    def __init__(self, key: str, ranks: Sequence[int], *, on_gloo: bool, longest: float) -> None:
        self.key = key
        self.ranks = list(ranks)
        self.on_gloo = on_gloo
        self.longest = longest
        self.issued = 0


@dataclass
class _Now:
    during: str = ""
    step: int = 0
    watched: bool = False  # its end will be said
    ended: bool = False  # it has been
    tells_compilation: bool = False  # to who reads this rank's heartbeat
    around_compilation: int = 0  # what the heartbeat said before


_now = _Now()
_meetings: dict[str, Counted] = {}
_counted: weakref.WeakKeyDictionary[dist.ProcessGroup, Counted] = weakref.WeakKeyDictionary()


def counted(group: dist.ProcessGroup, timeout: timedelta | None = None) -> Counted:
    """What is counted of a process group.

    Args:
        group: one that this rank is in.
        timeout: of its waits; by default the job's, as ``init_process_group`` was given it, which
            torch does not pass on to groups made later.
    """
    found = _counted.get(group)
    if found is None:
        _watch_the_end()  # from here on this rank may be waited for
        ranks = dist.get_process_group_ranks(group)
        key = f"{group.group_name}: {ranks_text(ranks)}"
        on_gloo = "gloo" in dist.get_backend_config(group)
        found = _counted[group] = Counted(key, ranks, on_gloo=on_gloo, longest=_longest(timeout))
    return found


def _longest(timeout: timedelta | None) -> float:
    return (timeout or compat.timeout_of(world_group())).total_seconds()


def world_group() -> dist.ProcessGroup:
    """The group of all ranks."""
    world = dist.group.WORLD
    assert world is not None
    return world


def meeting(ranks: Sequence[int]) -> Counted:
    """What is counted of the meetings of some ranks, which make a group after each."""
    key = f"meeting: {ranks_text(ranks)}"
    if key not in _meetings:
        _watch_the_end()
        _meetings[key] = Counted(key, ranks, on_gloo=False, longest=_longest(None))
    return _meetings[key]


def passing(giver: int, taker: int) -> Counted:
    """What is counted of what one rank sends to another one, by their numbers in the job."""
    key = f"from {giver} to {taker}"
    if key not in _meetings:
        _watch_the_end()
        _meetings[key] = Counted(key, [giver, taker], on_gloo=True, longest=_longest(None))
    return _meetings[key]


# -- where it is ---------------------------------------------------------------------------------


@contextlib.contextmanager
def during(call: str) -> Iterator[None]:
    """Let waits inside be known by a call of mics, such as ``mics.save``."""
    before, _now.during = _now.during, call
    mine = heart()
    seen_before = mine.enter(call) if mine is not None else 0
    try:
        yield
    finally:
        _now.during = before
        if mine is not None:
            mine.leave(seen_before)


def in_step(step: int, micro_step: int) -> None:
    """Let waits from now on be known by a micro-step; both count from 1."""
    _now.during, _now.step = f"micro-step {micro_step} of step {step}", step
    mine = heart()
    if mine is None:
        return
    if not _now.tells_compilation:
        _now.tells_compilation = True  # by now FSDP2 has loaded what compiles
        compat.watch_compilation(_compilation_begins, _compilation_ends)
    mine.in_step(step, micro_step)


def _compilation_begins() -> None:
    mine = heart()
    if mine is not None:
        _now.around_compilation = mine.enter("compilation")


def _compilation_ends() -> None:
    mine = heart()
    if mine is not None:
        mine.leave(_now.around_compilation)


def out_of_step() -> None:
    """Let waits from now on be known to come after the step."""
    if _now.step:
        _now.during, _now.step = f"after step {_now.step}", 0


def notice(board: Board, does: Does) -> Notice:
    """What this rank says of itself now."""
    issued = {one.key: one.issued for one in [*_counted.values(), *_meetings.values()]}
    return replace(board.mine, does=does, during=_now.during, step=_now.step, issued=issued)


# -- how it ends ---------------------------------------------------------------------------------


def leave_step() -> None:
    """Say that this rank has left its step before the end, for those who wait for it there."""
    board = board_of_job()
    if board is not None and not _now.ended:
        with contextlib.suppress(NoAnswer):
            error = sys.exc_info()[1]
            by = "" if error is None or isinstance(error, GeneratorExit) else _words(error)
            board.tell(replace(notice(board, "has left"), what=by))
    _now.step = 0  # what it is in stays as it is, for the words of an error that is on its way


def give_up(board: Board, error: RankError) -> None:
    """Say that this rank ends its wait with an error, which the others may end with too."""
    _now.ended = True
    words = [error.what, error.numbers, error.write]
    with contextlib.suppress(NoAnswer):
        board.tell(replace(notice(board, "has given up"), error=words))


def say_failure(error: BaseException) -> None:
    """Say that this rank ends by an exception that nobody will catch."""
    _end("has failed", _words(error))


def _words(error: BaseException) -> str:
    words = f"{type(error).__name__}: {str(error).strip()}" if str(error) else type(error).__name__
    return words if len(words) <= _MOST_WORDS else words[:_MOST_WORDS] + " ..."


def _end(does: Does, words: str = "") -> None:
    board = last_board()
    if board is None or _now.ended or board.mine.process != os.getpid():
        return
    _now.ended = True
    with contextlib.suppress(NoAnswer):
        board.tell(replace(notice(board, does), what=words))
        until = time.monotonic() + 3 * board.patience.look
        # The board goes with the rank that keeps it: let the others read, or end as well.
        while board.rank == 0 and board.kept_by_first_rank and time.monotonic() < until:
            if all(_is_at_its_end(other) for other in board.read().values()):
                return
            time.sleep(board.patience.look / 10)


def _is_at_its_end(notice: Notice) -> bool:
    return notice.does in ("has ended", "has failed", "has given up")


def _watch_the_end() -> None:
    """Say how this process ends, once there is somebody to be told."""
    if board_of_job() is None or _now.watched:
        return
    _now.watched = True
    before = sys.excepthook

    def on_exception(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        say_failure(error)
        before(kind, error, trace)

    sys.excepthook = on_exception
    multiprocessing_util.Finalize(None, _end, args=("has ended",), exitpriority=100)
