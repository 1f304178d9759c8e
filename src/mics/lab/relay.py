"""Cables that take time: ``python -m mics.lab.relay <lab> <nodes> <milliseconds>``.

For kernels without netem. For every node it joins a TAP device in its namespace and one at the
switch. A frame read from one end is written to the other when it has been under way for the
latency; both ends are shaped as any cable's. The process lives in the switch's namespace, so it
ends with the lab. It says "ready" when all cables are there.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_FRAME = 65_536
_WAITING = 4_096  # frames under way per direction; more are dropped, as a full switch does

NODE_END, SWITCH_END = "eth0", "port"


class Direction:
    """Frames from one end of a cable to the other."""

    def __init__(self, source: int, target: int, latency: float) -> None:
        self.source = source
        self._target = target
        self._latency = latency
        self._under_way: deque[tuple[float, bytes]] = deque()

    def take(self, now: float) -> None:
        """Read what has come; it is due after the latency."""
        while True:
            try:
                frame = os.read(self.source, _FRAME)
            except BlockingIOError:
                return
            except OSError:  # the cable is cut at this end
                return
            if len(self._under_way) < _WAITING:
                self._under_way.append((now + self._latency, frame))

    def deliver(self, now: float) -> float | None:
        """Write what is due; returns when the next frame is."""
        while self._under_way and self._under_way[0][0] <= now:
            _, frame = self._under_way.popleft()
            try:
                os.write(self._target, frame)
            except OSError:  # cut, or full: lost without a word
                continue
        return self._under_way[0][0] if self._under_way else None


def relay(directions: Sequence[Direction]) -> None:
    """Carry frames for ever."""
    by_source = {direction.source: direction for direction in directions}
    due: float | None = None
    while True:
        # select counts in microseconds; poll and epoll round up to milliseconds.
        wait = None if due is None else max(0.0, due - time.monotonic())
        for source in select.select(by_source, [], [], wait)[0]:
            by_source[source].take(time.monotonic())
        now = time.monotonic()
        nexts = [direction.deliver(now) for direction in directions]
        due = min((at for at in nexts if at is not None), default=None)


def open_tap(name: str) -> int:
    """Make a TAP device in this thread's network namespace; it goes when this is closed."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return descriptor


def open_tap_in(namespace: str, name: str) -> int:
    """Make a TAP device in a named network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(Path("/run/netns") / namespace, os.O_RDONLY)
    try:
        _set_namespace(libc, there)
        try:
            return open_tap(name)
        finally:
            _set_namespace(libc, here)
    finally:
        os.close(here)
        os.close(there)


def _set_namespace(libc: ctypes.CDLL, descriptor: int) -> None:
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main(words: Sequence[str]) -> None:
    """Make the cables of a lab and carry their frames."""
    prefix, nodes, latency = words[0], int(words[1]), float(words[2]) / 1e3
    directions = []
    for index in range(nodes):
        node = open_tap_in(f"{prefix}node{index}", NODE_END)
        switch = open_tap(f"{SWITCH_END}{index}")
        directions += [Direction(node, switch, latency), Direction(switch, node, latency)]
    print("ready", flush=True)
    relay(directions)


if __name__ == "__main__":
    main(sys.argv[1:])
