"""What the agent waits for: sockets, pipes, processes and times, in one thread."""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable
from typing import Protocol

Call = Callable[[], None]


class HasFileno(Protocol):
    """A descriptor, or what has one."""

    def fileno(self) -> int:
        """The descriptor."""


class Loop:
    """Calls whoever waits for a descriptor or a time."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._regular: list[tuple[float, float, Call]] = []  # due, every so many seconds, call
        self.late = 0.0
        """Seconds by which the latest regular call was late: this process was held up."""

    def watch(self, file: HasFileno | int, readable: Call, writable: Call | None = None) -> None:
        """Call when something can be read, or with ``writable`` also when it can be written."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writable else 0)
        calls = (readable, writable)
        if self.watches(file):
            self._selector.modify(file, events, calls)
        else:
            self._selector.register(file, events, calls)

    def watches(self, file: HasFileno | int) -> bool:
        """Whether it is waited for."""
        return file in self._selector.get_map()

    def forget(self, file: HasFileno | int) -> None:
        """Wait for it no more; to be called before it is closed."""
        if self.watches(file):
            self._selector.unregister(file)

    def every(self, seconds: float, call: Call) -> None:
        """Call again and again, from now on."""
        self._regular.append((time.monotonic(), seconds, call))

    def turn(self) -> None:
        """Wait for the next thing to happen, and call for all that have happened."""
        first = min((due for due, *_ in self._regular), default=time.monotonic() + 1.0)
        found = self._selector.select(max(0.0, first - time.monotonic()))
        for key, events in found:
            readable, writable = key.data
            if self._selector.get_map().get(key.fd) is not key:
                continue  # one of the calls before has forgotten or changed it
            if events & selectors.EVENT_WRITE and writable is not None:
                writable()
            elif events & selectors.EVENT_READ:
                readable()
        now = time.monotonic()
        for at, (due, seconds, call) in enumerate(self._regular):
            if now >= due:
                self.late = now - due
                self._regular[at] = (now + seconds, seconds, call)
                call()

    def close(self) -> None:
        """End; the descriptors are their owners'."""
        self._selector.close()
