"""Is the slow rank, and the slow link, named? And nobody where all is well?

    python benchmarks/stragglers.py          # Linux, root, some 30 minutes

Each job, in a lab of 4 nodes of 2 ranks, trains a stand-in model whose blocks sleep in slices of
5 ms, so that ranks that share the cores of one machine compute alike. It has three parts of 17
steps. In the first nothing is wrong. In the second one rank takes 30 % longer for its slices, or is
stopped and continued by signals for as large a part of the time. In the third the cable of one node
has half the rate, both ways. A part is right when that rank or node is named, and nothing else; the
ranks are compared once, at its end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from mics.communication.pace import Pace, pace_of
from mics.lab import lifetime, network, running, state
from mics.lab.state import Lab
from mics.ranks.waiting import own_clock
from mics.sharding.units import units_of

RESULTS = Path(__file__).parent / "results"
NODES, RANKS, LINK, HALF = 4, 2, "200mbit", "100mbit"
STEPS, MICRO_STEPS, BLOCKS, SLICES = 17, 2, 3, 4
SLICE, STOPPED, RUNNING = 5e-3, 0.03, 0.1  # seconds: the time of its own is 1.3 times as long


@dataclass(frozen=True)
class Job:
    """What is wrong in the parts of one job.

    Args:
        partition: ranks of a partition group.
        rank: the slow one.
        stopped: whether it is slow by signals.
        node: the one with the slow cable.
    """

    partition: int
    rank: int
    stopped: bool
    node: int


def jobs(count: int) -> list[Job]:
    draw = random.Random(0)
    return [
        Job(
            partition=(2, 4)[number % 2],
            rank=draw.randrange(NODES * RANKS),
            stopped=number // 2 % 2 == 1,
            node=draw.randrange(NODES),
        )
        for number in range(count)
    ]


# -- a rank ----------------------------------------------------------------------------------------


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        for _ in range(SLICES):
            time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        for _ in range(2 * SLICES):
            time.sleep(ctx.seconds)
        return gradients[0], None


class Block(nn.Module):
    """A block of 1 MiB whose weights all take part at no cost, and which then sleeps."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4096, 64))
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(x * self.weight.sum(0) / len(self.weight))
        return Sleep.apply(x, self.seconds)


STOPPER = f"""
import os, signal, time
target = os.getppid()
while os.getppid() == target:
    os.kill(target, signal.SIGSTOP); time.sleep({STOPPED})
    os.kill(target, signal.SIGCONT); time.sleep({RUNNING})
"""


def rank_main(job: Job, folder: Path) -> None:
    mesh = mics.init_mesh(partition=job.partition)
    mine = dist.get_rank() == job.rank
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(SLICE) for _ in range(BLOCKS)])
    mics.shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(), collectives="flat")
    parts = {"nothing": _measure(model)}
    if mine and job.stopped:
        stopper = subprocess.Popen([sys.executable, "-c", STOPPER])
        parts["rank"] = _measure(model)
        stopper.send_signal(signal.SIGTERM)
        stopper.wait()
    else:
        for block in model:
            block.seconds = SLICE * (1.3 if mine and not job.stopped else 1)
        parts["rank"] = _measure(model)
    for block in model:
        block.seconds = SLICE
    if dist.get_rank() == 0:
        (folder / "halve").touch()
        while not (folder / "halved").exists():
            time.sleep(0.01)
    dist.barrier()
    parts["link"] = _measure(model)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(parts))
    dist.barrier()


