"""Weights for an inference engine: ``mics.gathered`` beside ``full_tensor`` on every parameter.

    python benchmarks/gathered_weights.py

Four Gloo ranks, two replicas of two; a transformer's shapes, so that many parameters are small.
Rounds take turns in one run. Bytes are those of gathered buffers on one rank; the third contestant
sends 16 bits, as an engine would hold them.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ranks import run_ranks

import mics

RESULTS = Path(__file__).parent / "results"
RANKS, PARTITION, WIDTH, BLOCKS, ROUNDS = 4, 2, 256, 12, 15


def every_full_tensor(model: nn.Module) -> int:
    return sum(
        value.full_tensor().nbytes if isinstance(value, DTensor) else value.nbytes
        for value in model.state_dict().values()
    )


def walk(model: nn.Module, replica: int | None, dtype: torch.dtype | None = None) -> int:
    return sum(value.nbytes for _, value in mics.gathered(model, replica=replica, dtype=dtype))


CONTESTANTS: dict[str, Callable[[nn.Module], int]] = {
    "full_tensor, every parameter": every_full_tensor,
    "mics.gathered, each replica": lambda model: walk(model, None),
    "mics.gathered, one replica": lambda model: walk(model, 0),
    "mics.gathered, one replica, bf16": lambda model: walk(model, 0, torch.bfloat16),
}


def measure() -> dict[str, Any]:
    block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True)
    model = nn.TransformerEncoder(block, BLOCKS, enable_nested_tensor=False)
    policy = MixedPrecisionPolicy()
    mics.shard(model, partition=PARTITION, blocks=list(model.layers), mp_policy=policy)
    found: dict[str, Any] = {}
    for name, run in CONTESTANTS.items():
        run(model)  # groups are made, and who gathers with whom is found out
        with CommDebugMode() as seen:
            num_bytes = run(model)
        found[name] = {"bytes": num_bytes, "messages": seen.get_total_counts(), "seconds": []}
    for _ in range(ROUNDS):
        for name, run in CONTESTANTS.items():
            dist.barrier()
            began = time.perf_counter()
            run(model)
            found[name]["seconds"].append(time.perf_counter() - began)
    return found


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = run_ranks(measure, RANKS)[0]
    base = next(iter(found.values()))["seconds"]
    lines = [
        "# Weights for an inference engine",
        "",
        f"`python benchmarks/gathered_weights.py`: {RANKS} Gloo ranks, {RANKS // PARTITION} "
        f"replicas of {PARTITION}, on {os.cpu_count()} cores; torch {torch.__version__}, "
        f"Python {platform.python_version()}, mics {mics.__version__}. Rank 0 of {ROUNDS} rounds.",
        "",
        "| | collectives of rank 0 | bytes handed out | median | of full_tensor's (quartiles) |",
        "|---|---|---|---|---|",
    ]
    for name, one in found.items():
        ratios = [mine / theirs for mine, theirs in zip(one["seconds"], base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(
            f"| {name} | {one['messages']} | {one['bytes'] / 2**20:.1f} MiB "
            f"| {1e3 * statistics.median(one['seconds']):.0f} ms "
            f"| {middle:.2f} ({low:.2f} to {high:.2f}) |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "gathered_weights.md").write_text(text)
    (RESULTS / "gathered_weights.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
