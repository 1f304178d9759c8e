"""The picture of a comparison: a bar per engine, and what physics would allow it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from mics.benching.side_by_side import Compared, computation_of
from mics.planning.pages import colours


def plot_comparison(
    compared: Sequence[Compared], picture: Path, title: str, link_bits: float | None
) -> None:
    """Draw the median step of every engine with its quartiles, as a PNG.

    Args:
        compared: engines, each in its colour; the others are told in times of the first one.
        picture: file to write.
        title: one line above.
        link_bits: bits per second of a node's link, if known.
    """
    computation = computation_of(compared)
    engines = [one for one in compared if one.engine != "computation"]
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False}):
        figure = Figure(figsize=(9, 1.2 + 0.55 * len(engines)), layout="constrained", dpi=120)
        figure.suptitle(title, fontsize=12)
        axes = figure.subplots()
        for row, one in enumerate(engines):
            spent = one.seconds
            around = [[spent.median - spent.low], [spent.high - spent.median]]
            colour = colours.of_engine(one.engine)
            axes.barh(row, spent.median, xerr=around, color=colour, height=0.6, ecolor="#555555")
            ratio = "" if row == 0 else f"  {one.ratio.median:.2f} x"
            axes.annotate(
                f"{spent.median:.2f} s{ratio}",
                (spent.high, row),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
            )
            limit = None if computation is None else one.limit(computation, link_bits)
            if limit is not None:
                label = "computation, or bytes over line rate" if row == 0 else None
                ends = (row - 0.36, row + 0.36)
                axes.plot([limit, limit], ends, color=colours.LIMIT, linewidth=2, label=label)
        if computation is not None:
            axes.axvline(computation, color=colours.GREEN, linestyle=":", label="computation")
        axes.set_yticks(range(len(engines)), [one.engine for one in engines])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max(one.seconds.high for one in engines))
        axes.set_xlabel("seconds per step")
        axes.spines["right"].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(frameon=False, loc="outside lower right", ncols=2)
        figure.savefig(picture)
