"""How long planning takes: a trace, 2,000 plans, one step of 16,384 GPUs, the command itself.

.venv/bin/python benchmarks/planner_speed.py
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mics.anatomy.recipe import Recipe
from mics.hardware.cluster import Cluster
from mics.hardware.lookup import find_node
from mics.planning.plan import search
from mics.planning.question import Question
from mics.planning.subject import subject
from mics.simulation.compute import times
from mics.simulation.engine_step import simulate_engine

RESULT = Path(__file__).parent / "results" / "planner_speed.json"
REPEATS = 5


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}


def timed(work: Any, repeats: int = REPEATS) -> dict[str, float]:
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    return spread(spent)


def main() -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        os.environ["MICS_CACHE"] = folder
        start = time.perf_counter()
        llama = subject("llama-8b")
        for micro_batch in (1, 2, 4):
            llama.trace(micro_batch, 4096)
        found: dict[str, Any] = {"three traces of llama-8b, seconds": time.perf_counter() - start}

        # Every way fits on these, so that each is simulated, not only weighed.
        where = Cluster(find_node("p6-b200"), 256)
        batches = tuple(range(1, 58))
        recipe = Recipe(1, sequence=512)
        question = Question(recipe, micro_batches=batches, checkpointing=(True,))
        plans = search(llama, where, question)
        number = len(plans.plans)
        found["plans"] = number
        found["ways"] = number + len(plans.rejected)
        found["plans, seconds"] = timed(lambda: search(llama, where, question), 3)
        found["2000 plans, seconds"] = found["plans, seconds"]["median"] * 2000 / number

        huge = Cluster(find_node("p5"), 2048)
        made = times(llama.trace(2, 4096), huge.node.gpu, checkpointing=True)
        recipe = Recipe(8, 2, 8, True, sequence=4096)
        found["a step of 16,384 GPUs, seconds"] = timed(
            lambda: simulate_engine("mics", llama, made, huge, recipe), 50
        )

        command = [sys.executable, "-m", "mics", "plan", "--model", "llama-8b", "--nodes", "8"]
        os.environ["MICS_CACHE"] = str(Path(folder) / "cold")
        start = time.perf_counter()
        subprocess.run([*command, "--sequence", "4096"], check=True, capture_output=True)
        found["mics plan from a cold start, seconds"] = time.perf_counter() - start
    document = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, one core",
        "torch": torch.__version__,
    } | found
    print(json.dumps(document, indent=1))
    RESULT.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
