"""The parent of a node's ranks: warmed once, with one thread, it forks them in milliseconds.

It runs as ``python -m mics.agent.zygote <descriptor> <agent> <warmth> <words>`` and takes one
request per packet of the socket: start a rank, start a store. It answers with the process's
descriptor and a pipe on which the process may report. It reaps, and kills what a rank has left in
its process group. It dies with the agent, and ranks die with it.

[Note: one thread]
A fork has the forking thread only, and whatever lock another one held stays locked for ever. So
the number of threads is read before every fork, and another number than 1 is answered with a
refusal: the agent then starts another parent.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mics.agent.keeper import keep_store
from mics.agent.lasting import end_with
from mics.agent.script import exit_code_of, run_as_main
from mics.agent.warming import become_a_rank, keep_to_one_thread, num_threads, warm
from mics.ranks.program import for_this_interpreter

MOST_BYTES = 1 << 16
"""The longest request or answer."""

_DEFAULT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)


@dataclass(frozen=True)
class _Child:
    number: int  # the agent's, of the request
    pid: int
    descriptor: int
    leads_a_group: bool


class _Zygote:
    """The parent of ranks.

    Args:
        control: the agent's end is the other one.
        command: of the ranks.
        forks: whether they are forked, rather than started as new programs.
        before: variables as they were before this process was warmed.
    """

    def __init__(
        self,
        control: socket.socket,
        command: list[str],
        before: Mapping[str, str | None],
        *,
        forks: bool,
    ) -> None:
        self._control = control
        self._command = command
        self._before = before
        self._forks = forks
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._children: dict[int, _Child] = {}

    def serve(self, told: dict[str, Any]) -> Callable[[], None]:
        """Do what the agent asks; returns in children only, with what they are to do.

        Args:
            told: what the agent is told first.
        """
        self._say(told)
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._reap(key.data)
                    continue
                packet = self._control.recv(MOST_BYTES)
                if not packet:
                    sys.exit(0)  # ranks end with this process
                work = self._start(json.loads(packet))
                if work is not None:
                    return work

    def _start(self, asked: dict[str, Any]) -> Callable[[], None] | None:
        if num_threads() != 1:
            self._say({"said": "threads", "number": num_threads()})
            return None
        began = time.monotonic()
        ours, theirs = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            return lambda: self._become(asked, parent, theirs)
        os.close(theirs)
        is_rank = asked["do"] == "rank"
        child = _Child(asked["number"], pid, os.pidfd_open(pid), is_rank)
        self._children[pid] = child
        self._selector.register(child.descriptor, selectors.EVENT_READ, child)
        started = {"said": "started", "number": child.number, "pid": pid}
        started["seconds"] = time.monotonic() - began
        self._say(started, [child.descriptor, ours])
        os.close(ours)
        return None

    def _reap(self, child: _Child) -> None:
        if child.leads_a_group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)  # its number is its own until it is reaped
        _, status = os.waitpid(child.pid, 0)
        self._selector.unregister(child.descriptor)
        os.close(child.descriptor)
        del self._children[child.pid]
        code = os.waitstatus_to_exitcode(status)
        self._say({"said": "ended", "number": child.number, "status": code})

    def _say(self, answer: dict[str, Any], descriptors: list[int] | None = None) -> None:
        socket.send_fds(self._control, [json.dumps(answer).encode()], descriptors or [])

    # -- in the child ----------------------------------------------------------------------------

    def _become(self, asked: dict[str, Any], parent: int, pipe: int) -> None:
        """Be a rank, or the keeper of a store, and end the process."""
        end_with(parent)
        for number in _DEFAULT:
            action = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if number == signal.SIGPIPE else action)
        self._control.close()
        self._selector.close()
        for child in self._children.values():
            os.close(child.descriptor)
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        os.environ.update(asked["environment"])
        if asked["do"] == "store":
            keep_store(asked["host"], pipe)
        os.setpgid(0, 0)
        words = for_this_interpreter(self._command) if self._forks else None
        if words is None:
            os.execvpe(self._command[0], self._command, os.environ)
        become_a_rank(int(os.environ["LOCAL_WORLD_SIZE"]))
        try:
            run_as_main(words)
        except BaseException as error:
            sys.exit(exit_code_of(error, pipe))
        sys.exit(0)


def _prepare(command: list[str], *, wanted: bool) -> tuple[dict[str, Any], bool]:
    """Warm this process; returns what to tell the agent, and whether ranks may be forked."""
    words, began = for_this_interpreter(command), time.monotonic()
    trouble = ""
    if wanted and words is not None:
        try:
            warm(words)
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        gc.collect()
        gc.freeze()  # nothing of it is moved to pages of a rank's own
    forks = wanted and words is not None and not trouble
    told = {"said": "warm", "forks": forks, "trouble": trouble, "threads": num_threads()}
    return told | {"seconds": time.monotonic() - began}, forks


def main() -> None:
    """Serve the agent that has started this process."""
    descriptor, agent, warmth, *command = sys.argv[1:]
    end_with(int(agent))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # they are the agent's, which passes them on
    control = socket.socket(fileno=int(descriptor))
    before = keep_to_one_thread()
    told, forks = _prepare(command, wanted=warmth == "warm")
    zygote = _Zygote(control, command, before, forks=forks)
    be = zygote.serve(told)
    be()


if __name__ == "__main__":
    main()
