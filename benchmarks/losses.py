"""Losses of `mics train` beside those of one process, step by step.

    python benchmarks/losses.py              # 4 Gloo ranks, then one process, on this machine

Both train a preset in fp32 with the same seed, data and sequences per step, by `mics train` itself:
4 ranks (partition 2, 2 replicas, 2 micro-steps) against one process. Sums are rounded in another
order, and a router of experts turns a rounding into another choice where two experts are as good.
What rounding alone does is seen beside it: the one process again, in 2 micro-steps. A model with a
router loss is compared at equal micro-batches, which that loss depends on, so that it has no such
control.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from matplotlib.figure import Figure

import mics

RESULTS = Path(__file__).parent / "results"
GLOBAL_BATCH, MICRO_BATCH, SEQUENCE = 16, 2, 64
SPLIT = {"ranks": 4, "partition": 2, "gpus-per-node": 2}
ALONE = {"ranks": 1, "partition": 1, "gpus-per-node": 1}
CASES: dict[str, list[str]] = {
    "qwen3-moe-tiny": [],
    "qwen3-moe-tiny, router loss 0.01": ["--model.router-loss", "0.01"],
    "llama-tiny (dense)": [],
}
FAR = (1e-6, 1e-5, 1e-4, 1e-3)


def runs_of(name: str) -> dict[str, tuple[dict[str, int], int]]:
    """Layout and micro-steps of each run of a case; the first is compared with the second."""
    if CASES[name]:
        return {"4 ranks": (SPLIT, 2), "one process": (ALONE, GLOBAL_BATCH // MICRO_BATCH)}
    return {
        "4 ranks": (SPLIT, 2),
        "one process": (ALONE, 1),
        "one process, 2 micro-steps": (ALONE, 2),
    }


def train(
    folder: Path, name: str, layout: dict[str, int], micro_steps: int, steps: int
) -> list[dict[str, Any]]:
    """Run `mics train` and return its steps, and its last evaluation behind them."""
    command = [sys.executable, "-m", "mics", "train", "--run.folder", str(folder)]
    command += ["--run.steps", str(steps), "--model.name", name.split(",")[0].split(" ")[0]]
    command += ["--data.tokenizer", "bpe", "--data.vocabulary", "1024", *CASES[name]]
    command += ["--data.limit", "3000000", "--data.sequence", str(SEQUENCE)]
    command += ["--batch.global-batch", str(GLOBAL_BATCH), "--batch.micro-steps", str(micro_steps)]
    command += ["--optimizer.learning-rate", "2e-3", "--optimizer.warmup", "20"]
    command += ["--parallel.dtype", "fp32", "--parallel.collectives", "flat"]
    command += [word for key, n in layout.items() for word in (f"--parallel.{key}", str(n))]
    command += ["--evaluation.every", "0", "--evaluation.sequences", "128"]
    command += ["--evaluation.sample", "0", "--checkpoint.every", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment)
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["kind"] in ("step", "evaluation")]


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Each run beside the one process: relative differences, and when they exceed a bound."""
    steps = {of: [entry for entry in run if entry["kind"] == "step"] for of, run in runs.items()}
    alone = [step["loss"] for step in steps["one process"]]
    found = {}
    for of, run in steps.items():
        losses = [step["loss"] for step in run]
        apart = [abs(a - b) / b for a, b in zip(losses, alone, strict=True)]
        found[of] = {
            "losses": losses,
            "router losses": [step["router_loss"] for step in run],
            "held out": runs[of][-1]["loss"],
            "largest relative difference": max(apart),
            "in step": apart.index(max(apart)) + 1,
            "first step beyond": {
                f"{bound:g}": next((n for n, d in enumerate(apart, 1) if d > bound), None)
                for bound in FAR
            },
            "steps with traffic as predicted": sum(step["traffic_as_predicted"] for step in run),
        }
    return found


def as_text(results: dict[str, Any]) -> str:
    """The results as a page."""
    rows = []
    for name, runs in results["cases"].items():
        for of, found in runs.items():
            beyond = [str(found["first step beyond"][f"{bound:g}"] or "none") for bound in FAR]
            apart = f"{found['largest relative difference']:.1e} (step {found['in step']})"
            cells = [name, of, f"{found['losses'][-1]:.5f}", f"{found['held out']:.5f}"]
            cells += ["", *[""] * len(FAR)] if of == "one process" else [apart, *beyond]
            rows.append(f"| {' | '.join(cells)} |")
    heads = " | ".join(f"beyond {bound:g}" for bound in FAR)
    equal = [
        f["steps with traffic as predicted"] for c in results["cases"].values() for f in c.values()
    ]
    return "\n".join(
        [
            "# Losses of mics train beside one process",
            "",
            f"`{results['command']}`, {results['date']}, torch {results['torch']}, transformers "
            f"{results['transformers']}, mics {results['mics']}, {results['machine']}, fp32, "
            f"{results['steps']} steps of {GLOBAL_BATCH} sequences of {SEQUENCE} tokens, 3 MB of "
            "the standard library as text. 4 Gloo ranks: p = 2, 2 replicas, 2 micro-steps. One "
            "process: 1 micro-step; with a router loss "
            f"{GLOBAL_BATCH // MICRO_BATCH}, so that both have micro-batches of {MICRO_BATCH}.",
            "",
            "Losses are nats per token, differences those from one process, relative; the last "
            "columns are the first step whose losses differ by more than that.",
            "",
            f"| model | run | last step | held out | largest difference | {heads} |",
            "|---" * (5 + len(FAR)) + "|",
            *rows,
            "",
            f"Counted = predicted bytes on every rank: at least {min(equal)} of "
            f"{results['steps']} steps of each run.",
        ]
    )


def draw(cases: dict[str, Any], to: Path) -> None:
    """Losses above, below how far they are from those of one process; a column for each case."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False}):
        figure = Figure(figsize=(4.2 * len(cases), 6.2), layout="constrained")
        above, below = figure.subplots(2, len(cases), sharex=True, sharey="row", squeeze=False)
        for column, (name, runs) in enumerate(cases.items()):
            alone = runs["one process"]["losses"]
            for color, (of, found) in zip(_COLORS, runs.items(), strict=False):
                steps = range(1, len(alone) + 1)
                above[column].plot(steps, found["losses"], color=color, linewidth=1, label=of)
                if of == "one process":
                    continue
                apart = [abs(a - b) / b for a, b in zip(found["losses"], alone, strict=True)]
                seen = [max(one, _LEAST) for one in apart]
                below[column].semilogy(steps, seen, color=color, linewidth=1, label=of)
            above[column].set_title(name, fontsize=10)
            above[column].legend(frameon=False)
            below[column].set_xlabel("step")
        above[0].set_ylabel("loss, nats per token")
        below[0].set_ylabel("relative difference from one process")
        figure.savefig(to, dpi=110)


_COLORS = ("tab:blue", "black", "tab:orange")
_LEAST = 1e-8  # equal losses are drawn here


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    cases = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            runs = {
                of: train(Path(scratch, of), name, *how, options.steps)
                for of, how in runs_of(name).items()
            }
        cases[name] = compare(runs)
    report(cases, options.steps)


def report(cases: dict[str, Any], steps: int) -> None:
    """Print and keep what was found."""
    results = {
        "cases": cases,
        "steps": steps,
        "command": " ".join(["python", "benchmarks/losses.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mics": mics.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
    }
    text = as_text(results)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "losses.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "losses.md").write_text(text + "\n\n![losses](losses.png)\n")
    draw(cases, RESULTS / "losses.png")


if __name__ == "__main__":
    main()
