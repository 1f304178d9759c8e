"""Plans and curves as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from mics.planning.pages import colours
from mics.planning.plan import Plan, best_of_partitions
from mics.quantities import GIB

Curves = Mapping[str, Sequence[tuple[float, float]]]
_LOOK: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}


def draw(picture: Path, title: str, plans: Sequence[Plan], scaling: Curves) -> None:
    """Draw memory of the best plan of every partition, and what a GPU keeps of its speed."""
    with matplotlib.rc_context(_LOOK):
        figure = Figure(figsize=(9, 8), layout="constrained", dpi=120)
        figure.suptitle(title)
        memory, speed = figure.subplots(2, 1)
        _memory(memory, best_of_partitions(plans))
        _per_gpu(speed, scaling)
        figure.savefig(picture, format="png")


def draw_scaling(picture: Path, title: str, curves: Curves) -> None:
    """Draw tokens per second over GPUs, and speed per GPU against the fewest."""
    with matplotlib.rc_context(_LOOK):
        figure = Figure(figsize=(9, 7), layout="constrained", dpi=120)
        figure.suptitle(title)
        speed, efficiency = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        _curves(speed, curves)
        speed.set_xlabel("")
        for name, line in curves.items():
            base = line[0][1] / line[0][0]
            shares = [100 * y / x / base for x, y in line]
            efficiency.plot([x for x, _ in line], shares, "o-", color=colours.of_engine(name))
        efficiency.set_ylabel("% of the speed per GPU")
        _over_gpus(efficiency, curves)
        figure.savefig(picture, format="png")


def _memory(axes: Any, plans: Sequence[Plan]) -> None:
    needs = [plan.need for plan in plans]
    kinds = [kind for kind in vars(needs[0]) if any(vars(need)[kind] for need in needs)]
    left = [0.0] * len(plans)
    for kind in kinds:
        sizes = [vars(need)[kind] / GIB for need in needs]
        label = kind.replace("_", " ")
        axes.barh(
            range(len(plans)),
            sizes,
            left=left,
            color=colours.of_memory(kind),
            label=label,
            height=0.7,
        )
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    lost = [plan.needed / GIB - end for plan, end in zip(plans, left, strict=True)]
    axes.barh(
        range(len(plans)),
        lost,
        left=left,
        color=colours.of_memory("fragmentation"),
        label="fragmentation",
        height=0.7,
    )
    axes.set_xlim(right=1.02 * plans[0].cluster.node.gpu.memory / GIB)
    axes.axvline(
        plans[0].cluster.node.gpu.memory / GIB, color=colours.LIMIT, label="a GPU's memory"
    )
    axes.set_yticks(range(len(plans)), [str(plan.way) for plan in plans])
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18))


def _per_gpu(axes: Any, curves: Curves) -> None:
    for name, line in curves.items():
        gpus, each = [x for x, _ in line], [y / x for x, y in line]
        axes.plot(gpus, each, "o-", color=colours.of_engine(name), label=name)
    axes.set_ylim(0, 1.08 * max(y / x for line in curves.values() for x, y in line))
    axes.set_ylabel("tokens per second and GPU")
    _over_gpus(axes, curves)
    axes.legend(frameon=False)


def _over_gpus(axes: Any, curves: Curves) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([x for x, _ in next(iter(curves.values()))])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("GPUs")
    axes.grid(alpha=0.25)


def _curves(axes: Any, curves: Curves) -> None:
    for name, line in curves.items():
        xs, ys = [x for x, _ in line], [y for _, y in line]
        axes.plot(xs, ys, "o-", color=colours.of_engine(name), label=name)
    first = next(iter(curves.values()))
    ideal = [first[0][1] * x / first[0][0] for x, _ in first]
    axes.plot([x for x, _ in first], ideal, ":", color="#555555", label="ideal")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("tokens per second")
    _over_gpus(axes, curves)
    axes.legend(frameon=False)
