"""Losses of `mics train` with hop 2 in fewer bits, beside fp32's, over several seeds.

    python benchmarks/hop_two_losses.py                       # small: 100 steps, 1 seed
    python benchmarks/hop_two_losses.py --steps 500 --seeds 3 --out benchmarks/results # 90 min

One model at a time may be measured (``--models bert``): results of the other in the folder stay, if
they are of as many steps and seeds.

A GPT and a BERT of 5.6 million parameters train in fp32 on 2 Gloo ranks of this machine
(2 replicas of one rank, 2 micro-steps) in every choice of ``hop_two``, fp8 and int8 also without
error feedback. The BERT, whose norms come after its layers, stays at the entropy of single tokens
at the GPT's learning rate, whatever hop 2 sends; it has a lower one, and twice the batch. Compared
is the mean of the last losses: the difference from fp32's, seed by seed, beside the spread of
fp32's seeds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mics

LAST = 100  # steps whose losses are averaged, or a fifth of all
WIDTH, LAYERS, HEADS, VOCABULARY, SEQUENCE = 256, 7, 8, 1024, 64
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {
        "model_type": "gpt2",
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": SEQUENCE,
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    },
    "bert": {
        "model_type": "bert",
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": SEQUENCE,
        "vocab_size": VOCABULARY,
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    },
}


@dataclass(frozen=True)
class Training:
    """How a model is trained: with which peak learning rate, and sequences of a micro-batch."""

    rate: str
    sequences: int


TRAININGS = {"gpt": Training("1e-3", 2), "bert": Training("3e-4", 4)}
FEEDBACK = "--parallel.no-error-feedback"
CHOICES: dict[str, list[str]] = {
    "fp32": [],
    "bf16": ["--parallel.hop-two", "bf16"],
    "fp8": ["--parallel.hop-two", "fp8"],
    "int8": ["--parallel.hop-two", "int8"],
    "fp8 without feedback": ["--parallel.hop-two", "fp8", FEEDBACK],
    "int8 without feedback": ["--parallel.hop-two", "int8", FEEDBACK],
}


def train(folder: Path, model: str, choice: str, seed: int, steps: int) -> list[float]:
    """Run `mics train` and return its losses."""
    folder.mkdir()
    config = folder / "config.json"
    config.write_text(json.dumps(MODELS[model]))
    run = folder / "run"
    command = [sys.executable, "-m", "mics", "train", "--run.folder", str(run)]
    command += ["--run.steps", str(steps), "--run.seed", str(seed), "--model.name", str(config)]
    command += ["--data.tokenizer", "bpe", "--data.vocabulary", str(VOCABULARY)]
    command += ["--data.limit", "3000000", "--data.sequence", str(SEQUENCE)]
    how = TRAININGS[model]
    command += ["--batch.micro-batch", str(how.sequences), "--batch.micro-steps", "2"]
    command += ["--optimizer.learning-rate", how.rate, "--optimizer.warmup", str(steps // 10)]
    command += ["--parallel.ranks", "2", "--parallel.partition", "1"]
    command += ["--parallel.gpus-per-node", "1", "--parallel.dtype", "fp32"]
    command += ["--evaluation.every", "0", "--evaluation.sample", "0", "--checkpoint.every", "0"]
    command += ["--checkpoint.no-memory", *CHOICES[choice]]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment)
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    taken = [entry for entry in entries if entry["kind"] == "step"]
    assert all(entry["traffic_as_predicted"] for entry in taken)
    losses = [entry["loss"] for entry in taken]
    print(f"{model}, {choice}, seed {seed}: {last_of(losses):.4f}", file=sys.stderr, flush=True)
    return losses


def last_of(losses: list[float]) -> float:
    """Average the last losses of a run."""
    return statistics.fmean(losses[-min(LAST, max(1, len(losses) // 5)) :])


def row_of(choice: str, of_seeds: list[list[float]], exact: list[list[float]]) -> dict[str, Any]:
    """One choice beside fp32: the mean difference, in nats and in the spread of fp32's seeds."""
    ours, theirs = [last_of(run) for run in of_seeds], [last_of(run) for run in exact]
    difference = statistics.fmean(a - b for a, b in zip(ours, theirs, strict=True))
    spread = max(theirs) - min(theirs)
    return {
        "choice": choice,
        "last": ours,
        "difference": difference,
        "of spread": abs(difference) / spread if spread else None,
    }


def as_text(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Losses with hop 2 in fewer bits",
        "",
        "; ".join(f"{model}: {measured}" for model, measured in results["measured"].items())
        + f"; torch {results['torch']}, mics {results['mics']}, {results['machine']}, fp32, 2 Gloo "
        "ranks: 2 replicas of one, "
        f"2 micro-steps of sequences of {SEQUENCE} tokens; {results['steps']} steps, "
        f"{results['seeds']} seed(s). Losses are nats per token, means of the last steps.",
        "",
        "| model | hop 2 | last losses | difference from fp32 | of the spread of fp32's seeds |",
        "|---|---|---|---|---|",
    ]
    for model, rows in results["models"].items():
        for row in rows:
            last = ", ".join(f"{loss:.4f}" for loss in row["last"])
            share = "n/a" if row["of spread"] is None else f"{row['of spread']:.2f}"
            lines.append(
                f"| {model} | {row['choice']} | {last} | {row['difference']:+.4f} | {share} |"
            )
    return "\n".join(lines)


def write(results: dict[str, Any], folder: Path) -> None:
    (folder / "hop_two_losses.md").write_text(as_text(results) + "\n")
    (folder / "hop_two_losses.json").write_text(json.dumps(results, indent=1) + "\n")


def take_over(results: dict[str, Any], folder: Path) -> None:
    """Keep what was measured before of as many steps and seeds."""
    file = folder / "hop_two_losses.json"
    if not file.exists():
        return
    before = json.loads(file.read_text())
    if all(before[what] == results[what] for what in ("steps", "seeds", "torch", "machine")):
        for part in ("measured", "models"):
            results[part] = dict(before[part])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--out", type=Path, help="a folder for the results; else they are printed")
    given = parser.parse_args()
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "mics": mics.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "steps": given.steps,
        "seeds": given.seeds,
        "measured": {},
        "models": {},
    }
    command = f"`python benchmarks/hop_two_losses.py {' '.join(sys.argv[1:])}`"
    if given.out is not None:
        take_over(results, given.out)
    with tempfile.TemporaryDirectory() as scratch:
        for model in given.models:
            how = TRAININGS[model]
            results["measured"][model] = (
                f"{command}, {datetime.date.today().isoformat()}, {how.sequences} sequences a "
                f"micro-step, learning rate {how.rate}"
            )
            runs: dict[str, list[list[float]]] = {}
            for choice in dict.fromkeys(["fp32", *given.choices]):
                folders = [Path(scratch) / f"{model} {choice} {n}" for n in range(given.seeds)]
                runs[choice] = [
                    train(folder, model, choice, seed, given.steps)
                    for seed, folder in enumerate(folders)
                ]
                rows = [row_of(one, of_seeds, runs["fp32"]) for one, of_seeds in runs.items()]
                results["models"][model] = rows
                if given.out is not None:  # what is there stays, should the rest be cut short
                    write(results, given.out)
    print(as_text(results))


if __name__ == "__main__":
    main()
