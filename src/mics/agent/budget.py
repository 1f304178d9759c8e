"""Whether to go on after a failure: restarts per time, and steps that kill whoever tries them."""

from __future__ import annotations

import signal
from collections import deque
from dataclasses import dataclass

SAME_STEP = 3
"""So many failures of one kind in one step, one after the other, and the job stops."""

SAME_NODE = 3
"""So many failures of one node, one soon after the other, and the node drops out if it may."""

GROWTH = "growth"
"""The cause of an end that is no failure: more nodes can have ranks."""

LOST = "lost"
"""The cause of an end where a node was lost."""

_FEW_STEPS = 10  # from one failure to the next that follows soon
_SOON_SECONDS = 60.0  # where no steps are told


@dataclass(frozen=True)
class Failure:
    """Why a generation ended.

    Args:
        what: for people, as in "rank 3 was killed by SIGSEGV".
        rank: that failed; ``None`` where it was no rank.
        node: of that rank, or the one that was lost.
        cause: alike for failures of one kind: a signal's name, an exception's, an exit code.
        step: that the rank was in, from 1; 0 before the first; ``None`` if it tells nobody.
        where: the rest of its whereabouts, for people.
        code: the exit code that the job has if this was its last failure.
        words: the rank's own: a traceback.
    """

    what: str
    rank: int | None = None
    cause: str = ""
    step: int | None = None
    where: str = ""
    code: int = 1
    words: str = ""
    node: int | None = None

    @property
    def kind(self) -> tuple[object, ...] | None:
        """Alike for failures that a restart does not help against; ``None`` where it may.

        A rank that is killed from outside is killed because of itself only if it is always the
        same rank in the same step. Where no step is known, such a death says nothing.
        """
        killed = self.cause in ("SIGKILL", "SIGTERM", "hung")
        if self.rank is None or (killed and not self.step):
            return None
        return (self.step or 0, self.cause, self.rank if killed else None)


class Budget:
    """The failures of a job so far.

    Args:
        restarts: that are allowed within the window.
        window: seconds.
    """

    def __init__(self, restarts: int, window: float) -> None:
        self._restarts = restarts
        self._window = window
        self._times: deque[float] = deque()
        self._alike: list[Failure] = []
        self._row: list[tuple[float, Failure]] = []  # of one node, one soon after the other
        self._let_go: dict[tuple[object, ...], int | None] = {}  # what made nodes drop out
        self._counted = True
        self.blamed: int | None = None
        """The node whose ranks were the first to fail again and again, by the latest failure."""

    def spend(self, failure: Failure, now: float, *, spared: bool = False) -> str | None:
        """Count a failure.

        Args:
            failure: that ended a generation.
            now: on the monotonic clock.
            spared: whether the job has nodes to spare for it, so that it does not count.

        Returns:
            ``None`` if the job may begin again, else why not, for people.
        """
        self.blamed = None
        self._counted = failure.cause != GROWTH and not spared
        if not self._counted:
            return None
        self._times.append(now)
        self._count_node(failure, now)
        while self._times[0] <= now - self._window:
            self._times.popleft()
        if self._alike and self._alike[-1].kind != failure.kind:
            self._alike = []
        self._alike.append(failure)
        if (
            failure.kind is not None
            and self._let_go.get(failure.kind, failure.node) != failure.node
        ):
            self.blamed = None
            return f"{_verdict(failure)}, and after that on another node"
        if failure.kind is not None and len(self._alike) >= SAME_STEP:
            return _verdict(failure)
        if len(self._times) > self._restarts:
            return (
                f"{len(self._times)} failures within {self._window:g} s, and --restarts "
                f"{self._restarts} allows as many restarts"
            )
        return None

    def _count_node(self, failure: Failure, now: float) -> None:
        if self._row:
            before, last = self._row[-1]
            if (
                failure.node != last.node
                or failure.cause == LOST
                or not _soon(last, failure, now - before)
            ):
                self._row = []
        self._row.append((now, failure))
        if failure.node is not None and failure.cause != LOST and len(self._row) >= SAME_NODE:
            self.blamed = failure.node

    def let_go(self) -> None:
        """The node that is blamed drops out, and what it has cost does not count.

        A step that kills another one too is the program's.
        """
        last, its = self._row[-1][1], {at for at, _ in self._row}
        self._times = deque(at for at in self._times if at not in its)
        self._counted = False
        if last.step and last.kind is not None:
            self._let_go[last.kind] = last.node
        self._alike = []

    @property
    def spent(self) -> str:
        """How much of it is used, for people; nothing where the latest failure does not count."""
        if not self._counted:
            return ""
        return f", restart {len(self._times)} of {self._restarts} within {self._window:g} s"


def _soon(last: Failure, failure: Failure, seconds: float) -> bool:
    """Whether hardly anything was done between two failures."""
    if last.step and failure.step:
        return failure.step - last.step < _FEW_STEPS
    return failure.step == 0 or seconds < _SOON_SECONDS


def describe_end_of_node(what: str) -> str:
    """Say why a node drops out, and what to do.

    Args:
        what: the latest of its failures.
    """
    return (
        f"its ranks were the first to fail {SAME_NODE} times in a row, the last time: {what}. The "
        "others go on without it. When the node is mended, end the agent there and start it again"
    )


def _verdict(failure: Failure) -> str:
    if failure.step:
        place = f"step {failure.step} kills"
    elif failure.step == 0:
        place = "what comes before the first step kills"
    else:
        place = "the program kills"
    how = f"with {failure.cause}" if failure.cause else ""
    return f"{place} rank {failure.rank} {how}: {SAME_STEP} times in a row"


def describe_exit(status: int) -> tuple[str, str, int]:
    """Say how a process ended: in words, as a cause, and as an exit code of a shell.

    Args:
        status: an exit code, or minus the number of a signal.
    """
    if status >= 0:
        return f"ended with exit code {status}", f"exit code {status}", status
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was killed by {name}", name, 128 - status
