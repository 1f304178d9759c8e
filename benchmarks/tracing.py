"""What `mics.trace` costs while it records, and what its places cost while nobody does.

    python benchmarks/tracing.py             # 4 Gloo ranks on this machine

Rounds of plain and of recorded steps take turns in the same processes. Compared is the processor
time of rank 0, all threads, which other work of the machine moves less than it moves the clock.
While nobody traces, every collective, wait and pass of a unit looks whether somebody does: the
looks of a step are counted by a stand-in for that look, and one of them is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import timeit
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import mics
from mics.communication import ledger
from mics.ranks import recording, waiting
from mics.ranks.launcher import Launch
from mics.ranks.starting import run_local_ranks
from mics.sharding import units

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Workload:
    """A stack of blocks; every rank works on its own rows."""

    ranks: int = 4
    partition: int = 2
    width: int = 256
    num_blocks: int = 8
    rows: int = 256
    micro_steps: int = 4
    rounds: int = 8
    steps: int = 4


class Training:
    """The steps of one model on this rank."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        mesh = mics.init_mesh(partition=work.partition, gpus_per_node=work.ranks // 2)
        torch.manual_seed(0)
        self.model = nn.Sequential(*[_block(work.width) for _ in range(work.num_blocks)])
        for block in [*self.model, self.model]:
            mics.fully_shard(block, mesh=mesh, overlap=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def step(self) -> None:
        batches = [
            torch.randn(self.work.rows, self.work.width) for _ in range(self.work.micro_steps)
        ]
        for x in mics.micro_steps(self.model, batches, normalise="micro_steps"):
            self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self) -> list[float]:
        """Processor seconds of the steps of a round; the first one and what comes last are none."""
        self.step()
        times = []
        for _ in range(self.work.steps):
            began = time.process_time()
            self.step()
            times.append(time.process_time() - began)
        self.step()
        return times


def _block(width: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
    )


def measure(launch: Launch, work: Workload, folder: str) -> int:
    training = Training(work)
    training.seconds()
    rounds = []
    for number in range(work.rounds):
        plain = training.seconds()
        file = Path(folder) / f"trace{number}.json.gz"
        with mics.trace(training.model, file, steps=work.steps, skip=1):
            recorded = training.seconds()
        rounds.append((plain, recorded))
    looks = _looks(training)
    if launch.rank == 0:
        each = min(timeit.repeat(recording.recorder, number=1_000_000, repeat=5)) / 1e6
        size = file.stat().st_size
        found = {"rounds": rounds, "looks": looks, "seconds of a look": each, "bytes": size}
        (Path(folder) / "found.json").write_text(json.dumps(found))
    return 0


def _looks(training: Training) -> int:
    """How often a step asks whether somebody traces."""
    count = [0]

    def look() -> None:
        count[0] += 1

    with contextlib.ExitStack() as stack:
        for place in (ledger, units, waiting):
            stack.enter_context(mock.patch.object(place, "recorder", look))
        training.step()
    return count[0]


def report(found: dict[str, Any], work: Workload, about: dict[str, str]) -> str:
    plain = [s for one, _ in found["rounds"] for s in one]
    recorded = [s for _, one in found["rounds"] for s in one]
    ratios = [statistics.median(b) / statistics.median(a) for a, b in found["rounds"]]
    low, middle, high = statistics.quantiles(ratios, n=4)
    step = statistics.median(plain)
    looks = found["looks"] * found["seconds of a look"]
    lines = [
        "# What a trace costs",
        "",
        f"`{about['command']}`, {about['date']}, torch {torch.__version__}, mics "
        f"{mics.__version__}, {about['machine']};",
        f"{work.ranks} Gloo ranks that stand for 2 nodes, partition {work.partition}, "
        f"{work.num_blocks} blocks of width {work.width}, {work.micro_steps} micro-steps of "
        f"{work.rows} rows;",
        f"{work.rounds} rounds of {work.steps} plain and {work.steps} recorded steps in turn, "
        "processor time of rank 0.",
        "",
        "| | processor time of a step, median |",
        "|---|---|",
        f"| nobody traces | {step * 1e3:.1f} ms |",
        f"| recorded by `mics.trace` | {statistics.median(recorded) * 1e3:.1f} ms |",
        "",
        f"Recorded over plain, by rounds: {middle:.3f} (quartiles {low:.3f} to {high:.3f}). The "
        f"file of {work.steps} steps has {found['bytes']:,} bytes.",
        "",
        f"While nobody traces a step looks {found['looks']} times whether somebody does, "
        f"{found['seconds of a look'] * 1e9:.0f} ns each: {looks * 1e6:.1f} us, "
        f"{looks / step:.4%} of the step.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in asdict(Workload()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    work = Workload(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory() as folder:
        if run_local_ranks(measure, work.ranks, "cpu", None, work, folder):
            raise SystemExit(1)
        found = json.loads((Path(folder) / "found.json").read_text())
    about = {
        "command": " ".join(["python", "benchmarks/tracing.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    text = report(found, work, about)
    print(text)
    (RESULTS / "tracing.md").write_text(text)


if __name__ == "__main__":
    main()
