"""Addresses of names, asked for in a thread: a name server may take longer than a beat."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

Address = tuple[str, int]

_AT_ONCE_SECONDS = 0.05  # what numbers and files take


class Names:
    """Looks up where to call."""

    def __init__(self) -> None:
        self._found: dict[Address, tuple[socket.AddressFamily, Any]] = {}
        self._asked: dict[Address, threading.Thread] = {}

    def place(self, address: Address) -> tuple[socket.AddressFamily, Any] | None:
        """Where to call; ``None`` while that is not known. Every answer is used once."""
        asking = self._asked.get(address)
        if address not in self._found and (asking is None or not asking.is_alive()):
            asking = threading.Thread(target=self._ask, args=(address,), daemon=True)
            self._asked[address] = asking
            asking.start()
            asking.join(_AT_ONCE_SECONDS)
        return self._found.pop(address, None)

    def _ask(self, address: Address) -> None:
        with contextlib.suppress(OSError):
            family, *_, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
            self._found[address] = family, place
