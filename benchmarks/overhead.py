"""What mics costs over plain FSDP2 on the same HSDP mesh, and what two hops save in memory.

    python benchmarks/overhead.py            # 4 Gloo ranks on this machine
    torchrun ... benchmarks/overhead.py      # or your own ranks, GPUs included

Step time: both engines train the same model in the same processes, steps interleaved, so that
whatever else the machine does falls on both. The ratio is taken of neighbouring steps; its median
and quartiles are reported. Peak memory: one run per engine in fresh processes, the same steps,
less what the process held before the model was made.

The floor of both ratios is 1: mics issues the same collectives of the same sizes as FSDP2 does.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard as torch_fully_shard

import mics
from mics.communication.timing import slowest_seconds

RESULTS = Path(__file__).parent / "results"
ENGINES = ("fsdp2", "mics", "fsdp2 no gradient sync")


@dataclass(frozen=True)
class Workload:
    """A stack of feed-forward blocks; every rank works on its own rows."""

    ranks: int = 4
    partition: int = 2
    width: int = 768
    num_blocks: int = 6
    rows: int = 512
    micro_steps: int = 4
    steps: int = 20


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Engine:
    """A sharded model and one optimizer step of it."""

    def __init__(self, name: str, work: Workload, mesh: DeviceMesh) -> None:
        self.name = name
        self.work = work
        self.device = mesh.device_type
        torch.manual_seed(0)
        self.model: Any = nn.Sequential(*[Block(work.width) for _ in range(work.num_blocks)])
        shard = mics.fully_shard if name == "mics" else torch_fully_shard
        for block in self.model:
            shard(block, mesh=mesh)
        shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        torch.manual_seed(1 + dist.get_rank())
        self.batches = [
            torch.randn(work.rows, work.width, device=self.device) for _ in range(work.micro_steps)
        ]

    def step(self) -> None:
        micro_steps: dict[str, Callable[[], Any]] = {
            "mics": lambda: mics.micro_steps(self.model, self.batches),
            "fsdp2": lambda: self._by_hand(self.model.set_requires_all_reduce),
            "fsdp2 no gradient sync": lambda: self._by_hand(self.model.set_requires_gradient_sync),
        }
        for batch in micro_steps[self.name]():
            (self.model(batch) ** 2).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _by_hand(self, switch: Callable[[bool], None]) -> Any:
        for index, batch in enumerate(self.batches):
            switch(index == len(self.batches) - 1)
            yield batch

    def timed_step(self) -> float:
        """Seconds of one step of the slowest rank."""
        return slowest_seconds(self.step, torch.device(self.device))


def measure_time(work: Workload) -> dict[str, Any]:
    mesh = _mesh(work)
    engines = [Engine(name, work, mesh) for name in ("fsdp2", "mics")]
    for engine in engines:
        for _ in range(3):
            engine.step()
    seconds: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for step in range(work.steps):
        for engine in engines if step % 2 == 0 else engines[::-1]:
            seconds[engine.name].append(engine.timed_step())
        if dist.get_rank() == 0 and sys.stderr.isatty():
            print(f"\rstep {step + 1}/{work.steps}", end="", file=sys.stderr, flush=True)
    ratios = [b / a for a, b in zip(seconds["fsdp2"], seconds["mics"], strict=True)]
    equal = all(
        torch.equal(a.full_tensor(), b.full_tensor())
        for a, b in zip(*(engine.model.parameters() for engine in engines), strict=True)
    )
    return {
        "seconds per step": {name: _spread(times) for name, times in seconds.items()},
        "ratio of neighbouring steps": _spread(ratios),
        "weights equal to the bit at the end": equal,
    }


def measure_memory(work: Workload, name: str) -> dict[str, Any]:
    if not torch.accelerator.is_available():
        # Freed tensors go back to the system at once: resident memory is what is in use.
        ctypes.CDLL("libc.so.6").mallopt(-3, 2**16)
    mesh = _mesh(work)
    small = Engine(name, replace(work, width=8, rows=8), mesh)
    for _ in range(2):
        small.step()  # code, connections and buffers that do not depend on the model
    before = _peak_bytes_since_reset(lambda: None)
    engine = Engine(name, work, mesh)
    for _ in range(2):
        engine.step()  # optimizer states exist from here on
    peak = _peak_bytes_since_reset(lambda: [engine.step() for _ in range(4)]) - before
    peaks = torch.tensor(peak, dtype=torch.int64, device=mesh.device_type)
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    return {"peak bytes": int(peaks)}


def _mesh(work: Workload) -> DeviceMesh:
    kind = "cuda" if torch.accelerator.is_available() else "cpu"
    if not dist.is_initialized():
        if kind == "cuda":
            _choose_gpu(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    world = dist.get_world_size()
    shape = (world // work.partition, work.partition)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def _choose_gpu(local_rank: int) -> None:
    gpus = torch.accelerator.device_count()
    torch.accelerator.set_device_index(local_rank % gpus)
    if int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:
        # NCCL refuses a GPU twice on one host: ranks that share one pass for hosts of their own.
        os.environ |= {"NCCL_HOSTID": str(local_rank), "NCCL_SOCKET_IFNAME": "lo"}


def _peak_bytes_since_reset(run: Callable[[], object]) -> int:
    """The high-water mark of memory while ``run`` runs."""
    if torch.accelerator.is_available():
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    run()
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "quartile 1": low, "quartile 3": high}


# -- starting ranks and reporting ------------------------------------------------------------------


def launch(work: Workload, part: str) -> dict[str, Any]:
    """Run one part under torchrun on this machine and return what rank 0 printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(work.ranks), __file__, "--part", part]
    for name, value in asdict(work).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(work: Workload, results: dict[str, Any]) -> str:
    clock, memory = results["time"], results["memory"]
    ratio = clock["ratio of neighbouring steps"]
    base = memory["fsdp2"]["peak bytes"]
    lines = [
        "# Overhead of mics over plain FSDP2 (HSDP)",
        "",
        f"`{results['command']}`, {results['date']}, torch {results['torch']}, mics "
        f"{results['mics']}, {results['machine']}, {work.ranks} ranks, partition "
        f"{work.partition}, {work.num_blocks} blocks of width {work.width}, {work.micro_steps} "
        f"micro-steps of {work.rows} rows, {work.steps} steps interleaved.",
        "",
        "| engine | step, median (quartiles) | peak memory of a rank |",
        "|---|---|---|",
    ]
    for name in ENGINES:
        spread = clock["seconds per step"].get(name)
        step = "n/a" if spread is None else _milliseconds(spread)
        peak = memory[name]["peak bytes"]
        lines.append(f"| {name} | {step} | {peak / 2**20:.1f} MiB ({peak / base:.3f}) |")
    lines += [
        "",
        f"Step time, mics over FSDP2: {ratio['median']:.3f} (quartiles {ratio['quartile 1']:.3f} "
        f"to {ratio['quartile 3']:.3f}). Floor: 1.",
        "",
        "Weights after all steps equal to the bit: "
        f"{'yes' if clock['weights equal to the bit at the end'] else 'no'}.",
        "",
    ]
    return "\n".join(lines)


def _accelerators(ranks: int) -> str:
    if not torch.accelerator.is_available():
        return "no GPU, Gloo"
    gpus = torch.accelerator.device_count()
    shared = ", shared by the ranks over loopback sockets" if gpus < ranks else ""
    return f"{gpus} x {torch.cuda.get_device_name()}{shared}, NCCL"


def _milliseconds(spread: dict[str, float]) -> str:
    low, median, high = (spread[k] * 1e3 for k in ("quartile 1", "median", "quartile 3"))
    return f"{median:.1f} ms ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("time", *ENGINES))
    for name, value in asdict(Workload()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    arguments = vars(parser.parse_args())
    part = arguments.pop("part")
    work = Workload(**arguments)
    if part is not None:
        found = measure_time(work) if part == "time" else measure_memory(work, part)
        if dist.get_rank() == 0:
            print(json.dumps(found), flush=True)
        dist.destroy_process_group()
        return
    results: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/overhead.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "mics": mics.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_accelerators(work.ranks)}",
        "workload": asdict(work),
        "time": launch(work, "time"),
        "memory": {name: launch(work, name) for name in ENGINES},
    }
    text = report(work, results)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    name = "overhead_gpu" if torch.accelerator.is_available() else "overhead"
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
