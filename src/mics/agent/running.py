"""One agent from its beginning to its end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mics.agent.folder import own_folder
from mics.agent.lasting import check_system
from mics.agent.settings import Settings
from mics.agent.supervising import Supervisor

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def run_agent(settings: Settings) -> int:
    """Run the ranks of this node until the job has ended.

    Returns:
        0 when all ranks of all nodes have ended with 0; else the exit code of the rank that failed
        last, 1 for other reasons, 128 and the signal's number after one.

    Raises:
        MicsError: this system cannot, or the address cannot be listened at.
    """
    check_system()
    with own_folder() as folder:
        agent = Supervisor(settings, folder)
        try:
            with _signals_to(agent):
                agent.open()
                while agent.code is None:
                    agent.loop.turn()
        finally:
            agent.close()
        return agent.code


@contextmanager
def _signals_to(agent: Supervisor) -> Iterator[None]:
    """Let the signals that would end this process wake it up, and be passed on."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    waiting: list[int] = []

    def come(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    def pass_on() -> None:
        ours.recv(64)
        while waiting:
            agent.ask_to_end(waiting.pop(0))

    before = {number: signal.getsignal(number) for number in _PASSED_ON}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # nohup
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, come)
    awake = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    agent.loop.watch(ours, pass_on)
    try:
        yield
    finally:
        signal.set_wakeup_fd(awake)
        for number, handler in before.items():
            signal.signal(number, handler)
        ours.close()
        theirs.close()
