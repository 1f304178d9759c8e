"""The network interface on which the ranks of a job listen: never more than they need.

Ranks of one machine listen on the loopback interface. Ranks of several nodes listen on the one that
GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name, or else on the one from which rank 0 is reached.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from mics.errors import MicsError
from mics.ranks.launcher import Launch

LOOPBACK = "127.0.0.1"
_OF_BACKENDS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_FAR_AWAY = ("198.51.100.1", "2001:db8::1")  # for documentation (RFC 5737, 3849): nothing is sent
_SIOCGIFCONF = 0x8912  # linux/sockios.h
_IFREQ_BYTES, _MOST_ADDRESSES = 40, 256


@dataclass(frozen=True)
class Door:
    """Where this rank listens: an address of its own, and the interface that has it, if known."""

    address: str
    interface: str | None


def door_of(launch: Launch, master: str) -> Door:
    """Choose where this rank listens.

    Args:
        launch: where this rank stands.
        master: the host of rank 0.

    Raises:
        MicsError: this machine has no address that other nodes could reach.
    """
    if launch.one_node or is_loopback(master):
        return Door(LOOPBACK, loopback())
    address = _own_address(master)
    return Door(address, interface_of(address))


def listen_on(door: Door) -> None:
    """Let the backends listen on an interface only, unless the user has named one."""
    if door.interface is not None:
        for variable in _OF_BACKENDS:
            os.environ.setdefault(variable, door.interface)


def listen_on_loopback() -> list[str]:
    """Keep the backends' sockets off the network. For ranks that are all started here.

    Returns:
        Variables of the user's that name another interface, and are not followed.

    Raises:
        MicsError: this machine has no loopback interface.
    """
    name = loopback()
    overruled = [f"{v}={os.environ[v]}" for v in _OF_BACKENDS if os.environ.get(v, name) != name]
    for variable in _OF_BACKENDS:
        os.environ[variable] = name
    return overruled


def loopback() -> str:
    """Return the name of the loopback interface.

    Raises:
        MicsError: there is none.
    """
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if not names:
        raise MicsError(
            "This machine has no loopback interface on which its ranks could meet.",
            numbers=f"Its interfaces are {', '.join(n for _, n in socket.if_nameindex())}.",
            write="ip link set lo up, or a container with a network",
        )
    return names[0]


def is_loopback(host: str) -> bool:
    """Whether a host is written as this machine itself: an address 127.x or ::1, or localhost."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host in ("localhost", "localhost.localdomain")


def _own_address(master: str) -> str:
    """Return the address of this machine from which rank 0 is reached.

    A machine may know its own name as a loopback address; then others do not reach it there.
    """
    named = os.environ.get(_OF_BACKENDS[0])
    of_named = [address for name, address in _addresses() if name == named]
    found = [_towards(master), *of_named, *map(_towards, _FAR_AWAY)]
    for address in found:
        if address is not None and not is_loopback(address):
            return address
    raise MicsError(
        "This machine has no address at which other nodes could reach it.",
        numbers=f"MASTER_ADDR = {master}; there is no route to it.",
        write="MASTER_ADDR=<address of rank 0> and GLOO_SOCKET_IFNAME=<interface to it>",
    )


def _towards(host: str) -> str | None:
    """Return the own address on the way to a host; ``None`` where there is none. Sends nothing."""
    with contextlib.suppress(OSError):
        for family, *_, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as way:
                way.connect(address)
                own: str = way.getsockname()[0]
                return own
    return None


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has an address; ``None`` if it cannot be told."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    for name, own in _addresses():
        if ipaddress.ip_address(own) == wanted:
            return name
    return None


def _addresses() -> list[tuple[str, str]]:
    """List interfaces and their addresses, as Linux tells them; elsewhere there is no list."""
    if sys.platform != "linux":
        return []
    import array
    import fcntl

    room = array.array("B", bytes(_IFREQ_BYTES * _MOST_ADDRESSES))
    at, size = room.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        told = fcntl.ioctl(asked, _SIOCGIFCONF, struct.pack("iL", size, at))
    (used,) = struct.unpack_from("i", told)
    found = []
    for start in range(0, used, _IFREQ_BYTES):
        entry = room[start : start + _IFREQ_BYTES].tobytes()
        name = entry[:16].split(b"\0")[0].decode().partition(":")[0]
        found.append((name, socket.inet_ntoa(entry[20:24])))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            found.append((name, str(ipaddress.ip_address(bytes.fromhex(digits)))))
    return found
