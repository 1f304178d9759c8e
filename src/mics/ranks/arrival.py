"""Waiting for others with an end, and with a word about whom from the tenth second on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from mics.ranks.console import write

PATIENCE_SECONDS = 10.0
"""Whoever waits this long says for whom."""


class Waiting:
    """One wait of at most ``seconds``: asks again and again, and is not silent about it.

    Args:
        seconds: when the wait is over.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._began = time.monotonic()
        self._due = PATIENCE_SECONDS

    @property
    def left(self) -> float:
        """Seconds until it is over; 0 when it is."""
        return max(0.0, self._began + self.seconds - time.monotonic())

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
