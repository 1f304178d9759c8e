"""The picture of a run: loss and throughput over its steps, from ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from mics.planning.pages import colours
from mics.training.record import HELD_OUT


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Steps and evaluations of the held-out share in a metrics file, in order of step.

    A run that was resumed has written some steps twice; the later line counts.
    """
    by_kind: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "evaluation": {}}
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the process was killed while it wrote this line
            continue
        if entry.get("kind") in by_kind and entry.get("name", HELD_OUT) == HELD_OUT:
            by_kind[entry["kind"]][entry["step"]] = entry
    steps, evaluations = ([rows[n] for n in sorted(rows)] for rows in by_kind.values())
    return steps, evaluations


def plot_run(metrics: Path, picture: Path, title: str) -> bool:
    """Draw loss (in bits per byte where there are bytes) above throughput, as a PNG.

    Returns:
        False when there is no step to draw.
    """
    steps, evaluations = read_metrics(metrics)
    if not steps:
        return False
    in_bits = steps[-1]["bits_per_byte"] is not None
    unit = "bits per byte" if in_bits else "nats per token"
    key = "bits_per_byte" if in_bits else "loss"
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.grid": True}):
        figure = Figure(figsize=(9, 6.5), layout="constrained", dpi=120)
        figure.suptitle(title)
        loss, speed = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        loss.plot(*_points(steps, key), color=colours.TRAINING, linewidth=1.2, label="training")
        if evaluations:
            at, values = _points(evaluations, key)
            loss.plot(at, values, "o-", color=colours.HELD_OUT, markersize=5, label="held out")
            loss.annotate(
                f"{values[-1]:.3f}",
                (at[-1], values[-1]),
                textcoords="offset points",
                xytext=(-2, 16),
                ha="right",
                color=colours.HELD_OUT,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            )
        skipped = [entry["step"] for entry in steps if not entry["taken"]]
        for step in skipped:
            loss.axvline(step, color=colours.GREY, linestyle=":", linewidth=1)
        loss.set_ylabel(f"loss, {unit}")
        loss.legend(frameon=False)
        speed.plot(*_points(steps, "tokens_per_second"), color=colours.GREEN, linewidth=1.2)
        speed.set_ylim(bottom=0)
        speed.set_ylabel("tokens per second")
        speed.set_xlabel("step")
        for axes in (loss, speed):
            axes.grid(alpha=0.25)
            axes.spines["right"].set_visible(False)
        figure.savefig(picture)
    return True


def _points(entries: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    values = [(e["step"], math.nan if e[key] is None else e[key]) for e in entries]
    return [step for step, _ in values], [value for _, value in values]
