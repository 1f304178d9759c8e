"""A wish to stop: SIGTERM from a scheduler, Ctrl-C from a person."""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, SIGTERM and SIGINT only set ``stop``; the loop saves and ends by itself.

    A launcher passes a signal on to ranks that the terminal has already told, so a second one is
    no more than the first.
    """

    def __init__(self) -> None:
        self.stop = False

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.stop = True
