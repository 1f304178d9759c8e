"""A job in a lab: a process per rank in every node, rank 0 on the screen, the rest in logs.

The ranks are started without torch's agent, which keeps a store that anybody may write to, and
unpickles what it finds there.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mics.lab.network import Traffic, traffic
from mics.lab.state import Lab, names_of_nodes, profile
from mics.lab.system import find_program
from mics.ranks.program import as_command

_PORT = 29511
_OUT, _ERR = "stdout.log", "stderr.log"
_LOST = "gloo/transport/tcp"  # where Gloo's errors about connections come from
_LAST_WORDS_SECONDS = 2.0
_GRACE_SECONDS = 20.0
_SAID = re.compile(r"^mics( \w+)?: ", re.MULTILINE)  # how a message of ours begins


@dataclass(frozen=True)
class Finished:
    """How a job ended.

    Args:
        code: 0, or the exit code of the rank that failed first.
        words: what the rank that failed first had to say.
        seconds: how long it took.
        per_node: what the kernel counted meanwhile at the interface of each node.
    """

    code: int
    words: str
    seconds: float
    per_node: list[Traffic]


def run(lab: Lab, words: Sequence[str], logs: Path, *, screen: IO[str] | None = None) -> Finished:
    """Run a command on every rank of a lab and wait for it.

    Args:
        lab: one that is up.
        words: a Python script and its arguments, ``-m module``, ``mics <verb>``, or any program.
        logs: folder for what every rank prints, a folder per node.
        screen: where rank 0's output goes, as it comes; standard output by default.
    """
    logs.mkdir(parents=True, exist_ok=True)
    before, start, began = traffic(lab), time.monotonic(), time.time()
    ranks = [_start_rank(lab, rank, words, logs) for rank in range(lab.nodes * lab.gpus_per_node)]
    stop = _Stop(ranks)
    readers = _show(ranks[0], _folder_of(lab, 0, logs), screen or sys.stdout)
    with stop:
        failed = not _all_end_well(ranks)
        if failed:
            _wait(ranks, _LAST_WORDS_SECONDS)
            _end(ranks)
        for rank in ranks:
            rank.wait()
    for reader in readers:
        reader.join()
    spent = time.monotonic() - start
    per_node = [b - a for a, b in zip(before, traffic(lab), strict=True)]
    if stop.asked is not None:
        return Finished(128 + stop.asked, "interrupted", spent, per_node)
    if not failed:
        return Finished(0, "", spent, per_node)
    code, words_of_first = _first_failure(logs, lab, ranks, began)
    return Finished(code, words_of_first, spent, per_node)


def in_node(lab: Lab, index: int, words: Sequence[str]) -> list[str]:
    """Return the command line that runs ``words`` in a node's namespace.

    `ip netns exec` gives it mounts of its own, so the files mounted here are seen there alone. It
    has its node's name too: by its own name torchrun knows whether it is the one to be met.
    """
    hosts, switch = names_of_nodes(lab)
    become = "hostname $1 && mount --bind $2 /etc/hosts && mount --bind $3 /etc/nsswitch.conf"
    shell = ["sh", "-c", become + ' && shift 3 && exec "$@"', "sh"]
    shell += [f"node{index}", str(hosts), str(switch)]
    enter = [find_program("ip") or "ip", "netns", "exec", lab.node(index)]
    return [*enter, find_program("unshare") or "unshare", "--uts", *shell, *words]


def environment(lab: Lab, index: int) -> dict[str, str]:
    """Return the variables of a program in a node, but for those that make it a rank."""
    # Flat or hierarchical is measured once per lab: another one has other links.
    return (
        {"MICS_PROFILE": str(profile(lab))}
        | os.environ
        | {
            "MICS_LAB": lab.name,
            "MICS_LAB_NODE": str(index),
            "MICS_LAB_LINK": lab.link,
            "GLOO_SOCKET_IFNAME": "eth0",
            "NCCL_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "PYTHONUNBUFFERED": "1",
        }
    )


def _start_rank(lab: Lab, rank: int, words: Sequence[str], logs: Path) -> subprocess.Popen[str]:
    """Start a rank; rank 0's output comes through pipes, the others' goes into files."""
    index, local_rank = divmod(rank, lab.gpus_per_node)
    folder = _folder_of(lab, rank, logs)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _OUT).open("w") as out, (folder / _ERR).open("w") as err:
        return subprocess.Popen(
            in_node(lab, index, as_command(words)),
            stdout=out if rank else subprocess.PIPE,
            stderr=err if rank else subprocess.PIPE,
            text=True,
            env=environment(lab, index)
            | {
                "RANK": str(rank),
                "WORLD_SIZE": str(lab.nodes * lab.gpus_per_node),
                "LOCAL_RANK": str(local_rank),
                "LOCAL_WORLD_SIZE": str(lab.gpus_per_node),
                "GROUP_RANK": str(index),
                "MASTER_ADDR": lab.address(0),
                "MASTER_PORT": str(_PORT),
            },
            start_new_session=True,
        )


def _folder_of(lab: Lab, rank: int, logs: Path) -> Path:
    index, local_rank = divmod(rank, lab.gpus_per_node)
    return logs / f"node{index}" / str(local_rank)


def _show(rank: subprocess.Popen[str], folder: Path, screen: IO[str]) -> list[threading.Thread]:
    assert rank.stdout is not None and rank.stderr is not None
    lock = threading.Lock()  # whole lines, whichever pipe they come through
    readers = [
        threading.Thread(target=_read, args=(pipe, folder / name, screen, lock))
        for pipe, name in ((rank.stdout, _OUT), (rank.stderr, _ERR))
    ]
    for reader in readers:
        reader.start()
    return readers


def _read(pipe: IO[str], log: Path, screen: IO[str], lock: threading.Lock) -> None:
    with log.open("w") as file, pipe:
        for line in pipe:
            file.write(line)
            file.flush()
            with lock:
                screen.write(line)
                screen.flush()


def _all_end_well(ranks: Sequence[subprocess.Popen[str]]) -> bool:
    """Wait until every rank has ended, or the first one badly."""
    while True:
        codes = [rank.poll() for rank in ranks]
        if any(code not in (None, 0) for code in codes):
            return False
        if all(code == 0 for code in codes):
            return True
        time.sleep(0.05)


def _wait(ranks: Sequence[subprocess.Popen[str]], seconds: float) -> None:
    """Wait for ranks that end by themselves.

    The rank that failed first need not be the first to end: one that waited for it may hear of
    closed connections while its traceback is still being written.
    """
    deadline = time.monotonic() + seconds
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, deadline - time.monotonic()))


def _end(ranks: Sequence[subprocess.Popen[str]], number: int = signal.SIGTERM) -> None:
    """End the other ranks; what does not listen is killed."""
    for rank in ranks:
        if rank.poll() is None:
            os.killpg(rank.pid, number)
    deadline = time.monotonic() + _GRACE_SECONDS
    for rank in ranks:
        try:
            rank.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(rank.pid, signal.SIGKILL)


def _first_failure(
    logs: Path, lab: Lab, ranks: Sequence[subprocess.Popen[str]], began: float
) -> tuple[int, str]:
    """Return the exit code and the words of the rank that failed first.

    A rank that lost its connections, or that Gloo aborted without a word, failed because of
    another; among the others the first by the time of writing. A folder may hold the logs of an
    earlier run, from before ``began``.
    """
    failed = []
    for number, rank in enumerate(ranks):
        file = _folder_of(lab, number, logs) / _ERR
        text, written = file.read_text(errors="replace").strip(), file.stat().st_mtime
        spoke = written >= began and bool("Error" in text or _SAID.search(text))
        follows = (_LOST in text) if spoke else rank.returncode == -signal.SIGABRT
        if rank.returncode != 0:
            ended = rank.returncode == -signal.SIGTERM
            failed.append((ended, follows, not spoke, written, number))
    *_, silent, _, number = min(failed)
    code = ranks[number].returncode
    if silent:
        words = f"rank {number} ended with exit code {code} and said nothing\nsee {logs}"
        return (code if code > 0 else 128 - code), words
    text = (_folder_of(lab, number, logs) / _ERR).read_text(errors="replace").strip()
    # Python's own words carry the rank; what a library prints when it is torn down does not.
    own = [
        line.removeprefix(f"[rank{number}]: ")
        for line in text.splitlines()
        if line.startswith(f"[rank{number}]: ") or _SAID.match(line)
    ]
    words = f"rank {number}:\n" + "\n".join(own or text.splitlines()[-20:])
    # A thread of Gloo that wants the interpreter while it ends aborts what had ended with 1.
    return (1 if code == -signal.SIGABRT else code if code > 0 else 128 - code), words


class _Stop:
    """Passes SIGINT, SIGTERM, SIGHUP and SIGQUIT on to the ranks while it is entered."""

    def __init__(self, ranks: Sequence[subprocess.Popen[str]]) -> None:
        self._ranks = ranks
        self.asked: int | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
            self._before = {n: signal.signal(n, self._ask) for n in numbers}

    def __exit__(self, *_: object) -> None:
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = number
        for rank in self._ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGTERM)


def shown(words: Sequence[str]) -> str:
    """Write a command as one would type it."""
    return shlex.join(words)
