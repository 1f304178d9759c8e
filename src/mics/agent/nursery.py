"""The agent's side of ``zygote.py``: it has processes started, sees them end, and kills them.

[Note: whose number]
A process number may be another process's as soon as its owner is reaped. So processes are known by
descriptors, which the zygote opened before it could reap them.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from mics.agent.loop import Loop
from mics.agent.zygote import MOST_BYTES

_MOST_REPORT_BYTES = 1 << 16
_LONGEST_END = 2.0  # seconds; longer, and the other agents would take this one for dead


@dataclass(eq=False)
class Process:
    """A process that the zygote has been asked to start.

    Args:
        number: of the request.
        name: for people.
        local_rank: of a rank; ``None`` of a store.
        descriptor: of the process; ``None`` until it has started.
        pipe: on which it reports; ``None`` before and after.
        pid: its number.
        report: what it has reported: a port, or what it raised.
        seconds: that the fork took.
        asked: when it was asked for, on the monotonic clock.
        status: its exit code, or minus a signal; ``None`` until it has ended.
        doomed: whether the agent has killed it.
    """

    number: int
    name: str
    local_rank: int | None
    asked: float
    descriptor: int | None = None
    pipe: int | None = None
    pid: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    held: bytearray = field(default_factory=bytearray)
    seconds: float = 0.0
    status: int | None = None
    doomed: bool = False


class Parent(Protocol):
    """Who is told of processes."""

    def warmed(self, told: dict[str, Any]) -> None:
        """Processes can be started from now on."""

    def reported(self, process: Process) -> None:
        """A process has reported."""

    def ended(self, process: Process) -> None:
        """A process has ended, and is reaped."""

    def orphaned(self, processes: list[Process], why: str) -> None:
        """The zygote is gone, and these processes with it."""


class Nursery:
    """Starts processes through a zygote, and starts the zygote.

    Args:
        loop: where it waits.
        command: of the ranks.
        owner: is told.
    """

    def __init__(self, loop: Loop, command: list[str], owner: Parent) -> None:
        self._loop = loop
        self._command = command
        self._owner = owner
        self._zygote: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._processes: dict[int, Process] = {}
        self._numbers = 0
        self.is_ready = False
        """Whether processes can be started."""

    def open(self, *, warm: bool) -> None:
        """Start a zygote; ``warmed`` is called when it can be used."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [str(theirs.fileno()), str(os.getpid()), "warm" if warm else "cold"]
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "mics.agent.zygote", *words, *self._command],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            process_group=0,  # a terminal's ctrl-C is the agent's
        )
        theirs.close()
        self._control = ours
        self._loop.watch(ours, self._readable)

    def start_rank(self, local_rank: int, name: str, environment: dict[str, str]) -> Process:
        """Have a rank started."""
        return self._ask(name, local_rank, {"do": "rank", "environment": environment})

    def start_store(self, host: str) -> Process:
        """Have a store started, which listens at an address of this machine."""
        return self._ask("the store", None, {"do": "store", "host": host, "environment": {}})

    def kill(self, process: Process, number: int = signal.SIGKILL) -> None:
        """Send a signal to a process, at once when it has started."""
        if number == signal.SIGKILL:
            process.doomed = True
        if process.descriptor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process.descriptor, number)

    def close(self) -> None:
        """End the zygote, and with it what it has started."""
        if self._zygote is not None:
            self.drop()
        _wait_until_gone(self._processes.values())
        for process in [*self._processes.values()]:
            self._forget(process)

    def _ask(self, name: str, local_rank: int | None, request: dict[str, Any]) -> Process:
        assert self._control is not None and self.is_ready
        self._numbers += 1
        process = Process(self._numbers, name, local_rank, time.monotonic())
        self._processes[process.number] = process
        packet = json.dumps(request | {"number": process.number}).encode()
        assert len(packet) <= MOST_BYTES
        with contextlib.suppress(OSError):  # it is gone: the loop will see it
            self._control.send(packet)
        return process

    def _readable(self) -> None:
        assert self._control is not None
        try:
            packet, descriptors, *_ = socket.recv_fds(
                self._control, MOST_BYTES, 2, socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return
        except OSError:
            packet, descriptors = b"", []
        if not packet:
            self._lose("has died")
            return
        answer = json.loads(packet)
        if answer["said"] == "warm":
            self.is_ready = answer["threads"] == 1
            self._owner.warmed(answer)
        elif answer["said"] == "threads":
            self._lose(f"has {answer['number']} threads, with which nothing can be forked")
        elif answer["said"] == "started":
            self._started(self._processes[answer["number"]], answer, descriptors)
        else:
            process = self._processes.pop(answer["number"])
            process.status = answer["status"]
            self._read_report(process)
            self._forget(process)
            self._owner.ended(process)

    def _started(self, process: Process, answer: dict[str, Any], descriptors: list[int]) -> None:
        process.descriptor, process.pipe = descriptors
        process.pid, process.seconds = answer["pid"], answer["seconds"]
        os.set_blocking(process.pipe, False)
        self._loop.watch(process.pipe, lambda: self._read_report(process))
        if process.doomed:
            self.kill(process)

    def _read_report(self, process: Process) -> None:
        if process.pipe is None:
            return
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(process.pipe, _MOST_REPORT_BYTES)
            process.held += data[: _MOST_REPORT_BYTES - len(process.held)]
            if not data:
                self._close_pipe(process)
        if process.held.endswith(b"\n") and not process.report:
            with contextlib.suppress(ValueError):
                process.report = json.loads(process.held)
                self._owner.reported(process)

    def _close_pipe(self, process: Process) -> None:
        if process.pipe is not None:
            self._loop.forget(process.pipe)
            os.close(process.pipe)
            process.pipe = None

    def _forget(self, process: Process) -> None:
        self._close_pipe(process)
        if process.descriptor is not None:
            os.close(process.descriptor)
            process.descriptor = None

    def _lose(self, why: str) -> None:
        self.drop()
        lost = [*self._processes.values()]
        self._processes.clear()
        _wait_until_gone(lost)
        for process in lost:
            self._forget(process)
        self._owner.orphaned(lost, why)

    def drop(self) -> None:
        """End the zygote; nobody is told."""
        assert self._control is not None and self._zygote is not None
        self.is_ready = False
        self._loop.forget(self._control)
        self._control.close()
        self._zygote.kill()
        self._zygote.wait()
        self._zygote = None


def _wait_until_gone(processes: Iterable[Process]) -> None:
    """Wait for processes that the kernel has killed because their parent is gone."""
    poll, left = select.poll(), 0
    for process in processes:
        if process.descriptor is not None:
            poll.register(process.descriptor, select.POLLIN)
            left += 1
    until = time.monotonic() + _LONGEST_END
    while left and time.monotonic() < until:
        for descriptor, _ in poll.poll(100):
            poll.unregister(descriptor)
            left -= 1
