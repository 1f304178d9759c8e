"""Ranks and nodes killed at random: what is lost, and how long until every rank steps again.

    python benchmarks/faults.py kills     50 ranks, one after the other, at random moments
    python benchmarks/faults.py nodes     nodes, with their memory; the first, and two of three, too
    python benchmarks/faults.py schedule  time to the same steps with a failure every 20 s

Every run is compared with one that nothing happened to: the bits of all losses, the final state.
``benchmarks/results/faults.md`` keeps what came of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from surviving import (
    RUN,
    Node,
    after,
    agents,
    bits_that_differ,
    lines,
    newest_processes,
    start,
    stepping,
    torchruns,
    wait_until,
)

RESULTS = Path(__file__).parent / "results"


# -- ranks -----------------------------------------------------------------------------------------


def kills(root: Path, count: int = 50, steps: int = 1500) -> dict[str, Any]:
    ranks, options = 4, ["--steps", str(steps), "--pause", "0.02"]
    launcher = [*RUN, "--ranks-per-node", str(ranks), "--"]
    assert start(launcher, root / "wanted", *options).wait(600) == 0
    generator = random.Random(0)
    folder = root / "killed"
    process = start(launcher, folder, *options)
    wait_until(lambda: stepping(folder, ranks, 0))
    found = []
    while len(found) < count and process.poll() is None:
        time.sleep(0.2 + 0.8 * generator.random())
        victim, now = generator.randrange(ranks), time.time()
        try:
            os.kill(newest_processes(folder, ranks)[victim], signal.SIGKILL)
        except ProcessLookupError:
            continue
        wait_until(
            lambda now=now: stepping(folder, ranks, now + 0.3) and bool(after(folder, ranks, now))
        )
        found.append(after(folder, ranks, now))
    assert process.wait(900) == 0
    seconds = sorted(one[0] for one in found if one)
    return {
        "kills": len(found),
        "recovered": len(seconds),
        "median": statistics.median(seconds),
        "worst": seconds[-1],
        "finished steps lost": sum(one[1] for one in found if one),
        "losses and states that differ": bits_that_differ(folder, root / "wanted", ranks),
        "losses compared": sum(len(lines(folder, rank)) for rank in range(ranks)),
        "memory left": len(list(folder.glob("mics-*"))),
    }


# -- nodes -----------------------------------------------------------------------------------------


def nodes(root: Path, steps: int = 120) -> dict[str, Any]:
    plans = {2: [[1], [0], [1]], 3: [[1, 2], [0, 1], [0, 2]]}
    return {
        f"{number} nodes, {len(plan[0])} lost at a time": lose(root, number, plan, steps)
        for number, plan in plans.items()
    }


def lose(root: Path, number: int, plan: list[list[int]], steps: int) -> dict[str, Any]:
    """Lose nodes as planned, one loss after the other, each followed by replacements."""
    ranks, options = 2 * number, ["--steps", str(steps), "--pause", "0.05"]
    wanted, folder = root / f"wanted{number}", root / f"lost{number}"
    assert start([*RUN, "--ranks-per-node", str(ranks), "--"], wanted, *options).wait(600) == 0
    there = agents(folder, number, 29600 + 10 * number, *options)
    wait_until(lambda: stepping(folder, ranks, 0))
    found = []
    for lost in plan:
        time.sleep(2)
        now = time.time()
        for index in lost:
            there[index].lose()
        for index in lost:
            there[index].begin()
        wait_until(lambda now=now: bool(after(folder, ranks, now)))
        found.append(after(folder, ranks, now))
    assert all(node.process.wait(600) == 0 for node in there)
    return {
        "losses": [f"node(s) {', '.join(map(str, lost))}" for lost in plan],
        "seconds": [one[0] for one in found if one],
        "finished steps lost": sum(one[1] for one in found if one),
        "losses and states that differ": bits_that_differ(folder, wanted, ranks),
    }


# -- a schedule of failures ------------------------------------------------------------------------

RANKS, EVERY, NODE = 4, 20.0, 3
"""A failure every 20 s; every third is a node, with its memory, replaced at once."""


def schedule(root: Path, steps: int = 300) -> dict[str, Any]:
    """Time to the same steps on two nodes of two ranks: undisturbed, and with failures."""
    options = ["--steps", str(steps), "--pause", "0.28"]
    clean = root / "undisturbed"
    there = agents(clean, 2, 29640, *options)
    assert all(node.process.wait(900) == 0 for node in there)
    rows = lines(clean, 0)
    found: dict[str, Any] = {"undisturbed": {"seconds": rows[-1].at - rows[0].at, "steps": steps}}
    rate = (steps - 1) / found["undisturbed"]["seconds"]
    contestants: dict[str, tuple[Callable[..., list[Node]], int, int]] = {
        "mics run": (agents, 0, 900),
        "mics under torchrun": (torchruns, 0, 150),
        "torchrun, a checkpoint every 25 steps": (torchruns, 25, 100),
        "torchrun, a checkpoint every 100 steps": (torchruns, 100, 100),
    }
    for at, (name, (launch, save_every, limit)) in enumerate(contestants.items()):
        folder = root / name.replace(" ", "-").replace(",", "")
        disk = ["--checkpoints", str(folder / "disk")]
        if save_every:
            disk += ["--no-memory", "--save-every", str(save_every)]
        there = launch(folder, 2, 29650 + 10 * at, *options, *disk)
        one = disturbed(folder, there, limit)
        one["throughput"] = one["steps"] / one["seconds"] / rate
        if one["steps"] == steps:
            one["differ"] = bits_that_differ(folder, clean, RANKS)
        found[name] = one
        print(name, one, flush=True)
    return found


def disturbed(folder: Path, there: list[Node], limit: float) -> dict[str, Any]:
    """Strike until all steps are done, or the limit of seconds is over."""
    wait_until(lambda: stepping(folder, RANKS, 0))
    began, strikes, generator = lines(folder, 0)[0].at, 0, random.Random(1)
    while any(node.process.poll() is None for node in there) and time.time() < began + limit:
        if time.time() > began + EVERY * (strikes + 1):
            strikes += 1
            if strikes % NODE == 0:
                there[1].lose()
                there[1].begin()
            else:
                with contextlib.suppress(ProcessLookupError):
                    victim = newest_processes(folder, RANKS)[generator.randrange(RANKS)]
                    os.kill(victim, signal.SIGKILL)
        time.sleep(0.05)
    ended = all(node.process.poll() is not None for node in there)
    for node in there:
        if node.process.poll() is None:
            node.crash()
    rows = lines(folder, 0)
    # The last attempt's newest step: what a failure has taken back does not count.
    return {
        "steps": rows[-1].step,
        "seconds": rows[-1].at - began if ended else time.time() - began,
        "failures": strikes,
    }


def tables(known: dict[str, Any]) -> list[str]:
    """What was measured, as Markdown."""
    text = []
    if "kills" in known:
        one = known["kills"]
        text += [
            "| ranks killed | recovered | median | worst | finished steps repeated | differ |",
            "|---|---|---|---|---|---|",
            f"| {one['kills']} | {one['recovered']} | {one['median']:.2f} s | {one['worst']:.2f} s "
            f"| {one['finished steps lost']} | {one['losses and states that differ']} of "
            f"{one['losses compared']} losses |",
            "",
        ]
    if "nodes" in known:
        text += [
            "| nodes | lost, in turn | seconds | steps repeated | differ |",
            "|---|---|---|---|---|",
        ]
        for name, one in known["nodes"].items():
            seconds = ", ".join(f"{value:.1f}" for value in one["seconds"])
            text.append(
                f"| {name} | {'; '.join(one['losses'])} | {seconds} | {one['finished steps lost']} "
                f"| {one['losses and states that differ']} |"
            )
        text.append("")
    if "schedule" in known:
        text += [
            f"A failure every {EVERY:.0f} s, every {NODE}rd a node with its memory, replaced at "
            "once; two nodes of two ranks, steps of 0.3 s. Throughput: steps that are not undone, "
            "by the time, of the undisturbed run's.",
            "",
            "| | steps | seconds | failures | throughput | differ |",
            "|---|---|---|---|---|---|",
        ]
        for name, one in known["schedule"].items():
            text.append(
                f"| {name} | {one['steps']} | {one['seconds']:.0f} | {one.get('failures', 0)} "
                f"| {one.get('throughput', 1.0):.3f} | {one.get('differ', 'n/a')} |"
            )
    return text


def main() -> None:
    what = sys.argv[1] if len(sys.argv) > 1 else "kills"
    path = RESULTS / "faults.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="faults-") as folder:
        part = {"kills": kills, "nodes": nodes, "schedule": schedule}[what]
        known[what] = part(Path(folder))
    path.write_text(json.dumps(known, indent=1) + "\n")
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    text = [
        "# Ranks and nodes that are killed",
        "",
        "`python benchmarks/faults.py kills|nodes|schedule`: Gloo ranks of `tests/survivor.py` on "
        f"{os.cpu_count()} cores, {versions}. Seconds are from the kill until every rank has done "
        "a step again.",
        "",
        *tables(known),
    ]
    (RESULTS / "faults.md").write_text("\n".join(text) + "\n")
    print(json.dumps(known[what], indent=1))


if __name__ == "__main__":
    main()
