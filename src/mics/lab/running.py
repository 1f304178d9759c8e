"""A job in a lab: torchrun in every node, rank 0 on the screen, the rest in logs."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mics.lab.network import Traffic, traffic
from mics.lab.state import Lab, names_of_nodes, profile
from mics.lab.system import find_program

_PORT = 29511
_GRACE_SECONDS = 20.0
_SAID = re.compile(r"^mics( \w+)?: ", re.MULTILINE)  # how a message of ours begins


@dataclass(frozen=True)
class Finished:
    """How a job ended.

    Args:
        code: 0, or the exit code of the node that failed first.
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
    nodes = [_start_node(lab, index, words, logs) for index in range(lab.nodes)]
    stop = _Stop(nodes)
    readers = [
        threading.Thread(
            target=_read,
            args=(node, logs / f"node{index}.log", screen or sys.stdout, index == 0),
        )
        for index, node in enumerate(nodes)
    ]
    for reader in readers:
        reader.start()
    with stop:
        first = _wait_for_first_failure(nodes)
        if first is not None:
            _end(nodes)
        for node in nodes:
            node.wait()
    for reader in readers:
        reader.join()
    spent = time.monotonic() - start
    per_node = [b - a for a, b in zip(before, traffic(lab), strict=True)]
    if stop.asked is not None:
        return Finished(128 + stop.asked, "interrupted", spent, per_node)
    if first is None:
        return Finished(0, "", spent, per_node)
    return Finished(nodes[first].returncode or 1, _words(logs, lab, first, began), spent, per_node)


def in_node(lab: Lab, index: int, words: Sequence[str]) -> list[str]:
    """Return the command line that runs ``words`` in a node's namespace.

    `ip netns exec` gives it mounts of its own, so the files mounted here are seen there alone.
    """
    hosts, switch = names_of_nodes(lab)
    mount = "mount --bind $1 /etc/hosts && mount --bind $2 /etc/nsswitch.conf && shift 2 && exec "
    shell = ["sh", "-c", mount + '"$@"', "sh", str(hosts), str(switch)]
    return [find_program("ip") or "ip", "netns", "exec", lab.node(index), *shell, *words]


def environment(lab: Lab, index: int) -> Mapping[str, str]:
    """Return the variables of a program in a node, but for those that torchrun adds."""
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


def _start_node(lab: Lab, index: int, words: Sequence[str], logs: Path) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "torch.distributed.run"]
    launch += ["--nnodes", str(lab.nodes), "--node-rank", str(index)]
    launch += ["--nproc-per-node", str(lab.gpus_per_node)]
    launch += ["--master-addr", lab.address(0), "--master-port", str(_PORT)]
    launch += ["--local-addr", lab.address(index)]
    # Every rank's output into its own file; local rank 0's is shown as well.
    launch += ["--log-dir", str(logs / f"node{index}"), "--tee", "3"]
    launch += ["--local-ranks-filter", "0"]
    return subprocess.Popen(
        in_node(lab, index, [*launch, *_as_torchrun_takes_it(words)]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(lab, index),
        start_new_session=True,
    )


def _as_torchrun_takes_it(words: Sequence[str]) -> list[str]:
    first = words[0]
    if first == "-m" or first.endswith(".py"):
        return list(words)
    if first == "mics":
        return ["-m", "mics", *words[1:]]
    if first in ("python", "python3") and len(words) > 1:
        return _as_torchrun_takes_it(words[1:])
    return ["--no-python", *words]


def _read(node: subprocess.Popen[str], log: Path, screen: IO[str], shown: bool) -> None:
    assert node.stdout is not None
    with log.open("w") as file, node.stdout:
        for line in node.stdout:
            file.write(line)
            if shown and line.startswith("[default0]:"):
                screen.write(line.removeprefix("[default0]:"))
                screen.flush()


def _wait_for_first_failure(nodes: Sequence[subprocess.Popen[str]]) -> int | None:
    while True:
        codes = [node.poll() for node in nodes]
        failed = [index for index, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            return failed[0]
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _end(nodes: Sequence[subprocess.Popen[str]], number: int = signal.SIGTERM) -> None:
    """End the other nodes; what does not listen is killed."""
    for node in nodes:
        if node.poll() is None:
            os.killpg(node.pid, number)
    deadline = time.monotonic() + _GRACE_SECONDS
    for node in nodes:
        try:
            node.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)


def _words(logs: Path, lab: Lab, first: int, began: float) -> str:
    """Return the end of what the rank that failed first, by the time of writing, had to say.

    A folder may hold the logs of an earlier run, from before ``began``.
    """
    order = [first, *(index for index in range(lab.nodes) if index != first)]
    spoken = []
    for index in order:
        for file in sorted((logs / f"node{index}").rglob("stderr.log")):
            if file.stat().st_mtime < began:
                continue
            text = file.read_text(errors="replace").strip()
            if "Error" in text or _SAID.search(text):
                local = int(file.parent.name)
                rank = index * lab.gpus_per_node + local
                spoken.append((file.stat().st_mtime, rank, text))
    if not spoken:
        return f"node{first} ended without a word; see {logs}/node{first}.log"
    _, rank, text = min(spoken)
    # Python's own words carry the rank; what a library prints when it is torn down does not.
    own = [
        line.removeprefix(f"[rank{rank}]: ")
        for line in text.splitlines()
        if line.startswith(f"[rank{rank}]: ") or _SAID.match(line)
    ]
    return f"rank {rank}:\n" + "\n".join(own or text.splitlines()[-20:])


class _Stop:
    """Passes SIGINT, SIGTERM and SIGHUP on to the nodes while it is entered."""

    def __init__(self, nodes: Sequence[subprocess.Popen[str]]) -> None:
        self._nodes = nodes
        self.asked: int | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            self._before = {n: signal.signal(n, self._ask) for n in numbers}

    def __exit__(self, *_: object) -> None:
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = number
        for node in self._nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGTERM)


def shown(words: Sequence[str]) -> str:
    """Write a command as one would type it."""
    return shlex.join(words)
