"""How long all ranks stand still when one is killed: under `mics run`, and under torchrun.

    python benchmarks/restarts.py            # 4 Gloo ranks on this machine, Linux

Ranks train a tiny sharded model by mics and write their step, and where the time went, into files.
Random ranks get SIGKILL at random moments; the time ends when every rank has made a step again.
The parts are of the rank that is slowest to the step. What a heartbeat costs is timed by itself.
"""

from __future__ import annotations

import argparse
import contextlib
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
import time
from pathlib import Path

from mics.ranks.heartbeat import Heart, make_file

RESULTS = Path(__file__).parent / "results"
RANKS = 4
TRAIN = """
import time
began = time.monotonic()
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch import nn
import mics
from mics.ranks.heartbeat import at_step

imported = time.monotonic()
mesh = mics.init_mesh(partition=2)
joined = time.monotonic()
model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)])
model = mics.shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters())
built = time.monotonic()
rank = dist.get_rank()
file = Path(sys.argv[1]) / str(rank)
newest = torch.tensor(json.loads(file.read_text())["step"] if file.exists() else 0)
dist.all_reduce(newest, dist.ReduceOp.MIN)
step, first = int(newest), None
while True:
    at_step(step + 1)
    for x in mics.micro_steps(model, [torch.randn(8, 64)] * 2):
        model(x).sum().backward()
    mics.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    first = first or time.monotonic()
    told = dict(step=step, pid=os.getpid(), began=began, imported=imported, joined=joined)
    told |= dict(built=built, stepped=first)
    file.with_suffix(".new").write_text(json.dumps(told))
    file.with_suffix(".new").replace(file)
    time.sleep(0.1)
"""
PARTS = ("start", "import", "join", "build", "first step")


def read(folder: Path, rank: int) -> dict[str, float] | None:
    with contextlib.suppress(FileNotFoundError):
        return json.loads((folder / str(rank)).read_text())
    return None


def wait_for_other(folder: Path, pids: dict[int, float]) -> list[dict[str, float]]:
    """Wait until every rank is another process than before and has made a step."""
    until = time.monotonic() + 180
    while time.monotonic() < until:
        told = [read(folder, rank) for rank in range(RANKS)]
        if all(t is not None and t["pid"] != pids.get(r) for r, t in enumerate(told)):
            return [t for t in told if t is not None]
        time.sleep(0.005)
    raise SystemExit("the ranks did not begin again within 180 s")


def measure(command: list[str], kills: int, seed: int) -> dict[str, list[float]]:
    """Kill ranks; returns seconds: the cold start, every recovery, and its parts."""
    chance = random.Random(seed)
    found: dict[str, list[float]] = {"cold": [], "recovery": [], **{part: [] for part in PARTS}}
    with tempfile.TemporaryDirectory() as name, Path(name, "log").open("w") as log:
        folder, script = Path(name), Path(name, "train.py")
        script.write_text(TRAIN)
        began = time.monotonic()
        words = [*command, str(script), name]
        job = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        try:
            told = wait_for_other(folder, {})
            found["cold"].append(time.monotonic() - began)
            for _ in range(kills):
                time.sleep(chance.uniform(0.5, 2.0))
                pids = {rank: t["pid"] for rank, t in enumerate(told)}
                began = time.monotonic()
                os.kill(int(pids[chance.randrange(RANKS)]), signal.SIGKILL)
                told = wait_for_other(folder, pids)
                last = max(told, key=lambda t: t["stepped"])
                times = [began, *(last[k] for k in ("began", "imported", "joined", "built"))]
                times.append(last["stepped"])
                found["recovery"].append(times[-1] - began)
                for part, a, b in zip(PARTS, times, times[1:], strict=False):
                    found[part].append(b - a)
        finally:
            job.send_signal(signal.SIGTERM)
            try:
                job.wait(60)
            except subprocess.TimeoutExpired:
                job.kill()
    return found


def microseconds_per_beat() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "heartbeat")
        make_file(path)
        heart = Heart(str(path))
        key = ("all-gather", 1024, "group 3: 0-3")

        def collective() -> None:
            heart.issue()
            heart.wait(key, "")
            heart.go_on()

        found = {}
        for what, call in (("collective", collective), ("step", lambda: heart.in_step(1, 1))):
            times = []
            for _ in range(20):
                began = time.perf_counter()
                for _ in range(5000):
                    call()
                times.append((time.perf_counter() - began) / 5000 * 1e6)
            found[what] = min(times)
        return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--torchrun-kills", type=int, default=4)
    options = parser.parse_args()
    agent = [sys.executable, "-m", "mics", "run", "--ranks-per-node", str(RANKS)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    load = [os.getloadavg()[0]]
    rows = {
        "mics run": measure([*agent, "--restarts", "1000", "--"], options.kills, 0),
        "torchrun": measure([*torchrun, "--max-restarts", "1000"], options.torchrun_kills, 0),
    }
    load.append(os.getloadavg()[0])
    beats = microseconds_per_beat()
    import torch

    lines = [
        "# Seconds from SIGKILL of a rank until all ranks step again",
        "",
        f"`python benchmarks/restarts.py --kills {options.kills} --torchrun-kills "
        f"{options.torchrun_kills}`, {datetime.date.today()}, torch {torch.__version__}, "
        f"{platform.machine()}, {os.cpu_count()} cores with a load of {load[0]:.0f} before and "
        f"{load[1]:.0f} after, no GPU, Gloo, "
        f"{RANKS} ranks, partition 2, a tiny model, SIGKILL of a random rank at a random moment. "
        "No state is restored. Parts are medians, of the rank that stepped last.",
        "",
        "| | kills | median | worst | " + " | ".join(PARTS) + " | cold start |",
        "|---|---|---|---|" + "---|" * len(PARTS) + "---|",
    ]
    for name, found in rows.items():
        recovery = found["recovery"]
        parts = " | ".join(f"{statistics.median(found[part]):.2f}" for part in PARTS)
        lines.append(
            f"| {name} | {len(recovery)} | {statistics.median(recovery):.2f} | "
            f"{max(recovery):.2f} | {parts} | {found['cold'][0]:.1f} |"
        )
    lines += [
        "",
        "start: from the signal until the new process runs the program (seen, told, all killed and "
        "reaped, forked; under torchrun a new Python). A heartbeat costs a rank "
        f"{beats['collective']:.2f} us per collective and {beats['step']:.2f} us per micro-step "
        "(the least of 20 means of 5,000).",
        "",
    ]
    (RESULTS / "restarts.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
