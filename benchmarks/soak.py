"""Ten minutes of a random fault every ten seconds, on nodes of a lab.

    sudo python benchmarks/soak.py [seconds]

Three nodes of two ranks under ``mics run``, each with a network and a memory of its own. What
strikes is drawn at random: a rank killed or stopped, the ranks' parent killed, the store killed, an
agent killed, a node lost with its memory, a link cut for eight seconds, a bit flipped in a state in
memory. Agents that are gone are started again, as a cluster's service would. In the end losses and
states are compared with an undisturbed run's, bit by bit, and what the processes held is shown.
"""

from __future__ import annotations

import contextlib
import json
import platform
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import psutil
import torch
from surviving import (
    RUN,
    Node,
    bits_that_differ,
    lines,
    newest_processes,
    start,
    stepping,
    wait_until,
)

from mics.lab import lifetime, network, running, state
from mics.lab.state import Lab

RESULTS = Path(__file__).parent / "results"
NODES, RANKS = 3, 6
EVERY, CUT_SECONDS = 10.0, 8.0
AHEAD = 60  # steps that the end is announced ahead, so that every rank hears of it in time


class Faults:
    """What may strike; each fault is a method, which returns what it has struck.

    Args:
        lab: with the nodes.
        folder: of the run.
        nodes: with the agents.
    """

    def __init__(self, lab: Lab, folder: Path, nodes: list[Node]) -> None:
        self._lab, self._folder, self._nodes = lab, folder, nodes
        self._draw = random.Random(7)
        self._all: list[Callable[[], str]] = [
            self.rank_killed,
            self.rank_stopped,
            self.parent_killed,
            self.store_killed,
            self.agent_killed,
            self.node_lost,
            self.link_cut,
            self.bit_flipped,
        ]

    def strike(self) -> tuple[str, str]:
        """Strike at random; the fault's name and whom it has struck."""
        fault = self._draw.choice(self._all)
        return fault.__name__.replace("_", " "), fault()

    def _node(self) -> Node:
        return self._draw.choice(self._nodes)

    def _signal(self, number: int) -> str:
        rank = self._draw.randrange(RANKS)
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            psutil.Process(newest_processes(self._folder, RANKS)[rank]).send_signal(number)
        return f"rank {rank}"

    def rank_killed(self) -> str:
        return self._signal(signal.SIGKILL)

    def rank_stopped(self) -> str:
        return self._signal(signal.SIGSTOP)

    def _kill(self, role: str) -> str:
        """Kill the first process of a role that is found."""
        for node in self._draw.sample(self._nodes, NODES):
            for process in node.processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if role_of(process, newest_processes(self._folder, RANKS)) == role:
                        process.kill()
                        return f"node {node.index}"
        return "nobody"

    def parent_killed(self) -> str:
        return self._kill("ranks' parent")

    def store_killed(self) -> str:
        return self._kill("store")

    def agent_killed(self) -> str:
        node = self._node()
        node.crash()
        return f"node {node.index}"

    def node_lost(self) -> str:
        node = self._node()
        node.lose()
        return f"node {node.index}"

    def link_cut(self) -> str:
        node = self._node()
        network.set_link(self._lab, node.index, up=False)
        threading.Timer(
            CUT_SECONDS, network.set_link, (self._lab, node.index), {"up": True}
        ).start()
        return f"node {node.index}"

    def bit_flipped(self) -> str:
        slots = [path for node in self._nodes for path in node.memory.glob("mics-*/*.[0-9].[01]")]
        if not slots:
            return "nobody"
        path = self._draw.choice(sorted(slots))
        with contextlib.suppress(OSError), path.open("r+b") as file:
            file.seek(self._draw.randrange(path.stat().st_size))
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        return path.name


def role_of(process: psutil.Process, ranks: Collection[int]) -> str:
    """Which kind of process of ``mics run`` it is; ranks and stores are forks of one parent."""
    if process.pid in ranks:
        return "rank"
    words = process.cmdline()
    if "mics.agent.zygote" not in words:
        return "agent"
    parent = process.parent()
    return "store" if parent and "mics.agent.zygote" in parent.cmdline() else "ranks' parent"


class Watch:
    """Looks every second at what all processes hold, by role."""

    def __init__(self, folder: Path, nodes: list[Node]) -> None:
        self._folder, self._nodes = folder, nodes
        self.seen: dict[str, list[tuple[float, float, int, int]]] = defaultdict(list)

    def look(self, at: float) -> None:
        ranks = newest_processes(self._folder, RANKS)
        for node in self._nodes:
            for process in node.processes:
                with contextlib.suppress(psutil.Error), process.oneshot():
                    mib = process.memory_info().rss / 2**20
                    row = (at, mib, process.num_fds(), process.num_threads())
                    self.seen[role_of(process, ranks)].append(row)

    def held(self, begin: float, end: float) -> dict[str, list[float]]:
        """Medians of MiB, descriptors and threads per role between two times."""
        return {
            role: [
                statistics.median(row[column] for row in rows if begin <= row[0] < end)
                for column in (1, 2, 3)
            ]
            for role, rows in self.seen.items()
            if any(begin <= row[0] < end for row in rows)
        }


