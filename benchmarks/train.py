"""What `mics train` costs over a bare FSDP2 loop: tokens per second, side by side in one run.

    python benchmarks/train.py               # 4 Gloo ranks on this machine

The bare loop is what a user of FSDP2 would write: the same transformers model, HSDP mesh, fused
AdamW, gradient clipping and batches, the all-reduce deferred to the last micro-step; no metrics, no
ledger, no agreed verdict, no tokens counted. The steps of `mics train` are those of its own loop
(`take_step`, the meter and the reporter with its console line and metrics file). Both run in the
same processes, steps interleaved; the ratio is taken of neighbouring steps.

The floor of the ratio is 1: the same computation, the same collectives of the same sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mics
from mics.communication.timing import slowest_seconds
from mics.models.building import build
from mics.ranks.skips import SkipRule
from mics.training.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from mics.training.data import Batch
from mics.training.lookout import Lookout
from mics.training.meter import Meter
from mics.training.optimisation import make_optimizer
from mics.training.progress import Progress
from mics.training.reporting import open_reporter
from mics.training.setup import Run, set_up
from mics.training.step import take_step

RESULTS = Path(__file__).parent / "results"
RANKS, PARTITION, MICRO_STEPS = 4, 2, 2


class Trainer:
    """A step as `mics train` takes it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.at = Progress()
        self.meter = Meter(
            run.model,
            micro_steps=MICRO_STEPS,
            steps=run.config.run.steps,
            tokens=run.batch.global_batch * run.sequence,
            bytes_per_token=1.0,
            flops=run.flops,
            peak_flops=None,
            device=run.device,
        )
        self.reporter = open_reporter(run, self.meter, self.at)
        self.rule, self.lookout = SkipRule(), Lookout(run.model)

    def step(self) -> float:
        run = self.run
        self.meter.begin()
        outcome = take_step(
            run.model,
            run.optimizer,
            run.micro_batches(self.at.position),
            run.config.optimizer,
            step=self.at.step + 1,
            steps=run.config.run.steps,
            count=self.meter.count,
            rule=self.rule,
        )
        self.at = self.at.after(run.batch.global_batch, outcome.targets)
        self.lookout.after_step()
        self.reporter.step(self.meter.end(self.at, outcome))
        return outcome.loss


class BareLoop:
    """A step as a user of FSDP2 writes it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        mesh = init_device_mesh(
            run.device.type,
            (RANKS // PARTITION, PARTITION),
            mesh_dim_names=("replicate", "shard"),
        )
        torch.manual_seed(run.config.run.seed)
        self.model: Any = build(run.shape, device=run.device.type)
        for block in self.model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = make_optimizer(self.model, run.config.optimizer)
        self.position = 0

    def step(self) -> float:
        for index, batch in enumerate(self.run.micro_batches(self.position)):
            self.model.set_requires_all_reduce(index == MICRO_STEPS - 1)
            (self._loss(batch) / MICRO_STEPS).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.config.optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.position += self.run.batch.global_batch
        return 0.0

    def _loss(self, batch: Batch) -> torch.Tensor:
        logits = self.model(input_ids=batch.inputs).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())


def configuration(folder: str, steps: int, micro_batch: int) -> TrainConfig:
    return TrainConfig(
        run=RunConfig(folder=Path(folder), steps=steps + 1),
        model=ModelConfig(name="gpt2-tiny"),
        data=DataConfig(tokenizer="bpe", vocabulary=1024),
        batch=BatchConfig(micro_batch=micro_batch, micro_steps=MICRO_STEPS),
        parallel=ParallelConfig(
            partition=PARTITION, gpus_per_node=RANKS, collectives="flat", dtype="fp32"
        ),
    )


def measure(folder: str, steps: int, micro_batch: int) -> dict[str, Any]:
    """Seconds of every step of both, the slowest rank's."""
    with set_up(configuration(folder, steps, micro_batch)) as run:
        with contextlib.redirect_stdout(Path(folder, f"console{dist.get_rank()}").open("w")):
            engines: dict[str, Any] = {"mics train": Trainer(run), "bare FSDP2": BareLoop(run)}
            seconds: dict[str, list[float]] = {name: [] for name in engines}
            for number in range(steps + 1):
                order = list(engines) if number % 2 else list(engines)[::-1]
                for name in order:
                    spent = slowest_seconds(engines[name].step, run.device)
                    if number:  # the first one warms up
                        seconds[name].append(spent)
            engines["mics train"].reporter.__exit__(None, None, None)
        tokens = run.batch.global_batch * run.sequence
    return {"seconds": seconds, "tokens per step": tokens, "parameters": run.parameters}


# -- report ----------------------------------------------------------------------------------------


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    ours, bare = found["seconds"]["mics train"], found["seconds"]["bare FSDP2"]
    ratios = [b / a for a, b in zip(ours, bare, strict=True)]
    return {
        "tokens per second": {
            name: _spread([found["tokens per step"] / s for s in seconds])
            for name, seconds in found["seconds"].items()
        },
        "ratio": _spread(ratios),
        "steps": len(ours),
        "tokens per step": found["tokens per step"],
        "parameters": found["parameters"],
    }


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"quartile 1": low, "median": median, "quartile 3": high}


def as_text(results: dict[str, Any]) -> str:
    rate, ratio = results["tokens per second"], results["ratio"]
    rows = [
        f"| {name} | {s['median']:,.0f} ({s['quartile 1']:,.0f} to {s['quartile 3']:,.0f}) |"
        for name, s in rate.items()
    ]
    return "\n".join(
        [
            "# Throughput of mics train against a bare FSDP2 loop",
            "",
            f"`{results['command']}`, {results['date']}, torch {results['torch']}, mics "
            f"{results['mics']}, {results['machine']}, {RANKS} Gloo ranks, partition {PARTITION}, "
            f"GPT-2 of {results['parameters']:,} parameters, {MICRO_STEPS} micro-steps, "
            f"{results['tokens per step']:,} tokens a step, {results['steps']} steps interleaved.",
            "",
            "| loop | tokens per second, median (quartiles) |",
            "|---|---|",
            *rows,
            "",
            f"mics train over bare FSDP2: {ratio['median']:.3f} (quartiles "
            f"{ratio['quartile 1']:.3f} to {ratio['quartile 3']:.3f}). Floor: 1.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        found = measure(options.part, options.steps, options.micro_batch)
        if dist.get_rank() == 0:
            print(json.dumps(found), flush=True)
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(RANKS), __file__]
        command += ["--part", folder, "--steps", str(options.steps)]
        command += ["--micro-batch", str(options.micro_batch)]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
    found = json.loads(done.stdout.splitlines()[-1])
    results = summarise(found) | {
        "command": " ".join(["python", "benchmarks/train.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "mics": mics.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
    }
    text = as_text(results)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "train.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "train.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
