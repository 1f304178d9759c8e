"""Runs of ``tests/survivor.py`` that a benchmark disturbs, and what is to be known of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SURVIVOR = Path(__file__).parents[1] / "tests" / "survivor.py"
RUN = [sys.executable, "-m", "mics", "run", "--restarts", "1000"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "100"]
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it no new agent of torchrun joins: its first round alone is told where ranks meet."""


@dataclass(frozen=True)
class Line:
    """A step that a rank has done."""

    step: int
    bits: str
    at: float


def lines(folder: Path, rank: int) -> list[Line]:
    rows = (folder / f"losses.{rank}").read_text().splitlines() if folder.exists() else []
    return [Line(int(s), bits, float(at)) for s, bits, _, at in (row.split() for row in rows)]


def bits_that_differ(folder: Path, wanted: Path, ranks: int) -> int:
    """Losses, repeated ones too, and final states that are not those of the undisturbed run."""
    differ = 0
    for rank in range(ranks):
        right = {line.step: line.bits for line in lines(wanted, rank)}
        done = lines(folder, rank)
        differ += sum(line.bits != right[line.step] for line in done)
        differ += len(right.keys() - {line.step for line in done})
        differ += (folder / f"final.{rank}").read_text() != (wanted / f"final.{rank}").read_text()
    return differ


def after(folder: Path, ranks: int, killed: float) -> tuple[float, int] | None:
    """Seconds from a kill until every rank has done a step again, and finished steps repeated."""
    done, before, resumed = [], [], []
    for rank in range(ranks):
        rows = [row.split() for row in (folder / f"resumed.{rank}").read_text().splitlines()]
        again = [(int(step), float(at)) for step, at in rows if float(at) > killed]
        if not again:
            return None
        resumed.append(again[0][0])
        stepped = [line.at for line in lines(folder, rank) if line.at > again[0][1]]
        if not stepped:
            return None
        done.append(stepped[0])
        before.append(max((li.step for li in lines(folder, rank) if li.at < killed), default=0))
    # A step is finished when keep has returned on every rank, which the next one's line shows.
    return max(done) - killed, max(0, min(before) - 1 - min(resumed))


def start(launcher: list[str], folder: Path, *options: str, **environment: str) -> Any:
    folder.mkdir(exist_ok=True)
    command = [*launcher, str(SURVIVOR), str(folder), *options]
    said = (folder / f"said.{time.time_ns()}").open("w")
    env = os.environ | {"OMP_NUM_THREADS": "1", "MICS_MEMORY": str(folder)} | environment
    return subprocess.Popen(command, env=env, stdout=said, stderr=subprocess.STDOUT)


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            raise TimeoutError("nothing happened")
        time.sleep(0.02)


def newest_processes(folder: Path, ranks: int) -> list[int]:
    """The processes of the last attempt, by rank."""
    found = [0] * ranks
    for row in (folder / "attempts").read_text().splitlines():
        rank, _, process = row.split()
        found[int(rank)] = int(process)
    return found


def stepping(folder: Path, ranks: int, since: float) -> bool:
    try:
        return all(any(li.at > since for li in lines(folder, rank)) for rank in range(ranks))
    except FileNotFoundError:
        return False


class Node:
    """A launcher with two ranks, and a memory of its own.

    Args:
        folder: of the run.
        index: of the node.
        launcher: its words.
        options: of the program.
        environment: more variables.
    """

    def __init__(
        self,
        folder: Path,
        index: int,
        launcher: Sequence[str],
        options: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        self.index = index
        self.memory = folder.parent / f"memory.{folder.name}.{index}"
        self._words = list(launcher)
        self._options = [str(option) for option in options]
        self._folder = folder
        self._environment = {"MICS_MEMORY": str(self.memory)} | dict(environment)
        self.begin()

    def begin(self) -> None:
        self.memory.mkdir(exist_ok=True)
        self.process = start(self._words, self._folder, *self._options, **self._environment)

    @property
    def processes(self) -> list[psutil.Process]:
        """The launcher's and all below it."""
        try:
            me = psutil.Process(self.process.pid)
            return [me, *me.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def crash(self) -> None:
        """Kill launcher and ranks; the memory stays."""
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def lose(self) -> None:
        """Kill launcher and ranks, and delete the memory."""
        self.crash()
        shutil.rmtree(self.memory)


def agents(folder: Path, number: int, port: int, *options: str, job: str = "") -> list[Node]:
    """Nodes of ``mics run`` that train into the folder."""
    token = folder.parent / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    folder.mkdir(exist_ok=True)
    addresses = ",".join(f"127.0.0.1:{port + index}" for index in range(number))
    shared = [*RUN, "--ranks-per-node", "2", "--nodes", addresses, "--token-file", str(token)]
    shared += ["--job", job or folder.name]
    return [
        Node(folder, index, [*shared, "--node-index", str(index), "--"], options, {})
        for index in range(number)
    ]


def torchruns(folder: Path, number: int, port: int, *options: str) -> list[Node]:
    """Nodes of torchrun; the first hosts the store, without which nobody goes on."""
    folder.mkdir(exist_ok=True)
    shared = [*TORCHRUN, "--nnodes", str(number), "--nproc-per-node", "2"]
    shared += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    shared += ["--rdzv-id", folder.name, "--local-addr", "127.0.0.1"]
    # A dead node is known after six seconds, by default after fifteen; two were too few where
    # live ones were starved for as long, and both then waited for a third that was gone.
    known = "keep_alive_interval=2,keep_alive_max_attempt=3"
    # Both are the host of this address, and whoever came first would have the store.
    hosts = [[*shared, "--rdzv-conf", f"{known},is_host={int(not i)}"] for i in range(number)]
    return [Node(folder, index, words, options, OWN_STORE) for index, words in enumerate(hosts)]
