"""The picture of a run: loss and throughput over its steps, from ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from mics.planning.pages import colours
from mics.training.page.entries import Entry, read_history
from mics.training.page.figures import measured_in


def plot_run(metrics: Path, picture: Path, title: str) -> bool:
    """Draw loss (in bits per byte where there are bytes) above throughput, as a PNG.

    Returns:
        False when there is no step to draw.
    """
    history = read_history(metrics)
    steps = history.steps
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
        for name, colour, entries in measured_in(history, key):
            at, values = _points(entries, key)
            loss.plot(at, values, "o-", color=colour, markersize=5, label=name)
            loss.annotate(
                f"{values[-1]:.3f}",
                (at[-1], values[-1]),
                textcoords="offset points",
                xytext=(-2, 16),
                ha="right",
                color=colour,
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


def _points(entries: Sequence[Entry], key: str) -> tuple[list[int], list[float]]:
    values = [(e["step"], math.nan if e[key] is None else e[key]) for e in entries]
    return [step for step, _ in values], [value for _, value in values]
