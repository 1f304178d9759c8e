"""When ``keep`` may be called, and with which step."""

from __future__ import annotations

import operator
from collections.abc import Callable

from mics.errors import RecoveryError
from mics.ranks.heartbeat import at_step, end_step, keep_steps, rest, wind_up


class Turns:
    """The order of calls: open, restored, kept step by step, closed.

    Args:
        every: so many steps one is kept.
        finish: ends what is written beside the program, on this rank alone.
    """

    def __init__(self, every: int, finish: Callable[[], None]) -> None:
        self._every, self._finish = every, finish
        self.last = 0  # the step that was kept last, or gone back to
        self.begun = False
        self.closed = False

    def begin(self, step: int) -> None:
        """Something was restored, or nothing found."""
        self.begun, self.last = True, step
        keep_steps(self._finish)
        at_step(step + 1)

    def next(self, given: int) -> int:
        """The step that is to be kept now.

        Raises:
            RecoveryError: it is none, or not its turn.
        """
        self.check_open()
        try:
            step = operator.index(given)
        except TypeError:
            raise RecoveryError(
                "keep takes how many steps have been done.",
                numbers=f"It is a {type(given).__name__}.",
                write="step = snapshots.keep(step + 1)",
            ) from None
        if not self.begun:
            raise RecoveryError(
                "keep was called before restore, so that states of an attempt before would be "
                "taken for newer ones.",
                write="step = snapshots.restore() before the first step; it returns 0 in a new job",
            )
        if step <= self.last:
            raise RecoveryError(
                "keep was called with a step that has been kept already.",
                numbers=f"step = {step}, after {self.last}.",
                write="step = snapshots.keep(step + 1) once per step",
            )
        self.last = step
        end_step(step, kept=step % self._every == 0)
        return step

    def end(self) -> None:
        """A step is being kept: pause here, if nodes that are back wait for that."""
        rest()

    def close(self) -> None:
        """All is done."""
        self.closed = True
        keep_steps(None)
        wind_up()

    def check_open(self) -> None:
        """Raise behind the end.

        Raises:
            RecoveryError: it is.
        """
        if self.closed:
            raise RecoveryError(
                "These snapshots have been closed, and what they kept is removed.",
                numbers=f"The last step was {self.last}.",
                write="snapshots.close() behind the last step, or new mics.Snapshots(...)",
            )
