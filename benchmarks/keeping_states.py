"""What keeping the state of every rank in memory costs, and heartbeats, as shares of a step.

    python benchmarks/keeping_states.py

Four Gloo ranks, two replicas of two. Every other step is kept, so that steps with and without are
of one run; the time inside ``keep`` is measured by itself too, because the difference of two steps
is smaller than what a busy machine adds. The floor is one copy and one checksum of the bytes. For
the same reason the processor time inside the heartbeats of ``mics run`` is summed up, without that
of the clock, as a share of what the rank takes of a processor: four ranks share two of them here.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ranks import run_ranks

import mics
from mics.ranks import heartbeat

RESULTS = Path(__file__).parent / "results"
RANKS, STEPS, FIRST = 4, 28, 8
MODELS = {"small": (128, 4, 24), "larger": (256, 24, 4)}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Beating:
    """Sums up the processor time inside this rank's heartbeats.

    Args:
        path: of a new file.
    """

    def __init__(self, path: Path) -> None:
        heartbeat.make_file(path)
        os.environ[heartbeat.VARIABLE] = str(path)
        heartbeat.begin_as_another_rank()
        self.seconds, self.calls, self._inside = 0.0, 0, False
        mine = heartbeat.heart()
        for name in ("in_step", "enter", "leave", "issue", "wait", "go_on"):
            setattr(mine, name, self._timed(getattr(mine, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if self._inside:  # one may call another
                return call(*args)
            self._inside = True
            empty = time.thread_time()  # what the clock itself takes here, among other work
            began = time.thread_time()
            try:
                return call(*args)
            finally:
                self.seconds += time.thread_time() - began - (began - empty)
                self.calls += 1
                self._inside = False

        return run


def measure(width: int, blocks: int, samples: int) -> dict[str, Any]:
    model = nn.Sequential(*[Block(width) for _ in range(blocks)])
    model = mics.shard(model, partition=2, mp_policy=MixedPrecisionPolicy())
    optimizer = torch.optim.AdamW(model.parameters())
    snapshots = mics.Snapshots(model, optimizer)
    snapshots.restore()
    steps: dict[bool, list[float]] = {True: [], False: []}
    keeps: list[float] = []
    rank = torch.distributed.get_rank()
    beating = Beating(Path(os.environ["MICS_MEMORY"]) / f"beat-{width}-{rank}")
    beats: list[float] = []
    works: list[float] = []
    for step in range(STEPS):
        began, before = time.perf_counter(), (beating.seconds, time.process_time())
        for x in mics.micro_steps(model, [torch.randn(samples, 16, width) for _ in range(4)]):
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        done = time.perf_counter()
        kept = step % 2 == 1
        if kept:
            snapshots.keep(step)
            keeps.append(time.perf_counter() - done)
        if step >= FIRST:
            steps[kept].append(time.perf_counter() - began)
            beats.append(beating.seconds - before[0])
            works.append(time.process_time() - before[1])
    tensors = snapshots._state.now().tensors
    num_bytes = sum(t.nbytes for t in tensors.values())
    floor = []
    source, target = (
        torch.zeros(num_bytes, dtype=torch.uint8),
        torch.empty(num_bytes, dtype=torch.uint8),
    )
    for _ in range(20):
        began = time.perf_counter()
        target.copy_(source)
        zlib.crc32(memoryview(target.numpy()))
        floor.append(time.perf_counter() - began)
    snapshots.close()
    return {
        "bytes": num_bytes,
        "tensors": len(tensors),
        "step": statistics.median(steps[False]),
        "step_kept": statistics.median(steps[True]),
        "keep": statistics.median(keeps[FIRST // 2 :]),
        "keep_quartiles": statistics.quantiles(keeps[FIRST // 2 :], n=4),
        "floor": statistics.median(floor),
        "beats": statistics.median(beats),
        "works": statistics.median(works),
        "calls": beating.calls / STEPS,
    }


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        os.environ["MICS_MEMORY"], os.environ["MICS_JOB"] = memory, "bench"
        for name, shape in MODELS.items():
            found[name] = run_ranks(measure, RANKS, *shape)[0]
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    lines = [
        "# What keeping states in memory costs",
        "",
        f"`python benchmarks/keeping_states.py`: {RANKS} Gloo ranks on {os.cpu_count()} cores, "
        f"{versions}, mics {mics.__version__}; medians of rank 0. The floor is one copy and one "
        "checksum.",
        "",
        "| state per rank | step | `keep` (quartiles) | of a step | floor | step with / without "
        "| heartbeats, of what it computes |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found.values():
        low, _, high = (1e3 * seconds for seconds in one["keep_quartiles"])
        lines.append(
            f"| {one['tensors']} tensors, {one['bytes'] / 1e6:.1f} MB "
            f"| {1e3 * one['step']:.0f} ms "
            f"| {1e3 * one['keep']:.2f} ms ({low:.2f} to {high:.2f}) "
            f"| {100 * one['keep'] / one['step']:.2f} % "
            f"| {1e3 * one['floor']:.2f} ms "
            f"| {one['step_kept'] / one['step']:.3f} "
            f"| {one['calls']:.0f} calls, {1e6 * one['beats']:.0f} us, "
            f"{100 * one['beats'] / one['works']:.3f} % |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "keeping_states.md").write_text(text)
    (RESULTS / "keeping_states.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