def soak(root: Path, seconds: float) -> dict[str, Any]:
    token = root / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    folder, last = root / "soaked", root / "last"
    folder.mkdir()
    options = ["--steps", "1000000", "--pause", "0.1", "--until", str(last)]
    with lifetime.lab_for(Lab(state.new_name(), NODES, 2, "1gbit")) as lab:
        addresses = ",".join(f"{lab.address(index)}:29400" for index in range(NODES))
        shared = [*RUN[:-1], "100000", "--ranks-per-node", "2", "--nodes", addresses]
        shared += ["--token-file", str(token), "--job", "soaked"]
        nodes = [
            Node(
                folder,
                index,
                [*running.in_node(lab, index, []), *shared, "--node-index", str(index), "--"],
                options,
                running.environment(lab, index),
            )
            for index in range(NODES)
        ]
        try:
            found = disturb(Faults(lab, folder, nodes), nodes, folder, last, seconds)
        finally:
            for node in nodes:
                if node.process.poll() is None:
                    node.crash()
    wanted = root / "wanted"
    words = [*RUN, "--ranks-per-node", str(RANKS), "--"]
    assert start(words, wanted, "--steps", last.read_text()).wait(3600) == 0
    found["steps"] = int(last.read_text())
    found["losses compared"] = sum(len(lines(folder, rank)) for rank in range(RANKS))
    found["losses and states that differ"] = bits_that_differ(folder, wanted, RANKS)
    found["files left in memory"] = sum(len(list(node.memory.rglob("*"))) for node in nodes)
    return found


def disturb(
    faults: Faults, nodes: list[Node], folder: Path, last: Path, seconds: float
) -> dict[str, Any]:
    """Strike for so many seconds, then let the run end."""
    wait_until(lambda: stepping(folder, RANKS, 0))
    began, watch, struck = time.time(), Watch(folder, nodes), Counter[str]()
    restarts = 0

    def look_after() -> None:
        nonlocal restarts
        watch.look(time.time() - began)
        for node in nodes:
            if node.process.poll() is not None and not last.exists():
                node.begin()
                restarts += 1

    while time.time() - began < seconds:
        name, whom = faults.strike()
        struck[name] += 1
        print(f"{time.time() - began:5.0f} s  {name}: {whom}", flush=True)
        until = time.time() + EVERY
        while time.time() < until:
            look_after()
            time.sleep(1)
    now = time.time()  # the last fault may still be felt
    while not stepping(folder, RANKS, now):
        look_after()
        time.sleep(1)
        assert time.time() < now + 120, "nobody steps any more"
    newest = max(lines(folder, rank)[-1].step for rank in range(RANKS))
    whole = last.with_suffix(".new")
    whole.write_text(str(newest + AHEAD))
    whole.replace(last)
    codes = [node.process.wait(300) for node in nodes]
    assert codes == [0] * NODES, codes
    third = seconds / 3
    return {
        "seconds": seconds,
        "faults": dict(sorted(struck.items())),
        "agents started again": restarts,
        "held in the first third": watch.held(0, third),
        "held in the last third": watch.held(2 * third, seconds),
    }


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 600.0
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="soak-") as folder:
        found = soak(Path(folder), seconds)
    first, final = found["held in the first third"], found["held in the last third"]
    text = [
        "# A random fault every ten seconds",
        "",
        f"`python benchmarks/soak.py {seconds:.0f}`: {NODES} nodes of a lab, two Gloo ranks each, "
        f"of `tests/survivor.py` under `mics run`, torch {torch.__version__}, "
        f"Python {platform.python_version()}.",
        "",
        f"{sum(found['faults'].values())} faults: "
        + ", ".join(f"{name} {count}" for name, count in found["faults"].items())
        + f". {found['agents started again']} agents were started again, nothing else was done. "
        f"{found['steps']} steps, {found['losses and states that differ']} of "
        f"{found['losses compared']} losses and {RANKS} states differ from the undisturbed run's; "
        f"{found['files left in memory']} files are left in memory.",
        "",
        "| median of the first, of the last third | MiB | descriptors | threads |",
        "|---|---|---|---|",
    ]
    for role in sorted(first.keys() & final.keys()):
        cells = [f"{a:.0f}, {b:.0f}" for a, b in zip(first[role], final[role], strict=True)]
        text.append(f"| {role} | {' | '.join(cells)} |")
    (RESULTS / "soak.md").write_text("\n".join(text) + "\n")
    (RESULTS / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
