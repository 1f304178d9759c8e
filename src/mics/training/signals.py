"""A wish to stop: from a scheduler, Ctrl-C or Ctrl-\\ from a person, a closed terminal.

Schedulers send SIGTERM, and before it what they are asked to (Slurm's ``--signal=USR1@60``).
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from mics.ranks.starting import ASK_TO_END


class StopRequest:
    """While entered, those signals only set ``stop``; the loop saves and ends by itself.

    A launcher passes a signal on to ranks that the terminal has already told, so a second one is
    no more than the first. SIGHUP stays ignored where it is (nohup). Signals are handled in a
    program's first thread alone; in another, as Ray's, they are left to who started it.
    """

    def __init__(self) -> None:
        self.stop = False

    def __enter__(self) -> StopRequest:
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        before = {number: signal.getsignal(number) for number in ASK_TO_END}
        if before[signal.SIGHUP] is signal.SIG_IGN:
            del before[signal.SIGHUP]
        for number in before:
            signal.signal(number, self._ask)
        self._before = before
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.stop = True
