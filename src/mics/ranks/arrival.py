"""Waiting for others with an end, and with a word about whom from the tenth second on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from mics.ranks.console import write

PATIENCE_SECONDS = 10.0
"""Whoever waits this long says for whom."""

_FIRST_PAUSE, _LONGEST_PAUSE = 2e-3, 0.2  # seconds between two questions


class Waiting:
    """One wait of at most ``seconds``: asks again and again, and is not silent about it.

    Args:
        seconds: when the wait is over.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._began = time.monotonic()
        self._due = PATIENCE_SECONDS
        self._pause = _FIRST_PAUSE

    @property
    def left(self) -> float:
        """Seconds until it is over; 0 when it is."""
        return max(0.0, self._began + self.seconds - time.monotonic())

    def pause(self) -> None:
        """Sleep until it is time to ask again: at once in the beginning, then less and less often.

        Ranks that begin again together are there within milliseconds.
        """
        time.sleep(self._pause)
        self._pause = min(1.5 * self._pause, _LONGEST_PAUSE)

    def tell(self, words: Callable[[], str]) -> None:
        """Say what is waited for, when that is due: after 10 s, 20 s, 40 s and so on.

        It is this process that waits, so it is this process that says so.

        Args:
            words: returns who waits for whom; called only when it is said.
        """
        waited = time.monotonic() - self._began
        if waited >= self._due:
            self._due *= 2
            write(f"mics: {words()} ({waited:.0f} s of {self.seconds:g} s)", sys.stderr)
