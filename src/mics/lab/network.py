"""Namespaces, cables and a switch: built, shaped, cut, read, taken down."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from mics.errors import LabError
from mics.lab.relay import NODE_END, SWITCH_END
from mics.lab.state import PREFIX, Lab
from mics.lab.system import call, call_json, find_program
from mics.quantities import parse_milliseconds, parse_rate

_BRIDGE = "br0"
_MTU = 9000  # jumbo frames, as between the nodes of a cluster: headers are 1 % instead of 7
_BUFFER_SECONDS = 0.02  # how long a packet may wait in the switch before it is dropped,
_BUFFER_BYTES = 2**18  # unless the link is so slow that few packets could
_OWN_PACKETS = 1000  # of a node wait for its cable, Linux' txqueuelen: a NIC drops none of its host
_OURS = re.compile(rf"{PREFIX}([a-z0-9]{{1,8}})-(?:switch|node\d+)")
_SWEEPS = 50  # through a namespace whose processes start others while they are killed


def bits_per_second(rate: str) -> float:
    """Read the rate of a link, such as ``200mbit``.

    Raises:
        LabError: it is none.
    """
    bits = parse_rate(rate)
    if bits is None:
        raise LabError(f"{rate!r} is no rate of a link.", write="--link 200mbit, or 1gbit")
    return bits


def milliseconds(text: str) -> float:
    """Read a latency, such as ``0.5ms``.

    Raises:
        LabError: it is none.
    """
    latency = parse_milliseconds(text)
    if latency is None:
        raise LabError(f"{text!r} is no latency.", write="--latency 0.5ms")
    return latency


def build(lab: Lab) -> None:
    """Make the switch and the nodes; each cable is shaped in both directions.

    Raises:
        LabError: ``ip`` or ``tc`` failed.
    """
    call("ip", "netns", "add", lab.switch)
    _inside(lab.switch, "link", "set", "lo", "up")
    _inside(lab.switch, "link", "add", _BRIDGE, "type", "bridge", "forward_delay", "0")
    _inside(lab.switch, "link", "set", _BRIDGE, "mtu", str(_MTU), "up")
    for index in range(lab.nodes):
        call("ip", "netns", "add", lab.node(index))
        _inside(lab.node(index), "link", "set", "lo", "up")
    if lab.latency_ms:
        _start_relay(lab)
    for index in range(lab.nodes):
        if not lab.latency_ms:
            _add_cable(lab, index)
        _connect(lab, index)


def _add_cable(lab: Lab, index: int) -> None:
    # Both ends are made inside namespaces: the machine's own has no part in this.
    _inside(
        lab.switch,
        *("link", "add", _port(index), "type", "veth"),
        *("peer", "name", NODE_END, "netns", lab.node(index)),
    )


_relays: dict[str, subprocess.Popen[str]] = {}  # those that this process has started


def _start_relay(lab: Lab) -> None:
    """Start the process at which cables that take time end, see ``relay.py``."""
    words = [sys.executable, "-m", "mics.lab.relay"]
    words += [lab.node(0).removesuffix("node0"), str(lab.nodes), str(lab.latency_ms)]
    process = subprocess.Popen(
        [find_program("ip") or "ip", "netns", "exec", lab.switch, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"MICS_LAB": lab.name},
        start_new_session=True,
    )
    _relays[lab.name] = process
    assert process.stdout is not None and process.stderr is not None
    if process.stdout.readline() != "ready\n":
        last = (process.stderr.read().strip() or "it said nothing").splitlines()[-1]
        raise LabError(
            "The relay that delays the frames of this lab could not start.",
            numbers=last,
            write="without --latency; a relay needs to open /dev/net/tun",
        )


def _connect(lab: Lab, index: int) -> None:
    """Address both ends of a node's cable, shape them and bring them up."""
    node, port = lab.node(index), _port(index)
    _inside(lab.switch, "link", "set", port, "master", _BRIDGE)
    _inside(node, "address", "add", f"{lab.address(index)}/24", "dev", NODE_END)
    for namespace, interface in ((lab.switch, port), (node, NODE_END)):
        # Without gso_max_size packets of 64 kB pass as one, and a small bucket would drop them.
        _inside(namespace, "link", "set", interface, "mtu", str(_MTU), "gso_max_size", str(_MTU))
        _shape(namespace, interface, lab.link)
        _inside(namespace, "link", "set", interface, "up")


def _shape(namespace: str, interface: str, rate: str) -> None:
    bytes_per_second = bits_per_second(rate) / 8
    burst = max(2 * _MTU, round(bytes_per_second / 250))  # 4 ms: the clock of old kernels
    limit = max(_BUFFER_BYTES, round(bytes_per_second * _BUFFER_SECONDS))
    if interface == NODE_END:
        limit = max(limit, _OWN_PACKETS * _MTU)
    call(
        *("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root", "tbf"),
        *("rate", rate, "burst", str(burst), "limit", str(limit)),
    )


def take_down(lab: Lab) -> None:
    """Remove a lab's namespaces, what runs in them first; what is not there is no error."""
    for name in namespaces():
        if lab_of(name) == lab.name:
            _end_namespace(name)
    if lab.name in _relays:
        with _relays.pop(lab.name):  # closes its pipes and waits for it
            pass


def lab_of(namespace: str) -> str | None:
    """Return the name of the lab a namespace is of; ``None`` if it is no lab's."""
    match = _OURS.fullmatch(namespace)
    return match[1] if match else None


def _end_namespace(name: str) -> None:
    """Kill what runs in a namespace, and what that starts meanwhile; then remove it."""
    try:
        for _ in range(_SWEEPS):
            running = processes(name)
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not running:
                break
            time.sleep(0.02)
        call("ip", "netns", "delete", name)
    except LabError:
        if name in namespaces():  # else somebody else has just taken it down
            raise


def namespaces() -> list[str]:
    """List the named network namespaces of this machine."""
    return [entry["name"] for entry in call_json("ip", "-j", "netns", "list")]


def processes(namespace: str) -> list[int]:
    """List the processes in a namespace."""
    return [int(pid) for pid in call("ip", "netns", "pids", namespace).split()]


def set_link(lab: Lab, index: int, *, up: bool) -> None:
    """Plug a node's cable in at the switch, or pull it out: packets are lost without a word."""
    _inside(lab.switch, "link", "set", _port(index), "up" if up else "down")


def link_is_up(lab: Lab, index: int) -> bool:
    """Tell whether a node's cable is plugged in."""
    shown = call_json("ip", "-n", lab.switch, "-j", "link", "show", _port(index))
    return "UP" in shown[0]["flags"]


@dataclass(frozen=True)
class Traffic:
    """What the kernel counted at a node's interface, in bytes, protocol headers included."""

    sent: int
    received: int

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(self.sent - before.sent, self.received - before.received)


def traffic(lab: Lab) -> list[Traffic]:
    """Read the counters of every node since it was made."""
    counted = []
    for index in range(lab.nodes):
        shown = call_json("ip", "-n", lab.node(index), "-s", "-j", "link", "show", NODE_END)
        counters = shown[0]["stats64"]
        counted.append(Traffic(counters["tx"]["bytes"], counters["rx"]["bytes"]))
    return counted


def _inside(namespace: str, *words: str) -> None:
    call("ip", "-n", namespace, *words)


def _port(index: int) -> str:
    return f"{SWITCH_END}{index}"
