"""What this rank has sent by TCP, and how fast, as the kernel counts it per connection.

Gloo's connections and those of NCCL's socket transport are this process' own, so they are found
among its open files, and nothing has to be sent, or waited for, to ask about them. What goes over
other networks (NVLink, InfiniBand, EFA) is in no such count.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import time
import zlib
from collections.abc import Iterator

from mics.ranks.times import Sent

_FILES = "/proc/self/fd"
_TCP_INFO = getattr(socket, "TCP_INFO", None)
# Linux's struct tcp_info, which only grows: tcpi_bytes_acked (4.1) and tcpi_busy_time (4.10).
_ACKED, _BUSY = struct.Struct("=120xQ"), struct.Struct("=168xQ")
_SHARE = 5e-4  # of the time that may be spent here


class Sockets:
    """Differences between two looks at this process' connections."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[int, int]] = {}
        self._not_before = 0.0

    def sent(self) -> list[Sent]:
        """What was sent since the last call, by address, most bytes first.

        Nothing is said where the system does not tell, and where telling would take too long yet:
        a rank of a large job has thousands of connections.
        """
        if time.monotonic() < self._not_before:
            return []
        began = time.thread_time()  # a machine that is busy with other things is no reason to wait
        now: dict[str, tuple[int, int]] = {}
        total: dict[tuple[int, int], tuple[int, int]] = {}
        for key, source, target, acked, busy in _connections():
            now[key] = acked, busy
            acked_before, busy_before = self._before.get(key, (0, 0))
            size, spent = total.get((source, target), (0, 0))
            total[source, target] = size + acked - acked_before, spent + busy - busy_before
        self._before = now
        self._not_before = time.monotonic() + (time.thread_time() - began) / _SHARE
        sent = [Sent(a, b, float(size), spent / 1e6) for (a, b), (size, spent) in total.items()]
        return sorted(sent, key=lambda one: -one.num_bytes)


def _connections() -> Iterator[tuple[str, int, int, int, int]]:
    """Key, source, target, bytes acknowledged and microseconds busy of every connection."""
    # A default timeout would be set on sockets that are not ours.
    if _TCP_INFO is None or socket.getdefaulttimeout() is not None:
        return
    try:
        names = os.listdir(_FILES)  # noqa: PTH208  (a path object each would double the time)
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError):  # closed meanwhile, or not connected
            key = os.readlink(f"{_FILES}/{name}")  # noqa: PTH115
            if not key.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                if one.type != socket.SOCK_STREAM:
                    continue
                source, target = one.getsockname()[0], one.getpeername()[0]
                if source == target:
                    continue
                info = one.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
            if len(info) >= _BUSY.size:
                acked, busy = _ACKED.unpack_from(info)[0], _BUSY.unpack_from(info)[0]
                yield key, _number(source), _number(target), acked, busy


def _number(address: str) -> int:
    """An address as a number that a double holds exactly."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    short = getattr(parsed, "ipv4_mapped", None) or parsed
    if short.version == 4:
        return int(short)
    return 2**32 + zlib.crc32(short.packed)
