"""A plan as one page of HTML that needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mics.hardware.stacks import find_stack
from mics.planning.charts import curves, memory_bars, pareto, step_bars, step_timeline
from mics.planning.cost import Price, as_dollars
from mics.planning.pages.document import (
    Figure,
    Section,
    command,
    document,
    facts,
    lead,
    paragraphs,
    table,
)
from mics.planning.plan import Plan, best_of_partitions
from mics.planning.table import COLUMNS, cells
from mics.planning.weighing import simulate_recipe
from mics.quantities import GIB, count
from mics.version import __version__

_ON_A_PHONE = ("nodes", "p", "micro-batch", "memory", "step", "$/B tokens")


@dataclass(frozen=True)
class Asked:
    """What was asked, and how: the words of a page that plans do not have.

    Args:
        title: model and cluster.
        command: that made the page.
        training: the command that trains as the best plan says.
        price: of the best plan, and of a whole run if its tokens were given.
        caveats: what a reader must know of the figures.
    """

    title: str
    command: str
    training: str
    price: Price
    caveats: Sequence[str]


def page(
    asked: Asked,
    plans: Sequence[Plan],
    swept: Sequence[Plan],
    scaling: Mapping[str, Sequence[tuple[float, float]]],
) -> str:
    """Write the page.

    Args:
        asked: title, commands and price.
        plans: of the cluster asked for, with reasons, the best first.
        swept: the best plan of every number of nodes that was tried.
        scaling: tokens per second over GPUs, by engine.
    """
    best, partitions = plans[0], best_of_partitions(plans)
    top = lead(f"Take {best.reason}.") + facts(_facts(best, asked.price))
    top += paragraphs(
        ["To train so, on every node (HEAD is the first one):"], small=True
    ) + command(asked.training)
    sections = [
        Section("Plans, the best first", html=_table(plans[:12])),
        Section(
            "Memory of a GPU, the best plan of every partition",
            memory_bars(partitions),
            note="The largest moment of a step. The dotted line is what the GPU has; p is the "
            "partition, b the micro-batch.",
        ),
        Section("Where the time of a step goes", step_bars(partitions)),
        _first_micro_step(best),
        Section("Tokens per second and GPU, every GPU with the same work", _scaling(scaling)),
    ]
    if swept:
        sections.append(Section("The best plan on other numbers of nodes", html=_table(swept)))
    priced = pareto([*plans, *swept])
    if priced is not None:
        sections.append(Section("Dollars for a billion tokens, against speed", priced))
    stack = find_stack(best.way.stack)
    small = [
        f"Software stack {stack.name}: {stack.calibrated}.",
        *asked.caveats,
        f"Simulated by mics {__version__}, nothing was run. The command of this page:",
    ]
    below = paragraphs(small, small=True) + command(asked.command)
    sections.append(Section("How it was worked out", html=below))
    return document(asked.title, top, sections)


def _facts(best: Plan, price: Price) -> dict[str, str]:
    gpus, way, capacity = best.cluster.gpus, best.way, best.cluster.node.gpu.memory
    words = {
        "partition x replicas": f"{way.partition} x {gpus // way.partition}",
        "micro-batch x micro-steps": f"{way.micro_batch} x {way.micro_steps}",
        "step": f"{best.seconds:.3f} s",
        "tokens per second": f"{best.tokens_per_second:,.0f}",
        "MFU": f"{best.mfu:.1%}",
        "memory of a GPU": f"{best.needed / GIB:.1f} of {capacity / GIB:.4g} GiB",
        "a billion tokens": as_dollars(price.billion_tokens),
    }
    tokens = price.tokens
    whole = "the run (--tokens)" if tokens is None else f"{count(int(tokens))} tokens"
    days = "n/a" if price.days is None else f"{price.days:,.1f} days"
    words[f"{whole}: price"] = as_dollars(price.run)
    words[f"{whole}: time"] = days
    words["planned (UTC)"] = time.strftime("%Y-%m-%d", time.gmtime())
    return words


def _first_micro_step(best: Plan) -> Section:
    # Two micro-steps show the first, however many there are.
    way = replace(best.way, micro_steps=min(best.way.micro_steps, 2))
    simulated = simulate_recipe("mics", best.anatomy, best.cluster, way, timeline=True)
    spans = simulated.step.timeline
    computed = [span for span in spans if span.stream == "compute"]
    first = computed[: len(computed) // way.micro_steps]
    return Section(
        "First micro-step of the best plan, one row for each stream of a GPU",
        step_timeline(spans, first[-1].end),
        note="It opens on the turn from forward to backward. Drag to zoom, a double click shows "
        "that again.",
    )


def _scaling(scaling: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    return curves({name: [(x, y / x) for x, y in line] for name, line in scaling.items()})


def _table(plans: Sequence[Plan]) -> str:
    rows = [(f"{plan.cluster.nodes}", *cells(plan)) for plan in plans]
    return table(("nodes", *(column.name for column in COLUMNS)), rows, _ON_A_PHONE)