def _measure(model: nn.Module) -> dict[str, Any]:
    """Take some steps and compare the ranks."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    pace = pace_of(units_of(model)[0].groups)
    mics.ledger(model).reset()
    began, before = time.monotonic(), pace.spent
    for _ in range(STEPS):
        for x in mics.micro_steps(model, list(torch.ones(MICRO_STEPS, 2, 64))):
            (model(x) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    spent = time.monotonic() - began
    calls = sum(count.calls for count in mics.ledger(model).traffic().counts.values())
    noted = pace.spent - before + calls * _seconds_per_collective()
    start = time.thread_time()
    found = mics.stragglers(model)
    look = time.thread_time() - start
    return {
        "found": found.as_json(),
        "own": {rank: [round(t, 4) for t in one.own] for rank, one in found.times.items()},
        "step": spent / STEPS,
        "noted": noted / spent,
        "noted, and a look every 10 steps": (noted + look * STEPS / 10) / spent,
    }


def _seconds_per_collective() -> float:
    """What is noted of one collective, beside what is summed up once per step."""
    pace, number = Pace(on_host=True), 2000
    began = time.thread_time()
    for _ in range(number):
        pace.reached(1)
        own_clock()
        pace.took(1, 1e-3, None)
    return (time.thread_time() - began) / number


# -- the jobs --------------------------------------------------------------------------------------


def run(job: Job) -> dict[str, Any]:
    lab = Lab(state.new_name(), NODES, RANKS, LINK)
    with tempfile.TemporaryDirectory() as name, lifetime.lab_for(lab):
        folder = Path(name)
        words = [__file__, "--job", json.dumps(asdict(job)), "--folder", name]
        halving = threading.Thread(target=_halve_when_asked, args=(lab, job.node, folder))
        halving.start()
        with (folder / "screen").open("w") as screen:
            done = running.run(lab, words, folder / "logs", screen=screen)
        (folder / "halve").touch()
        halving.join()
        if done.code != 0:
            raise RuntimeError(done.words)
        parts = json.loads((folder / "found.json").read_text())
    for part, found in parts.items():
        found["right"] = _right(job, part, found["found"]["slow"])
    return {"job": asdict(job), "parts": parts}


def _halve_when_asked(lab: Lab, node: int, folder: Path) -> None:
    """Give a node's cable half the rate, at both of its ends."""
    while not (folder / "halve").exists():
        time.sleep(0.01)
    network._shape(lab.switch, network._port(node), HALF)
    network._shape(lab.node(node), network.NODE_END, HALF)
    (folder / "halved").touch()


def _right(job: Job, part: str, named: list[str]) -> bool:
    if part == "nothing":
        return named == []
    begins = f"the link of node {job.node} is slow"
    if part == "rank":
        begins = f"rank {job.rank} (node {job.rank // RANKS}) is slow"
    return len(named) == 1 and named[0].startswith(begins)


def report(document: dict[str, Any]) -> str:
    made = document["jobs"]
    kinds = {
        "nothing": [one["parts"]["nothing"] for one in made],
        "a rank, which sleeps 1.3 times as long": _of_rank(made, stopped=False),
        "a rank, stopped for 30 ms of every 130": _of_rank(made, stopped=True),
        "a link, of half the rate": [one["parts"]["link"] for one in made],
    }
    rows = [
        f"| {kind} | {sum(part['right'] for part in parts)} of {len(parts)} | {_steps(parts)} |"
        for kind, parts in kinds.items()
    ]
    parts = [part for one in made for part in one["parts"].values()]
    wrong = [
        f"Wrong: {one['job']}, {name}: {part['found']['slow'] or 'nobody named'}"
        for one in made
        for name, part in one["parts"].items()
        if not part["right"]
    ]
    costs = {
        name: statistics.median(part[name] for part in parts)
        for name in ("noted", "noted, and a look every 10 steps")
    }
    lines = [
        "# Is the slow one named?",
        "",
        f"`{document['command']}`, {document['date']}, torch {document['torch']}, mics "
        f"{document['mics']}, {document['machine']}; {len(made)} jobs in a lab of {NODES} nodes of "
        f"{RANKS} ranks, links of {LINK}, {STEPS} steps for each line, partition 2 and 4 in turn.",
        "",
        "| what is slow | named right | seconds of a step, median |",
        "|---|---|---|",
        *rows,
        "",
        f"The cost on rank 0, median: {costs['noted']:.4%} of a step for what is noted, "
        f"{costs['noted, and a look every 10 steps']:.4%} with a look every 10 steps (processor "
        "time of the thread that trains).",
        "",
        *wrong,
    ]
    return "\n".join(lines).rstrip() + "\n"


def _of_rank(made: list[dict[str, Any]], *, stopped: bool) -> list[dict[str, Any]]:
    return [one["parts"]["rank"] for one in made if one["job"]["stopped"] == stopped]


def _steps(parts: list[dict[str, Any]]) -> str:
    return f"{statistics.median(part['step'] for part in parts):.2f}" if parts else "n/a"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job")
    parser.add_argument("--count", type=int, default=20, help="jobs")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.job:
        rank_main(Job(**json.loads(arguments.job)), arguments.folder)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "command": "python benchmarks/stragglers.py",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "mics": mics.__version__,
        "machine": f"{os.cpu_count()} cores of {platform.machine()}",
        "jobs": [],
    }
    for job in jobs(arguments.count):
        document["jobs"].append(run(job))
        for part, found in document["jobs"][-1]["parts"].items():
            print(job, part, found["right"], found["found"]["slow"], flush=True)
        # What there is so far, if it should end early.
        (arguments.folder / "stragglers.json").write_text(json.dumps(document) + "\n")
        (arguments.folder / "stragglers.md").write_text(report(document))
    print(report(document))


if __name__ == "__main__":
    main()
