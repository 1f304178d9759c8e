"""Agents of ``mics run`` as processes of a test, with what they say and what their ranks write."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

SECONDS = 90.0
"""A hang, on a machine that is busy."""

COUNTS = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from mics.ranks.heartbeat import at_step, heart
from mics.ranks.issuing import all_reduce

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo")
rank, generation = dist.get_rank(), os.environ["MICS_GENERATION"]
heart().hold_in(2)
kept = folder / f"step-{rank}"
newest = torch.tensor(int(kept.read_text()) if kept.exists() else 0)
dist.all_reduce(newest, dist.ReduceOp.MIN)
step, first = int(newest), int(newest)
(folder / f"began-{generation}-{rank}").write_text(f"begins at {step}")
while step < steps:
    at_step(step + 1) if step == first else None
    heart().in_step(step - first + 1, 1)
    exec(os.environ.get("IN_STEP", ""))
    all_reduce(torch.ones(4), name="sum of the step")
    step += 1
    for path, number in ((kept, step), (folder / f"{generation}-{rank}", os.getpid())):
        unfinished = folder / f"unfinished_{rank}"  # seen whole, or not at all
        unfinished.write_text(str(number))
        unfinished.replace(path)
    time.sleep(0.05)
"""
"""A program that counts steps in files, and says in ``<generation>-<rank>`` who has made one."""


class Agent:
    """A process of ``mics run``.

    Args:
        words: behind ``mics run``.
        around: the words of a program that starts it.
        environment: more variables.
    """

    def __init__(
        self, words: Sequence[str], around: Sequence[str] = (), **environment: str
    ) -> None:
        self.process = subprocess.Popen(
            [*around, sys.executable, "-m", "mics", "run", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            self.said.extend(line.rstrip("\n") for line in iter(lines.readline, ""))

    def wait(self) -> int:
        """Its exit code."""
        code = self.process.wait(SECONDS)
        self._reader.join(5)
        return code

    def wait_for(self, text: str) -> str:
        """The first line that has this in it, once it has been said."""
        until(lambda: any(text in line for line in self.said), lambda: "\n".join(self.said))
        return next(line for line in self.said if text in line)

    @property
    def text(self) -> str:
        """All that was said."""
        return "\n".join(self.said)


def until(true: Callable[[], bool], told: Callable[[], str] = lambda: "") -> float:
    """Wait until something is true; returns the seconds that it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() < began + SECONDS, f"waited {SECONDS:g} s in vain\n{told()}"
        time.sleep(0.01)
    return time.monotonic() - began


@contextlib.contextmanager
def agents(*of_words: Sequence[str], **environment: str) -> Iterator[list[Agent]]:
    """Agents, which are killed at the end with all that they have started."""
    started = [Agent(words, **environment) for words in of_words]
    try:
        yield started
    finally:
        for agent in started:
            agent.process.kill()
            agent.process.wait()


def words_of_nodes(nodes: Sequence[str], token: Path, *options: str) -> list[list[str]]:
    """The options of an agent per node."""
    shared = ["--nodes", ",".join(nodes), "--token-file", str(token), *options]
    return [[*shared, "--node-index", str(index)] for index in range(len(nodes))]


def free_addresses(count: int) -> list[str]:
    """Addresses on loopback at which nobody listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{sock.getsockname()[1]}" for sock in sockets]
    for sock in sockets:
        sock.close()
    return addresses


def make_token(folder: Path, text: str = "a token that nobody knows") -> Path:
    """A secret that only its owner may read."""
    path = folder / f"token-{len(list(folder.glob('token-*')))}"
    path.touch(0o600)
    path.write_text(text)
    return path


def stepped(folder: Path, generation: int, world: int) -> Callable[[], bool]:
    """Tells whether every rank has made a step in a generation."""
    return lambda: all((folder / f"{generation}-{rank}").exists() for rank in range(world))


def pid_of(folder: Path, generation: int, rank: int) -> int:
    """The process of a rank that has made a step."""
    return int((folder / f"{generation}-{rank}").read_text())


def is_alive(pid: int) -> bool:
    """Whether a process runs: neither gone nor waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
